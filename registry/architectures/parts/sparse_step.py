"""A training step of top-k architectures that computes with the firing latents alone.

Of the five matrix products of a step over d_in and d_sae (encoding, decoding, and the gradients of the
encoder, the decoder and the latents) only encoding needs every latent. The others are computed from
the k rows of latents that fire: decoding is a weighted sum of k rows of `W_dec`, and the gradient of
`W_enc` is a product with a sparse matrix. The auxiliary loss of dead latents is computed from those that
it selects, or from the dead latents where these are few. The function is SAELens's; sums are taken in
another order, so that results differ by rounding. On CUDA, Triton kernels select and sum, in an order of their
own that is the same at every run.

The saved files, the config and the state of a checkpoint are those of the architecture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor
from typing_extensions import override

from .precision import at_least_float32
from .triton_kernels import TritonKernels

LEAST_WIDTH = 8
"""Latents for each one that fires, from which on the sparse step is faster."""
SAMPLE_STRIDE = 101
"""Of the pre-activations of a batch every one at this distance estimates the batch's threshold."""

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
kernels = TritonKernels("sparse_step_triton", "the sparse step")


class Firings:
    """Which of m latents fire for n inputs, by input.

    Args:
        columns: (f,) the latent of each firing.
        offsets: (n + 1,) where the firings of each input start, and f.
        m: number of latents.
    """

    def __init__(self, columns: Tensor, offsets: Tensor, m: int) -> None:
        self.columns, self.offsets, self.m = columns, offsets, m

    @classmethod
    def by_row(cls, columns: Tensor, m: int) -> Firings:
        """Those of inputs with k firings each, from their latents (n, k)."""
        n, k = columns.shape
        offsets = torch.arange(0, n * k + 1, k, device=columns.device)
        found = cls(columns.flatten(), offsets, m)
        found.rows = torch.arange(n, device=columns.device).repeat_interleave(k)
        return found

    @cached_property
    def rows(self) -> Tensor:
        """(f,) the input of each firing."""
        n = len(self.offsets) - 1
        counts = self.offsets.diff()
        return torch.arange(n, device=counts.device).repeat_interleave(
            counts, output_size=len(self.columns)
        )

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """(f,) the order of the firings by latent, and (m + 1,) where those of each latent start, and f."""
        latents, order = self.columns.sort(stable=True)
        if latents.is_cuda:  # where counting waits for the GPU
            every = torch.arange(self.m + 1, device=latents.device)
            return order, torch.searchsorted(latents, every)
        return order, F.pad(torch.bincount(latents, minlength=self.m).cumsum(0), (1, 0))

    @cached_property
    def rows_by_latent(self) -> Tensor:
        """(f,) the input of each firing, in the order of `by_latent`."""
        return self.rows[self.by_latent[0]]

    def sums(self, g: Tensor) -> Tensor:
        """(m,) the sum of g (f,) over the firings of each latent."""
        if kernels.serve(g):  # index_add_ has no fixed order there
            order, ends = self.by_latent
            zeros, one = torch.zeros_like(order), g.new_ones(1, 1)
            return weighted_rows(g[order], zeros, ends, one, g.dtype).flatten()
        total = g.new_zeros(self.m, dtype=at_least_float32(g.dtype))
        return total.index_add_(0, self.columns, g.to(total.dtype)).to(g.dtype)

    def summed_rows(self, g: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        """(m, d) for each latent the sum of the rows of its inputs in `table` (n, d), weighted by g (f,)."""
        order, ends = self.by_latent
        return weighted_rows(g[order], self.rows_by_latent, ends, table, dtype)


class FiredLatents(NamedTuple):
    """Values (f,) of firings, by input."""

    values: Tensor
    where: Firings

    @classmethod
    def by_row(cls, values: Tensor, columns: Tensor, m: int) -> FiredLatents:
        """Those of inputs with k firings each, from (n, k) values and columns."""
        return cls(values.flatten(), Firings.by_row(columns, m))

    def between(self, start: int, stop: int) -> FiredLatents:
        """Those of the latents `start` to `stop`; with kernels the others too, with values of 0."""
        columns, offsets, m = self.where.columns, self.where.offsets, self.where.m
        inside = (columns >= start) & (columns < stop)
        if kernels.serve(columns):  # their number is not waited for, their order by latent is kept
            return self._replace(values=self.values * inside)
        before = F.pad(inside.cumsum(0), (1, 0))
        return FiredLatents(self.values[inside], Firings(columns[inside], before[offsets], m))

    def dense(self) -> Tensor:
        """(n, m) activations of all latents, without a gradient."""
        acts = self.values.new_zeros(len(self.where.offsets) - 1, self.where.m)
        acts[self.where.rows, self.where.columns] = self.values.detach()
        return acts

    def decoded(self, W_dec: Tensor, norms: Tensor | None = None) -> Tensor:
        """(n, d_in) the sum of the rows of `W_dec` (m, d_in), weighted by value, and over `norms` (m,)."""
        values = self.values
        if norms is not None:
            values = values / OfLatents.apply(norms, self.where)
        if kernels.serve(W_dec):
            return WeightedRows.apply(values, W_dec, self.where)
        dtype = at_least_float32(W_dec.dtype)  # in which the gradients are added too
        return F.embedding_bag(
            self.where.columns,
            W_dec.to(dtype),
            self.where.offsets,
            mode="sum",
            per_sample_weights=values.to(dtype),
            include_last_offset=True,
        ).to(W_dec.dtype)


class OfLatents(torch.autograd.Function):
    """`apply(vector, where)`: the entries (f,) of a vector (m,) at the latents of `Firings`."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, where: Firings) -> Tensor:
        ctx.where = where
        return vector.index_select(0, where.columns)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.where.sums(gradients[0]), None


class RowNorms(torch.autograd.Function):
    """`apply(table)`: the norms (m,) of the rows of a table (m, d); their gradient in one pass over it."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        norms = table.norm(dim=-1)
        ctx.save_for_backward(table, norms)
        return norms

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        table, norms = ctx.saved_tensors
        return table * (gradients[0] / _above_zero(norms)).unsqueeze(1)


class WeightedRows(torch.autograd.Function):
    """`apply(values, table, where)`: sums (n, d) of the rows of a table (m, d) at `Firings`, weighted by values (f,)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, table: Tensor, where: Firings) -> Tensor:
        ctx.save_for_backward(values, table)
        ctx.where = where
        return weighted_rows(values, where.columns, where.offsets, table, table.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g, where = gradients[0], ctx.where
        values, table = ctx.saved_tensors
        of_values = of_table = None
        if ctx.needs_input_grad[0]:
            of_values = kernels.run("products_of_rows", g, where.offsets, where.columns, table)
            if of_values is None:
                of_values = (g[where.rows] * table[where.columns]).sum(1)
            of_values = of_values.to(values.dtype)
        if ctx.needs_input_grad[1]:
            of_table = where.summed_rows(values, g, table.dtype)
        return of_values, of_table, None


def weighted_rows(
    values: Tensor, columns: Tensor, offsets: Tensor, table: Tensor, dtype: torch.dtype
) -> Tensor:
    """(n, d) row i adds values[j] · table[columns[j]] for j from offsets[i] to offsets[i + 1].

    `values` and `columns` are (f,), `offsets` (n + 1,), `table` (m, d); the sum is of type `dtype`.
    """
    found = kernels.run("weighted_rows", values, columns, offsets, table, dtype)
    if found is not None:
        return found
    shape = (len(offsets) - 1, len(table))
    wide = at_least_float32(torch.promote_types(values.dtype, table.dtype))
    weights = torch.sparse_csr_tensor(  # of which there are none in bfloat16
        offsets, columns, values.to(wide), shape, check_invariants=False
    )
    return (weights @ table.to(wide)).to(dtype)


class SparseEncode(torch.autograd.Function):
    """Pre-activations, and the latents that fire; the gradient of the encoder from those alone.

    `apply(x, centre, W_enc, b_enc, norms, select)`: x (n, d_in); centre (d_in,), which has been subtracted
    from x and gets the gradient of that, or None; W_enc (d_in, m), b_enc (m,), norms (m,) that
    multiply the pre-activations, or None. `select` gives the `FiredLatents` of pre-activations (n, m).
    Returns the values of these, the pre-activations and the `Firings`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        centre: Tensor | None,
        W_enc: Tensor,
        b_enc: Tensor,
        norms: Tensor | None,
        select: Callable[[Tensor], FiredLatents],
    ) -> tuple[Tensor, Tensor, Firings]:
        pre = _pre_activations(x @ W_enc, b_enc, norms)
        values, ctx.where = select(pre)
        ctx.save_for_backward(x, W_enc, norms, pre, values)
        ctx.set_materialize_grads(False)
        return values, pre, ctx.where

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_values, of_pre, _ = gradients
        x, W_enc, norms, pre, values = ctx.saved_tensors
        g = None if of_values is None else of_values * (values > 0)
        if of_pre is not None:
            if g is not None:
                at = (ctx.where.rows, ctx.where.columns)
                of_pre = of_pre.index_put(at, g, accumulate=True)
            return *_dense_gradients(ctx, of_pre, x, W_enc, norms, pre), None
        if g is None:
            return (None,) * 6
        fired = FiredLatents(values, ctx.where)
        return *_sparse_gradients(ctx, g, x, W_enc, norms, fired), None


class SparsePick(torch.autograd.Function):
    """Pre-activations at given latents of each input; the gradient of the encoder from those alone.

    `apply(x, centre, W_enc, b_enc, norms, pre, where)`: the first five as for `SparseEncode`, pre (n, m)
    its pre-activations, where the `Firings`. Returns the values (f,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        centre: Tensor | None,
        W_enc: Tensor,
        b_enc: Tensor,
        norms: Tensor | None,
        pre: Tensor,
        where: Firings,
    ) -> Tensor:
        values = pre[where.rows, where.columns]
        ctx.save_for_backward(x, W_enc, norms, values)
        ctx.where = where
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, norms, values = ctx.saved_tensors
        fired = FiredLatents(values, ctx.where)
        return *_sparse_gradients(ctx, gradients[0], x, W_enc, norms, fired), None, None


def _pre_activations(product: Tensor, b_enc: Tensor, norms: Tensor | None) -> Tensor:
    found = kernels.run("pre_activations", product, b_enc, norms)
    if found is not None:
        return found
    pre = product + b_enc
    return pre if norms is None else pre * norms


def _dense_gradients(
    ctx: Any, g: Tensor, x: Tensor, W_enc: Tensor, norms: Tensor | None, pre: Tensor
) -> tuple[Tensor | None, ...]:
    of_norms = None
    if norms is not None:
        of_norms = (g * pre).sum(0) / _above_zero(norms)
        g = g * norms
    g = g.to(W_enc.dtype)
    of_x = g @ W_enc.T if ctx.needs_input_grad[0] else None
    of_b = g.sum(0)
    of_centre = -(W_enc @ of_b) if ctx.needs_input_grad[1] else None
    of_W = x.to(W_enc.dtype).T @ g if ctx.needs_input_grad[2] else None
    return of_x, of_centre, of_W, of_b, of_norms


def _sparse_gradients(
    ctx: Any, g: Tensor, x: Tensor, W_enc: Tensor, norms: Tensor | None, fired: FiredLatents
) -> tuple[Tensor | None, ...]:
    where = fired.where
    wide = at_least_float32(g.dtype)
    g, values = g.to(wide), fired.values.to(wide)
    of_norms = None
    if norms is not None:
        of_norms = where.sums(g * values) / _above_zero(norms.to(wide))
        of_norms = of_norms.to(norms.dtype)
        g = g * norms.to(wide).index_select(0, where.columns)
    of_x = of_centre = of_W = None
    of_b = where.sums(g).to(W_enc.dtype)
    if ctx.needs_input_grad[0]:
        of_x = weighted_rows(g, where.columns, where.offsets, W_enc.T, x.dtype)
    if ctx.needs_input_grad[1]:
        of_centre = -(W_enc @ of_b)
    if ctx.needs_input_grad[2]:
        of_W = where.summed_rows(g, x, W_enc.dtype).T
    return of_x, of_centre, of_W, of_b, of_norms


def _above_zero(norms: Tensor) -> Tensor:
    """A row of norm 0 has pre-activations of 0, and no gradient of its norm."""
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


def largest_of_rows(pre: Tensor, k: int) -> FiredLatents:
    """The k largest of each row of pre-activations (n, m), 0 where they are below 0."""
    found = None
    if kernels.serve(pre) and kernels.module.selects(pre, k):
        found = kernels.run("largest_of_rows", pre, k)
    if found is not None:
        values, columns = found
    else:
        values, columns = torch.topk(pre, k, dim=-1, sorted=False)
        values = values.relu()
    return FiredLatents.by_row(values, columns, pre.shape[1])


def largest_of_batch(pre: Tensor, k: float) -> FiredLatents:
    """The k·n largest of pre-activations (n, m) above 0; of equal ones the first.

    They are searched among those above an estimate of the smallest of them, which is checked: the
    selection is exact.
    """
    n, m = pre.shape
    wanted = int(k * n)
    flat = pre.flatten()
    sample = flat[::SAMPLE_STRIDE]
    rank = int(len(sample) * k / m * 1.3)
    found = None
    if rank >= 100:
        estimate = sample.topk(rank, sorted=False).values.min().clamp_min(0)
        found = (flat > estimate).nonzero().flatten()
    if found is None or len(found) < wanted:
        found = (flat > 0).nonzero().flatten()
    values = flat[found]
    if len(found) > wanted:
        least = values.topk(max(wanted, 1), sorted=False).values.min()
        above, equal = values > least, values == least
        chosen = above | (equal & (equal.cumsum(0) <= wanted - above.sum()))
        values, found = values[chosen], found[chosen]
    offsets = torch.searchsorted(found, torch.arange(0, n * m + 1, m, device=found.device))
    return FiredLatents(values, Firings(found % m, offsets, m))


def counted(mask: Tensor) -> Callable[[], int]:
    """The number of true entries, for which a GPU is not waited for before it is read."""
    count = mask.count_nonzero().to("cpu", non_blocking=True)
    if not mask.is_cuda:
        return lambda: int(count)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(mask.device))

    def read() -> int:
        done.synchronize()
        return int(count)

    return read


def runs_on(device: torch.device) -> bool:
    """Whether the device has sparse products, and deterministic ones where the user asks for these.

    On CUDA torch's operations, which stand in where a kernel cannot run, add in no fixed order.
    """
    if device.type == "cuda":
        return not torch.are_deterministic_algorithms_enabled()
    return device.type == "cpu"


class SparseStep(TopKTrainingSAE):
    """The sparse step, before a class of SAELens in the method order.

    Outside `training_forward_pass`, with hooks on the latents, without gradients, where more than one
    latent in `LEAST_WIDTH` fires and on devices that `runs_on` excludes, everything is SAELens's.
    """

    sparse_step = True
    """False: everything is SAELens's."""
    none_is_dead = False
    """True: no latent can be dead in this step of the training; their number is not asked for."""
    firings: FiredLatents | None = None
    """Of the step at hand, where it is sparse."""
    _encoded: tuple[Tensor, Tensor | None, Tensor] | None = None  # x, centre and pre-activations
    _norms: Tensor | None = None
    _n_dead: Callable[[], int] | None = None
    over_batch = False
    _stepping = False

    @contextmanager
    def stepping(self, step_input: TrainStepInput) -> Iterator[bool]:
        """Encode and decode sparsely meanwhile, where that is possible; yields whether it is."""
        if self._stepping:
            yield True
            return
        hooks = (self.hook_sae_acts_pre, self.hook_sae_acts_post)
        self._stepping = (
            self.sparse_step
            and not self.cfg.use_sparse_activations
            and self.cfg.d_sae >= LEAST_WIDTH * self.cfg.k
            and torch.is_grad_enabled()
            and step_input.sae_in.ndim == 2
            and runs_on(step_input.sae_in.device)
            and not any(hook.fwd_hooks or hook.bwd_hooks for hook in hooks)
        )
        try:
            if self._stepping and self.none_is_dead:
                self._n_dead = lambda: 0
            elif self._stepping and step_input.dead_neuron_mask is not None:
                self._n_dead = counted(step_input.dead_neuron_mask)  # a GPU is waited for
            yield self._stepping
        finally:
            self._stepping, self.firings, self._encoded = False, None, None
            self._norms = self._n_dead = None

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        with self.stepping(step_input):
            return super().training_forward_pass(step_input)

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self._stepping:
            return super().encode_with_hidden_pre(x)
        sae_in, centre = self.process_sae_in(x), None
        if not x.requires_grad:  # nothing but the bias of the decoder has a gradient by it
            sae_in = sae_in.detach()
            centre = self.b_dec if self.cfg.apply_b_dec_to_input else None
        values, pre, where = SparseEncode.apply(
            sae_in, centre, self.W_enc, self.b_enc, self.norms, self._select
        )
        self.firings, self._encoded = FiredLatents(values, where), (sae_in, centre, pre)
        return self.firings.dense(), pre

    def _select(self, pre: Tensor) -> FiredLatents:
        if self.over_batch:
            return largest_of_batch(pre, self.cfg.k)
        return largest_of_rows(pre, int(self.cfg.k))

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        if self.firings is None:
            return super().decode(feature_acts)
        out = self.hook_sae_recons(self.firings.decoded(self.W_dec, self.norms) + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)

    @override
    def calculate_topk_aux_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:
        """SAELens's scalar loss (Gao et al. 2024, arXiv 2406.04093, appendix A.2), from the latents that it selects."""
        if (
            dead_neuron_mask is None
            or self._n_dead is None
            or self._encoded is None
            or hidden_pre is not self._encoded[-1]
            or self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")  # an error
        ):
            return super().calculate_topk_aux_loss(sae_in, sae_out, hidden_pre, dead_neuron_mask)
        if self._n_dead() == 0:
            return sae_out.new_zeros(())
        dead = dead_neuron_mask.nonzero().flatten()
        half = sae_in.shape[-1] // 2
        recons = self._decoded_of_dead(dead, min(half, len(dead)), *self._encoded)
        residual = (sae_in - sae_out).detach()
        loss = (self.reshape_fn_out(recons, self.d_head) - residual).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(len(dead) / half, 1.0) * loss

    def _decoded_of_dead(
        self, dead: Tensor, k: int, x: Tensor, centre: Tensor | None, pre: Tensor
    ) -> Tensor:
        """(n, d_in) the sum of the rows of the k strongest latents of `dead` for each input."""
        norms, pre = self.norms, pre.detach()
        chosen = pre.index_select(1, dead).topk(k, sorted=False).indices
        if len(dead) >= LEAST_WIDTH * k:
            where = Firings.by_row(dead[chosen], pre.shape[1])
            values = SparsePick.apply(x, centre, self.W_enc, self.b_enc, norms, pre, where)
            return FiredLatents(values, where).decoded(self.W_dec, norms)
        if centre is not None:
            x = x + (centre.detach() - centre)  # 0 with the gradient
        # Scaled by the norms they are selected; here the norms cancel.
        acts = x @ self.W_enc.index_select(1, dead) + self.b_enc.index_select(0, dead)
        kept = torch.zeros_like(acts).scatter_(1, chosen, 1)
        return (acts * kept) @ self.W_dec.index_select(0, dead)

    @property
    def norms(self) -> Tensor | None:
        """(m,) norms of the decoder rows, where pre-activations are multiplied by them; once a step."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return None
        norms = RowNorms.apply(self.W_dec) if self._norms is None else self._norms
        if self._stepping:
            self._norms = norms
        return norms

    def partial_outputs(self, feature_acts: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """Reconstructions (n, d_in) from the first latents, as many as each of the increasing `widths`.

        All of them cost one decoding.
        """
        outputs, total, start, norms = [], self.b_dec, 0, self.norms
        if self.firings is None and norms is not None:
            feature_acts = feature_acts / norms
        for stop in widths:
            if self.firings is None:
                part = feature_acts[:, start:stop] @ self.W_dec[start:stop]
            else:
                part = self.firings.between(start, stop).decoded(self.W_dec, norms)
            total = total + part
            outputs.append(total)
            start = stop
        return outputs


class SparseTopK(SparseStep):
    """`topk` with the sparse step."""


class SparseBatchTopK(SparseStep, BatchTopKTrainingSAE):
    """`batchtopk` with the sparse step."""

    over_batch = True

    @override
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        """SAELens's update, from the firings: their least value above 0 is that of all latents."""
        super().update_topk_threshold(
            acts_topk if self.firings is None else self.firings.values.detach()
        )


class SparseMatryoshka(SparseBatchTopK, MatryoshkaBatchTopKTrainingSAE):
    """`matryoshka_batchtopk` with the sparse step: each level adds the rows of its own latents."""

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        with self.stepping(step_input) as is_sparse:
            if not is_sparse:
                return super().training_forward_pass(step_input)
            # SAELens's own levels are computed from the dense activations, which have no gradient here.
            output = BatchTopKTrainingSAE.training_forward_pass(self, step_input)
            widths = self.cfg.matryoshka_widths[:-1]
            for width, inner in zip(
                widths, self.partial_outputs(output.feature_acts, widths), strict=True
            ):
                inner = self.run_time_activation_norm_fn_out(inner)
                loss = self.mse_loss_fn(inner, step_input.sae_in).sum(dim=-1).mean()
                output.losses[f"inner_mse_loss_{width}"] = loss
                output.loss = output.loss + loss
            return output


FORMS: dict[type[TrainingSAE[Any]], type[SparseStep]] = {
    TopKTrainingSAE: SparseTopK,
    BatchTopKTrainingSAE: SparseBatchTopK,
    MatryoshkaBatchTopKTrainingSAE: SparseMatryoshka,
}
"""Class of SAELens -> the same architecture with the sparse step."""


def with_sparse_step(sae: TrainingSAE[Any], enabled: bool = True) -> TrainingSAE[Any]:
    """The SAE itself, with a sparse step, or without; any other architecture as it is."""
    if enabled and (form := FORMS.get(type(sae))) is not None:
        sae.__class__ = form  # which adds methods alone
    if isinstance(sae, SparseStep):
        sae.sparse_step = enabled
    return sae
