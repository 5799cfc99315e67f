"""The sparse step's pre-activations, selection, weighted sums of rows and products of rows, as CUDA kernels.

All sums are taken in a fixed order, so that equal inputs give equal bits. Importing this module requires
Triton.
"""
# pyright: reportOperatorIssue=false
# In a kernel, what a reduction returns is a scalar.

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

GROUPS = 1024
"""Groups of latents whose largest pre-activations bound the k-th largest of a row from below."""
MAX_K = 256
"""A quarter of `GROUPS`, so that few other pre-activations lie above the bound."""
LARGEST = tl.constexpr(0x7FFFFFFF)  # the sign bit of a float is left out: keys order floats above 0


def pre_activations(product: Tensor, bias: Tensor, norms: Tensor | None) -> Tensor:
    """(n, m) `(product + bias) * norms` in one pass; product (n, m), bias (m,), norms (m,) or None.

    Of the same type and rounded as by torch's operations one after the other.
    """
    n, m = product.shape
    dtype = torch.promote_types(product.dtype, bias.dtype)
    if norms is not None:
        dtype = torch.promote_types(dtype, norms.dtype)
    out = torch.empty(n, m, dtype=dtype, device=product.device)
    given = [tensor.contiguous() for tensor in (product, bias, bias if norms is None else norms)]
    if n:
        grid, scale = (n, -(-m // 4096)), norms is not None
        _launch(_pre_activations, grid, *given, out, m, BLOCK=4096, SCALE=scale, num_warps=8)
    return out


def selects(pre: Tensor, k: int) -> bool:
    """Whether `largest_of_rows` takes the pre-activations: at most float32, and k at most `MAX_K`."""
    return k <= MAX_K and pre.dtype in (torch.float32, torch.bfloat16, torch.float16)


def largest_of_rows(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of pre-activations (n, m), 0 where they are below 0, and their columns.

    Of equal ones those of the lowest columns are chosen. NaN is larger than all others. k is at most m.
    """
    n, m = pre.shape
    pre = pre.contiguous()
    values = torch.empty(n, k, dtype=pre.dtype, device=pre.device)
    columns = torch.empty(n, k, dtype=torch.int64, device=pre.device)
    kept = max(256, _power_of_2(4 * k))
    candidates = torch.empty(2, n, kept, dtype=torch.int32, device=pre.device)
    if n:
        sizes = {"K": k, "KEPT": kept, "GROUPS": GROUPS}
        _launch(_largest_of_rows, (n,), pre, values, columns, *candidates, m, **sizes)
    return values, columns


def weighted_rows(
    values: Tensor, columns: Tensor, offsets: Tensor, table: Tensor, dtype: torch.dtype
) -> Tensor:
    """Sums (n, d) of rows of a table (m, d): row i of the output adds values[j] · table[columns[j]].

    `values` and `columns` are (f,); j runs from offsets[i] to offsets[i + 1], offsets (n + 1,).
    """
    n, d = len(offsets) - 1, table.shape[1]
    given = [tensor.contiguous() for tensor in (values, columns, offsets, table)]
    out = torch.empty(n, d, dtype=dtype, device=table.device)
    block = min(256, max(16, _power_of_2(d)))
    if n:
        _launch(_weighted_rows, (n, -(-d // block)), *given, out, d, BLOCK=block, FIRINGS=16)
    return out


def products_of_rows(left: Tensor, offsets: Tensor, columns: Tensor, table: Tensor) -> Tensor:
    """(f,) products of row i of `left` (n, d) and row columns[j] of `table` (m, d).

    j runs from offsets[i] to offsets[i + 1], offsets (n + 1,), columns (f,).
    """
    n, d = left.shape
    given = [tensor.contiguous() for tensor in (left, offsets, columns, table)]
    out = torch.empty(len(columns), dtype=torch.float32, device=left.device)
    block = min(256, max(16, _power_of_2(d)))
    if n:
        _launch(_products_of_rows, (n,), *given, out, d, BLOCK=block, FIRINGS=16)
    return out


def _power_of_2(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def _launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **sizes: Any
) -> None:
    kernel[grid](*args, **sizes, num_warps=num_warps)


@triton.jit
def _pre_activations(  # pragma: no cover - as all below, runs on the device
    product_ptr, bias_ptr, norms_ptr, out_ptr, m, BLOCK: tl.constexpr, SCALE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < m
    product = tl.load(product_ptr + row * m + places, mask=inside).to(tl.float32)
    total = product + tl.load(bias_ptr + places, mask=inside).to(tl.float32)
    if SCALE:
        norms = tl.load(norms_ptr + places, mask=inside).to(tl.float32)
        total = total.to(out_ptr.dtype.element_ty).to(tl.float32) * norms
    tl.store(out_ptr + row * m + places, total, mask=inside)


@triton.jit
def _keys(ptr, places, inside):
    """Integers in the order of the values above 0; 0 for the others."""
    x = tl.load(ptr + places, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(x <= 0.0, 0.0, x)  # NaN stays
    return x.to(tl.int32, bitcast=True) & LARGEST


@triton.jit
def _largest_of_rows(
    pre_ptr,
    values_ptr,
    columns_ptr,
    keys_ptr,
    places_ptr,
    m,
    K: tl.constexpr,
    KEPT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pre_ptr += row * m
    values_ptr += row * K
    columns_ptr += row * K
    keys_ptr += row * KEPT
    places_ptr += row * KEPT
    lanes = tl.arange(0, GROUPS)

    # k groups have a value of at least the k-th largest of the groups' largest: the bound.
    largest = tl.zeros([GROUPS], tl.int32)
    for start in range(0, m, GROUPS):
        places = start + lanes
        largest = tl.maximum(largest, _keys(pre_ptr, places, places < m))
    bound = 0
    for bit in range(31):
        higher = bound | (1 << (30 - bit))
        enough = tl.sum((largest >= higher).to(tl.int32), axis=0) >= K
        bound = tl.where(enough, higher, bound)

    bound = tl.maximum(bound, 1)
    found = 0
    for start in range(0, m, GROUPS):
        places = start + lanes
        keys = _keys(pre_ptr, places, places < m)
        above = (keys >= bound).to(tl.int32)
        slots = found + tl.cumsum(above, axis=0) - 1
        fits = (above > 0) & (slots < KEPT)
        tl.store(keys_ptr + slots, keys, mask=fits)
        tl.store(places_ptr + slots, places, mask=fits)
        found += tl.sum(above, axis=0)
    tl.debug_barrier()

    if (found >= K) & (found <= KEPT):
        slots = tl.arange(0, KEPT)
        keys = tl.load(keys_ptr + slots, mask=slots < found, other=0)
        places = tl.load(places_ptr + slots, mask=slots < found, other=0)
        least = 0
        for bit in range(31):
            higher = least | (1 << (30 - bit))
            enough = tl.sum((keys >= higher).to(tl.int32), axis=0) >= K
            least = tl.where(enough, higher, least)
        above = (keys > least).to(tl.int32)
        equal = (keys == least).to(tl.int32)
        n_above = tl.sum(above, axis=0)
        slots = tl.where(
            above > 0, tl.cumsum(above, axis=0) - 1, n_above + tl.cumsum(equal, axis=0) - 1
        )
        chosen = ((above > 0) | (equal > 0)) & (slots < K)
        tl.store(values_ptr + slots, keys.to(tl.float32, bitcast=True), mask=chosen)
        tl.store(columns_ptr + slots, places.to(tl.int64), mask=chosen)
    else:  # fewer than k above 0, or many equal ones: by all values of the row
        least = 0
        if found > KEPT:
            for bit in range(31):
                higher = least | (1 << (30 - bit))
                n_above = 0
                for start in range(0, m, GROUPS):
                    places = start + lanes
                    keys = _keys(pre_ptr, places, places < m)
                    n_above += tl.sum((keys >= higher).to(tl.int32), axis=0)
                least = tl.where(n_above >= K, higher, least)
        n_above = 0
        for start in range(0, m, GROUPS):
            places = start + lanes
            keys = _keys(pre_ptr, places, places < m)
            n_above += tl.sum((keys > least).to(tl.int32), axis=0)
        before, equal_before = 0, n_above
        for start in range(0, m, GROUPS):
            places = start + lanes
            keys = _keys(pre_ptr, places, places < m)
            above = (keys > least).to(tl.int32)
            equal = ((keys == least) & (places < m)).to(tl.int32)
            slots = tl.where(
                above > 0,
                before + tl.cumsum(above, axis=0) - 1,
                equal_before + tl.cumsum(equal, axis=0) - 1,
            )
            chosen = ((above > 0) | (equal > 0)) & (slots < K)
            tl.store(values_ptr + slots, keys.to(tl.float32, bitcast=True), mask=chosen)
            tl.store(columns_ptr + slots, places.to(tl.int64), mask=chosen)
            before += tl.sum(above, axis=0)
            equal_before += tl.sum(equal, axis=0)


@triton.jit
def _weighted_rows(
    values_ptr,
    columns_ptr,
    offsets_ptr,
    table_ptr,
    out_ptr,
    d,
    BLOCK: tl.constexpr,
    FIRINGS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < d
    start, stop = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, stop, FIRINGS):
        firings = first + tl.arange(0, FIRINGS)
        fired = firings < stop
        values = tl.load(values_ptr + firings, mask=fired, other=0.0).to(tl.float32)
        rows = tl.load(columns_ptr + firings, mask=fired, other=0).to(tl.int64)
        part = tl.load(
            table_ptr + rows[:, None] * d + places[None, :],
            mask=(values != 0.0)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(values[:, None] * part, axis=0)
    tl.store(out_ptr + row * d + places, total, mask=inside)


@triton.jit
def _products_of_rows(
    left_ptr,
    offsets_ptr,
    columns_ptr,
    table_ptr,
    out_ptr,
    d,
    BLOCK: tl.constexpr,
    FIRINGS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    for first in range(start, stop, FIRINGS):
        firings = first + tl.arange(0, FIRINGS)
        fired = firings < stop
        rows = tl.load(columns_ptr + firings, mask=fired, other=0).to(tl.int64)
        total = tl.zeros([FIRINGS, BLOCK], tl.float32)
        for begin in range(0, d, BLOCK):
            places = begin + tl.arange(0, BLOCK)
            inside = places < d
            left = tl.load(left_ptr + row * d + places, mask=inside, other=0.0).to(tl.float32)
            part = tl.load(
                table_ptr + rows[:, None] * d + places[None, :],
                mask=fired[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            total += left[None, :] * part
        tl.store(out_ptr + firings, tl.sum(total, axis=1), mask=fired)
