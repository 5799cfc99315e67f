"""A device beside the CPU, simulated: its tensors hold values, but mix with the CPU's only by copies.

PyTorch's name of the device is "meta", the one that no backend has to be installed for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")


class FarTensor(Tensor):
    """A tensor on the simulated device; `near` holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, near.shape, strides=near.stride(), dtype=near.dtype, device=DEVICE
        )
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, [])


class FarDevice(TorchDispatchMode):
    """Inside this context, operations run on the simulated device.

    Attributes:
        moved: number of elements of each copy to the CPU, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.moved)


def _run(func: Any, args: Any, kwargs: dict[str, Any], moved: list[int]) -> Any:
    far: list[FarTensor] = []
    near: list[Tensor] = []

    def unwrap(value: Any) -> Any:
        if isinstance(value, FarTensor):
            far.append(value)
            return value.near
        if isinstance(value, Tensor) and value.dim():
            near.append(value)
        return value

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        same = [tensor for tensor in far if tensor.near is value]  # changed in place
        return same[0] if same else FarTensor(value)

    device = kwargs.get("device")
    args = tree_map(unwrap, args)
    kwargs = tree_map(unwrap, kwargs)
    if device is not None:
        kwargs["device"] = "cpu"
    found = func(*args, **kwargs)
    if func is torch.ops.aten._to_copy.default and device is not None:
        if torch.device(device) == DEVICE:
            return FarTensor(found)
        moved.append(found.numel())
        return found
    if far and near:
        raise RuntimeError(f"{func}: tensors on two devices")
    there = bool(far) or (device is not None and torch.device(device) == DEVICE)
    return tree_map(wrap, found) if there else found
