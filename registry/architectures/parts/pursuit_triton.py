"""The Gram update and arg-max of matching pursuit as one CUDA kernel, with one program per row of x.

The correlations of the row stay in registers for all k steps; a step reads only one row of the
Gram matrix. Of equal correlations the atom of the lowest index is chosen, as in the torch loop. Importing
this module requires Triton.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

# 16384 correlations over 16 warps are 32 registers a thread.
MAX_ATOMS = 16384


def fits(gram: Tensor) -> bool:
    """Whether a row fits into one program: float32 and at most `MAX_ATOMS` atoms."""
    return gram.dtype == torch.float32 and gram.shape[0] <= MAX_ATOMS


def pursue(
    correlations: Tensor, gram: Tensor, indices: Tensor, values: Tensor, stop_on_duplicate: bool
) -> Tensor:
    """Fill `indices` and `values` (n, k) from `correlations` (n, m) and `gram` (m, m); returns `values`."""
    n, k = indices.shape
    if n == 0:
        return values
    correlations = correlations.contiguous()
    block = triton.next_power_of_2(gram.shape[0])
    launch: Any = _pursue[(n,)]  # pyright: ignore[reportIndexIssue]
    launch(
        correlations,
        gram,
        indices,
        values,
        gram.shape[0],
        k,
        BLOCK=block,
        STEPS=triton.next_power_of_2(k),
        STOP=stop_on_duplicate,
        num_warps=min(16, max(1, block // 512)),
    )
    return values


@triton.jit
def _pursue(  # pragma: no cover - runs on the device
    correlations_ptr,  # Triton refuses annotations other than its own
    gram_ptr,
    indices_ptr,
    values_ptr,
    m,
    k: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    STOP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < m
    steps = tl.arange(0, STEPS)
    scores = tl.load(correlations_ptr + row * m + columns, mask=inside, other=float("-inf"))
    chosen = tl.full([STEPS], -1, tl.int32)
    active = 1.0
    for step in range(k):
        index = tl.argmax(scores, axis=0)
        value = tl.maximum(tl.max(scores, axis=0), 0.0) * active
        tl.store(indices_ptr + row * k + step, index.to(tl.int64))
        tl.store(values_ptr + row * k + step, value)
        if STOP:
            again = tl.sum((chosen == index).to(tl.int32), axis=0)
            repeated = again > 0  # pyright: ignore[reportOperatorIssue]  # a scalar in the kernel
            active = tl.where((value <= 0.0) | repeated, 0.0, active)
            chosen = tl.where(steps == step, tl.where(value > 0.0, index, -1), chosen)
        atom = tl.load(gram_ptr + index.to(tl.int64) * m + columns, mask=inside, other=0.0)
        scores = scores - value * atom
