"""CUDA kernels where Triton is installed and compiles them."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class TritonKernels:
    """The functions of a module that imports Triton, until one of them fails.

    Args:
        module: name of the module, beside this one.
        use: what the kernels are for, in the warning.
    """

    def __init__(self, module: str, use: str) -> None:
        self.name, self.use = module, use
        self.impossible = False

    @functools.cached_property
    def _imported(self) -> Any:
        try:
            return importlib.import_module(f".{self.name}", __package__)
        except ImportError:
            return None

    @property
    def module(self) -> Any:
        """The module, or None without Triton and after a failure."""
        return None if self.impossible else self._imported

    def serve(self, tensor: Tensor) -> bool:
        """Whether the kernels take the tensor: on CUDA, and not in float64, since they compute in float32."""
        return tensor.is_cuda and tensor.dtype != torch.float64 and self.module is not None

    def run(self, function: str, tensor: Tensor, *args: Any) -> Any:
        """What a function of the module returns; None where torch's operations have to do it.

        It runs on the device of `tensor`, its first argument: Triton would take the current one.
        """
        if not self.serve(tensor):
            return None
        try:
            with torch.cuda.device_of(tensor):
                return getattr(self.module, function)(tensor, *args)
        except Exception as error:  # of the compiler, or of the launch: not tried again
            self.impossible = True
            logger.warning(
                "the Triton kernels of %s fail, torch's operations are used: %s: %s",
                self.use,
                type(error).__name__,
                error,
            )
            return None
