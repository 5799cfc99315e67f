"""Matching pursuit over a batch, exact and fast.

The textbook loop (Mallat & Zhang 1993; Costa et al. 2025, arXiv 2506.03093, section 3) starts at
r = x and repeats: j = argmax D r, a = relu(D_j . r), r <- r - a D_j. It costs one (n, d) x (d, m)
product per step. c = D r has its own recurrence: c <- c - a G_j with the Gram matrix G = D D^T, one
row of G per step, the update of Batch-OMP (Rubinstein et al. 2008, section 3).

Exactness: the path (the atom of each step, ties to the lowest index, early stops) is that of the
textbook loop, except for ties within rounding: where two correlations differ by less than the rounding
of their sums (about 1e-6 of their size in float32), the order of summation decides, which differs
between devices, routes and batch sizes. Where a gradient is required, values and gradients
are computed along that path from the residual, as in the textbook loop; otherwise the values are
computed from the correlations and agree to rounding.

Memory, without input and output: G (m^2 numbers, refused above `max_gram_bytes`), the correlations
(n m), on the CPU the scores of one block of rows (`ROW_BLOCK` m, or `FUSED_BLOCK` m where
compiled), on CUDA a second n m without the kernel and, with gradients, O(n d): the backward pass
recomputes each residual instead of storing all k of them.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .triton_kernels import TritonKernels

logger = logging.getLogger(__name__)

Method = Literal["auto", "gram", "textbook"]

MAX_GRAM_BYTES = 2**30
# Rows per block on the CPU, so that their correlations fit into a core's L2 cache.
ROW_BLOCK = 64
# The same for the compiled update, which reads each matrix once: large enough to amortise the calls,
# and one shape for any size of batch, as each shape is compiled separately.
FUSED_BLOCK = 256
PATH_BLOCK = 256
# Multiply-adds that take as long as one element of the Gram update; measured on a Xeon with AVX-512
# (1.9 ns against 0.0105 ns). On CUDA an estimate from bandwidth against FP32 throughput.
ELEMENT_COST = {"cpu": 180, "cuda": 64}
# Assumed number of later calls that use a cached Gram matrix.
ASSUMED_REUSE = 4


class Path(NamedTuple):
    """Atom and coefficient of each step, both (n, k); 0 after a stop."""

    indices: Tensor
    values: Tensor

    def dense(self, d_sae: int) -> Tensor:
        """The codes as (n, d_sae); an atom chosen twice carries the sum."""
        zeros = self.values.new_zeros(self.values.shape[0], d_sae)
        return zeros.scatter_add(1, self.indices, self.values)


class Codes(NamedTuple):
    """A path and its `residual` (n, d), x minus the sum of values times atoms."""

    indices: Tensor
    values: Tensor
    residual: Tensor

    def dense(self, d_sae: int) -> Tensor:
        """The codes as (n, d_sae); an atom chosen twice carries the sum."""
        return Path(self.indices, self.values).dense(d_sae)


@dataclass
class GramCache:
    """The Gram matrix of the last dictionary; up to `max_gram_bytes` until cleared.

    A dictionary is identified by its product with a fixed random vector: the version counter of a
    tensor misses writes through `.data`, with which SAELens folds weights.
    """

    gram: Tensor | None = None
    fingerprint: Tensor | None = None

    def get(self, atoms: Tensor) -> Tensor | None:
        """The cached matrix (m, m) if it is that of `atoms`, else None."""
        if self.gram is None or self.fingerprint is None:
            return None
        if self.gram.device != atoms.device or self.gram.dtype != atoms.dtype:
            return None
        same = torch.equal(_fingerprint(atoms), self.fingerprint)
        return self.gram if same else None

    def build(self, atoms: Tensor) -> Tensor:
        """Compute and cache the Gram matrix (m, m) of `atoms`."""
        self.clear()  # first, so that there are never two in memory
        self.gram, self.fingerprint = gram_matrix(atoms), _fingerprint(atoms)
        return self.gram

    def clear(self) -> None:
        """Release the cached matrix."""
        self.gram = self.fingerprint = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "GramCache":
        return GramCache()

    def __getstate__(self) -> dict[str, Any]:
        return {"gram": None, "fingerprint": None}


def matching_pursuit(x: Tensor, atoms: Tensor, k: int, **how: Any) -> Codes:
    """Matching pursuit of each row of `x`, differentiable in `x` and `atoms` for a fixed path.

    Keyword arguments are those of `pursuit_path`.
    """
    path = pursuit_path(x, atoms, k, **how)
    values, residual = _AlongPath.apply(x, atoms, path.indices, path.values > 0)  # type: ignore[misc]
    return Codes(path.indices, values, residual)


@torch.no_grad()
def pursuit_path(
    x: Tensor,
    atoms: Tensor,
    k: int,
    *,
    correlations: Tensor | None = None,
    residual_threshold: float = 0.0,
    stop_on_duplicate: bool = False,
    allowed: Tensor | None = None,
    cache: GramCache | None = None,
    method: Method = "auto",
    max_gram_bytes: int = MAX_GRAM_BYTES,
    compiled: bool = False,
) -> Path:
    """The path of matching pursuit, without gradients, for encoding.

    Args:
        x: inputs, bias removed, (n, d), float32 or float64.
        atoms: the dictionary, (m, d), of the same dtype; unit rows for the paper's guarantees.
        k: number of steps.
        correlations: ``x @ atoms.T`` (n, m), if already computed; not modified.
        residual_threshold: a row stops once the norm of its residual is below; 0 never stops.
        stop_on_duplicate: a row stops when a step does not change its support.
        allowed: atoms that may be chosen, (m,) bool; None for all.
        cache: stores the Gram matrix between calls with an unchanged dictionary.
        method: "textbook", "gram", or "auto", the faster one by shape.
        max_gram_bytes: size limit of the Gram matrix.
        compiled: fuse the Gram update and the arg-max with torch.compile (CPU), which takes some
            seconds for each m. Without a C++ compiler the plain update is used, which is logged.
            On CUDA a Triton kernel is used in either case.
    """
    x, atoms = x.detach(), atoms.detach()
    correlations = x @ atoms.T if correlations is None else correlations.detach()
    if allowed is not None:
        correlations = correlations.masked_fill(~allowed, -torch.inf)
    gram = _choose_gram(x, atoms, k, cache, method, max_gram_bytes)
    stop = _Stop(residual_threshold, stop_on_duplicate)
    if gram is None:
        return _textbook_path(x, atoms, k, correlations, stop, allowed)
    return _gram_path(x, atoms, gram, k, correlations, stop, compiled)


def gram_matrix(atoms: Tensor, block: int = 2048) -> Tensor:
    """``atoms @ atoms.T`` (m, m), computing one triangle and mirroring it."""
    m = atoms.shape[0]
    gram = atoms.new_empty(m, m)
    for start in range(0, m, block):
        stop = min(start + block, m)
        torch.mm(atoms[start:stop], atoms[start:].T, out=gram[start:stop, start:])
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def gram_pays(n: int, m: int, d: int, k: int, *, device: str = "cpu", reuse: int = 1) -> bool:
    """Whether the Gram route needs less time than the textbook loop, counted in multiply-adds."""
    textbook = (k - 1) * n * m * d
    build = 0 if reuse == 0 else m * m * d // (2 * reuse)
    return build + k * n * m * ELEMENT_COST.get(device, ELEMENT_COST["cuda"]) < textbook


@dataclass(frozen=True)
class _Stop:
    residual_threshold: float
    on_duplicate: bool

    def __bool__(self) -> bool:
        return self.residual_threshold > 0 or self.on_duplicate

    def reached(self, path: Path, step: int, residual: Tensor | None) -> Tensor:
        """Rows (n,) bool that stop after `step`, by SAELens's two criteria."""
        index, value = path.indices[:, step], path.values[:, step]
        done = torch.zeros_like(index, dtype=torch.bool)
        if self.on_duplicate:
            earlier = (path.indices[:, :step] == index[:, None]) & (path.values[:, :step] > 0)
            done |= (value <= 0) | earlier.any(dim=1)
        if self.residual_threshold > 0 and residual is not None:
            done |= residual.norm(dim=1) < self.residual_threshold
        return done


def _choose_gram(
    x: Tensor, atoms: Tensor, k: int, cache: GramCache | None, method: Method, max_bytes: int
) -> Tensor | None:
    (n, d), m = x.shape, atoms.shape[0]
    if method == "textbook" or x.is_meta:
        return None
    if method == "auto":
        if m * m * atoms.element_size() > max_bytes:
            return None
        device = x.device.type
        if not gram_pays(n, m, d, k, device=device, reuse=0):
            return None
        kept = cache.get(atoms) if cache else None
        if kept is None and not gram_pays(
            n, m, d, k, device=device, reuse=ASSUMED_REUSE if cache else 1
        ):
            return None
    else:
        kept = cache.get(atoms) if cache else None
    if kept is not None:
        return kept
    return cache.build(atoms) if cache else gram_matrix(atoms)


def _textbook_path(
    x: Tensor, atoms: Tensor, k: int, scores: Tensor, stop: _Stop, allowed: Tensor | None
) -> Path:
    path = _empty_path(x, k)
    residual = x
    active = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    for step in range(k):
        if step:
            scores = residual @ atoms.T
            if allowed is not None:
                scores = scores.masked_fill(~allowed, -torch.inf)
        index = scores.argmax(dim=1)
        chosen = atoms.index_select(0, index)
        value = torch.linalg.vecdot(residual, chosen).relu() * active
        if allowed is not None:
            value = value * allowed[index]
        path.indices[:, step], path.values[:, step] = index, value
        residual = residual - value[:, None] * chosen
        if stop:
            active &= ~stop.reached(path, step, residual)
            if not x.is_meta and not active.any():
                break
    return path


def _gram_path(
    x: Tensor,
    atoms: Tensor,
    gram: Tensor,
    k: int,
    correlations: Tensor,
    stop: _Stop,
    compiled: bool,
) -> Path:
    path = _empty_path(x, k)
    if _by_kernel(correlations, gram, path, stop):
        return path
    for rows, update in _row_blocks(x, compiled):
        part = Path(path.indices[rows], path.values[rows])
        _gram_rows(x[rows], atoms, gram, correlations[rows], stop, part, update)
    return path


Update = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _row_blocks(x: Tensor, compiled: bool) -> Iterator[tuple[slice, Update]]:
    """Blocks of rows, each with its update; an incomplete block is not compiled."""
    n = x.shape[0]
    if x.is_cuda:
        yield slice(0, n), _update
        return
    fused = n - n % FUSED_BLOCK if compiled else 0
    for start in range(0, fused, FUSED_BLOCK):
        yield slice(start, start + FUSED_BLOCK), _fused_update
    for start in range(fused, n, ROW_BLOCK):
        yield slice(start, start + ROW_BLOCK), _update


def _gram_rows(
    x: Tensor, atoms: Tensor, gram: Tensor, start: Tensor, stop: _Stop, path: Path, update: Update
) -> None:
    """Fill `path` for one block of rows."""
    k = path.indices.shape[1]
    scores = start.clone(memory_format=torch.contiguous_format)
    # The norm is computed from the residual: its recurrence loses all precision once the
    # residual is small compared to x.
    residual = x.clone() if stop.residual_threshold > 0 else None
    active = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    index = scores.argmax(dim=1)
    best = scores.gather(1, index[:, None]).squeeze(1)
    for step in range(k):
        value = best.clamp_min(0.0) * active
        path.indices[:, step], path.values[:, step] = index, value
        if residual is not None:
            residual.addcmul_(atoms.index_select(0, index), value[:, None], value=-1)
        if stop:
            active &= ~stop.reached(path, step, residual)
            if not active.any():
                break
        if step + 1 < k:
            best, index = update(scores, gram, index, value)


def _update(scores: Tensor, gram: Tensor, index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """``scores -= value * gram[index]`` in place; the new maximum of each row and its index."""
    scores.addcmul_(gram.index_select(0, index), value[:, None], value=-1)
    # max(dim=1) costs three times as much as argmax and a gather
    index = scores.argmax(dim=1)
    return scores.gather(1, index[:, None]).squeeze(1), index


def _fusable_update(
    scores: Tensor, gram: Tensor, index: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_update`, in a form that inductor compiles to one loop."""
    new = scores - value[:, None] * gram[index]
    scores.copy_(new)
    return new.amax(dim=1), new.argmax(dim=1)


class _FusedUpdate:
    """As `_update`, in one pass over the scores where that can be compiled."""

    compiled: Update | None = None
    impossible = False

    def __call__(
        self, scores: Tensor, gram: Tensor, index: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.impossible:
            return _update(scores, gram, index, value)
        if self.compiled is None:
            self.compiled = torch.compile(_fusable_update, dynamic=False)
        try:
            return self.compiled(scores, gram, index, value)
        except Exception as error:  # no compiler, or compilation fails: not tried again
            logger.info("the fused pursuit cannot be compiled, the plain one is used: %s", error)
            self.impossible = True
            return _update(scores, gram, index, value)


_fused_update = _FusedUpdate()


_kernels = TritonKernels("pursuit_triton", "matching pursuit")


def _by_kernel(correlations: Tensor, gram: Tensor, path: Path, stop: _Stop) -> bool:
    """Fill `path`; False where the torch loop has to do it."""
    if stop.residual_threshold > 0 or not (_kernels.serve(gram) and _kernels.module.fits(gram)):
        return False
    if _kernels.run("pursue", correlations, gram, *path, stop.on_duplicate) is None:
        path.indices.zero_()
        path.values.zero_()
        return False
    return True


def _empty_path(x: Tensor, k: int) -> Path:
    n = x.shape[0]
    return Path(
        torch.zeros(n, k, dtype=torch.int64, device=x.device),
        torch.zeros(n, k, dtype=x.dtype, device=x.device),
    )


@functools.cache
def _probe(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(d, generator=generator).to(device, dtype)


def _fingerprint(atoms: Tensor) -> Tensor:
    return atoms @ _probe(atoms.shape[1], atoms.dtype, atoms.device)


class _AlongPath(torch.autograd.Function):
    """Coefficients (n, k) and final residual (n, d) along a fixed path, as in the textbook loop.

    With r_0 = x: a_t = relu(D_t . r_t) where the step is active, else 0; r_{t+1} = r_t - a_t D_t.
    Backward runs the recurrence in reverse from r_k, so only the last residual is stored.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, atoms: Tensor, indices: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        n, k = indices.shape
        values, residual = x.new_zeros(n, k), x.clone()
        for rows in _blocks(x):
            r = residual[rows]
            for step in range(k):
                chosen = atoms.index_select(0, indices[rows, step])
                a = torch.linalg.vecdot(r, chosen).relu_() * active[rows, step]
                values[rows, step] = a
                r.addcmul_(chosen, a[:, None], value=-1)
        ctx.save_for_backward(atoms, indices, values, residual)
        return values, residual

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_values: Tensor, grad_residual: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        atoms, indices, values, last_residual = ctx.saved_tensors
        grad_x = grad_residual.clone()
        grad_atoms = torch.zeros_like(atoms) if ctx.needs_input_grad[1] else None
        for rows in _blocks(grad_x):
            r, rho = last_residual[rows].clone(), grad_x[rows]
            for step in reversed(range(indices.shape[1])):
                index, a = indices[rows, step], values[rows, step]
                chosen = atoms.index_select(0, index)
                r.addcmul_(chosen, a[:, None])
                # d a_t: from the loss directly, and through r_{t+1} = r_t - a_t D_t
                da = (grad_values[rows, step] - torch.linalg.vecdot(rho, chosen)) * (a > 0)
                if grad_atoms is not None:
                    contribution = (r * da[:, None]).addcmul_(rho, a[:, None], value=-1)
                    grad_atoms.index_add_(0, index, contribution)
                rho.addcmul_(chosen, da[:, None])
        return grad_x, grad_atoms, None, None


def _blocks(x: Tensor) -> list[slice]:
    block = PATH_BLOCK if x.device.type == "cpu" else max(x.shape[0], 1)
    return [slice(start, start + block) for start in range(0, x.shape[0], block)]
