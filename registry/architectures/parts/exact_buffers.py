"""Counters and sums that keep their values where an SAE in half precision is saved, loaded or moved."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override


class ExactBuffers(nn.Module):
    """Mixin: the buffers named in `exact`, int64 or floats, keep their values and at least their type.

    SAELens casts the tensors of a file to the SAE's type, and then the SAE: a count of 50,040 is 49,920 in bfloat16, and in float16
    whatever exceeds 65,504 is infinite. So a state dict has the bytes of these buffers, (bytes,) uint8: 0 to 255 are numbers of
    every type. States that have the numbers themselves are loaded as well.
    """

    exact: ClassVar[tuple[str, ...]] = ()

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.exact:
            buffer = destination[prefix + name].detach()
            # Infinity stays one, so that a training that has diverged is found.
            if buffer.is_meta or not buffer.is_floating_point() or buffer.isfinite().all():
                destination[prefix + name] = buffer.contiguous().flatten().view(torch.uint8)

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.exact:
            if (saved := state_dict.get(prefix + name)) is not None:
                state_dict[prefix + name] = _numbers(saved, self.get_buffer(name))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @override
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        before = {name: self._buffers.get(name) for name in self.exact}
        out = super()._apply(*args, **kwargs)
        for name, buffer in before.items():
            moved = self._buffers.get(name)
            if buffer is None or moved is None:
                continue
            dtype = torch.promote_types(buffer.dtype, moved.dtype)
            if dtype != moved.dtype:
                values = moved if buffer.is_meta else buffer
                self._buffers[name] = values.to(moved.device, dtype)
        return out


def _numbers(saved: Tensor, buffer: Tensor) -> Tensor:
    """The numbers of `buffer` in a state dict, in its shape."""
    floats = buffer.is_floating_point()
    if saved.shape == buffer.shape:  # numbers, not bytes
        if floats:
            return saved.to(torch.promote_types(saved.dtype, buffer.dtype))
        if saved.is_floating_point():  # infinity is no integer
            saved = saved.clamp(max=torch.finfo(saved.dtype).max)
        return saved.to(buffer.dtype)
    narrow = saved.numel() == 4 * buffer.numel()
    dtype = (torch.float32 if narrow else torch.float64) if floats else buffer.dtype
    return saved.to(torch.uint8).clone().view(dtype).reshape(buffer.shape)
