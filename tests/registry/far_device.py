"""Devices beside the CPU: CUDA, where there is one, and a simulated one.

Tensors of the simulated device hold values, but mix with the CPU's only by copies. PyTorch's name of the
device is "meta", the one that no backend has to be installed for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from taxolens.registry.architectures.parts import sparse_step
from torch import Tensor
from torch.backends import cudnn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from typing_extensions import Self

DEVICE = torch.device("meta")
CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
)
FAR_DEVICES = [pytest.param(DEVICE.type, id="simulated"), CUDA]
DEVICES = ["cpu", CUDA]
aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
"""Operations of a device whose indices may be on the CPU, as on CUDA."""
DRAWS = (
    *(aten.rand, aten.randn, aten.randint, aten.randperm, aten.rand_like, aten.randn_like),
    *(aten.uniform_, aten.normal_, aten.bernoulli, aten.bernoulli_, aten.multinomial),
)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once; see `repeatable_on`


def on(device: str) -> FarDevice | AsOnCPU:
    """The context in which a computation on one of `FAR_DEVICES` has the numbers of the CPU."""
    return FarDevice() if is_far(device) else AsOnCPU()


@contextmanager
def repeatable_on(device: str) -> Iterator[None]:
    """The context in which a computation on one of `DEVICES` repeats to the bit."""
    torch.use_deterministic_algorithms(device == "cuda")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def is_far(device: Any) -> bool:
    """Whether a device, its name or None is the simulated one."""
    return device is not None and torch.device(device).type == DEVICE.type


class FarTensor(Tensor):
    """A tensor on the simulated device; `near` holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        of = {"dtype": near.dtype, "device": DEVICE, "layout": near.layout}
        if near.layout is torch.strided:
            of["strides"] = near.stride()
        made = Tensor._make_wrapper_subclass(cls, near.shape, **of)  # pyright: ignore[reportAttributeAccessIssue]
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, [])


class FarDevice(TorchDispatchMode):
    """Inside this context, operations run on the simulated device, the sparse step among them.

    Attributes:
        moved: number of elements of each copy to the CPU, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[int] = []
        self._others = ExitStack()

    def __enter__(self) -> Self:
        autocast = torch.autocast

        def cast(kind: str, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
            return nullcontext() if is_far(kind) else autocast(kind, *args, **kwargs)

        self._others.enter_context(mock.patch("torch.Generator", _CPUGenerator))
        self._others.enter_context(mock.patch("torch.autocast", cast))
        self._others.enter_context(mock.patch.object(sparse_step, "runs_on", lambda device: True))
        self._others.enter_context(_WithoutOperations())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._others.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.moved)


class AsOnCPU(TorchDispatchMode):
    """Inside this context, CUDA differs from the CPU by rounding alone.

    Random numbers are drawn on the CPU, and convolutions do not round their inputs to TF32, PyTorch's default.
    """

    def __enter__(self) -> Self:
        self._generators = mock.patch("torch.Generator", _CPUGenerator)
        self._generators.start()
        self._tf32, cudnn.allow_tf32 = cudnn.allow_tf32, False
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        cudnn.allow_tf32 = self._tf32
        self._generators.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = kwargs.get("device") or getattr(args[0], "device", "cpu")
        if func.overloadpacket not in DRAWS or there == DEVICE:
            return func(*args, **kwargs)
        near = tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, args)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu", "pin_memory": False}
        found = func(*near, **kwargs)
        if func.overloadpacket.__name__.endswith("_"):
            return args[0].copy_(found)
        return found.to(there)


class _CPUGenerator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Self:
        return super().__new__(cls, "cpu")


class _WithoutOperations(TorchFunctionMode):
    """What makes, replaces or reads the values of a tensor on a device without an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_far(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.new_tensor and is_far(kwargs.get("device", args[0].device)):
            return torch.tensor(args[1], dtype=kwargs.get("dtype") or args[0].dtype).to(DEVICE)
        if func is torch.sparse_csr_tensor and any(isinstance(v, FarTensor) for v in args):
            assert all(isinstance(v, FarTensor) for v in args[:3]), "tensors on two devices"
            return FarTensor(func(*(v.near for v in args[:3]), *args[3:], **kwargs))
        if func is Tensor.tolist and isinstance(args[0], FarTensor):
            return args[0].cpu().tolist()
        if func == Tensor.is_meta.__get__ and isinstance(args[0], FarTensor):  # pyright: ignore[reportAttributeAccessIssue]
            return False
        if func == Tensor.data.__set__ and isinstance(args[1], FarTensor):  # pyright: ignore[reportAttributeAccessIssue]
            args[0].near = args[1].near
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any], moved: list[int]) -> Any:
    far: list[FarTensor] = []
    near: list[Tensor] = []

    def unwrap(value: Any) -> Any:
        if isinstance(value, FarTensor):
            far.append(value)
            return value.near
        if isinstance(value, Tensor):
            assert not is_far(value.device), f"{func}: a tensor of the device without values"
            if value.dim():
                near.append(value)
        return value

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        same = [tensor for tensor in far if tensor.near is value]  # changed in place
        return same[0] if same else FarTensor(value)

    device = kwargs.get("device")
    first_is_far = bool(args) and isinstance(args[0], FarTensor)
    args = tree_map(unwrap, args)
    kwargs = tree_map(unwrap, kwargs)
    if device is not None:
        kwargs["device"] = "cpu"
    found = func(*args, **kwargs)
    if func is aten.copy_.default or (func is aten._to_copy.default and device is not None):
        there = first_is_far if func is aten.copy_.default else is_far(device)
        if far and not there:
            moved.append(found.numel())
        return wrap(found) if there else found
    if far and near and not (func in INDEXED and first_is_far):
        raise RuntimeError(f"{func}: tensors on two devices")
    return tree_map(wrap, found) if far or is_far(device) else found
