"""Sums of values in half precision."""

import torch


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which to add values of `dtype`: a running sum in bfloat16 stops growing, of ones at 256."""
    return torch.promote_types(dtype, torch.float32)
