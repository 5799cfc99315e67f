"""The torch dtypes that a config can name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...registry.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16", "float64")
ACTIVATION_DTYPES = ("float32", "float16", "bfloat16")
"""Those that activations can be kept in."""


def torch_dtype(dtype: str | torch.dtype, allowed: Sequence[str] = DTYPES) -> torch.dtype:
    """The torch dtype called `dtype`.

    Raises:
        ConfigError: not one of `allowed`.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in allowed:
        raise ConfigError("dtype", "not known", given=name, allowed=", ".join(allowed))
    return getattr(torch, name)
