"""A training step of top-k architectures that computes with the firing latents alone.

Of the five matrix products of a step over d_in and d_sae (encoding, decoding, and the gradients of the
encoder, the decoder and the latents) only encoding needs every latent. The others are computed from
the k rows of latents that fire: decoding is a weighted sum of k rows of `W_dec`, and the gradient of
`W_enc` is a product with a sparse matrix. The auxiliary loss of dead latents is computed from those that
it selects, or from the dead latents where these are few. The function is SAELens's; sums are taken in
another order, so that results differ by rounding.

The saved files, the config and the state of a checkpoint are those of the architecture.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor
from typing_extensions import override

LEAST_WIDTH = 8
"""Latents for each one that fires, from which on the sparse step is faster."""
SAMPLE_STRIDE = 101
"""Of the pre-activations of a batch every one at this distance estimates the batch's threshold."""

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


class FiredLatents(NamedTuple):
    """The firing latents of n inputs, by input.

    Args:
        values: (f,) activations.
        columns: (f,) their latents.
        offsets: (n + 1,) where the firings of each input start, and f.
    """

    values: Tensor
    columns: Tensor
    offsets: Tensor

    @classmethod
    def by_row(cls, values: Tensor, columns: Tensor) -> FiredLatents:
        """Those of inputs with k firings each, from (n, k) values and latents."""
        n, k = columns.shape
        offsets = torch.arange(0, n * k + 1, k, device=columns.device)
        return cls(values.flatten(), columns.flatten(), offsets)

    def rows(self) -> Tensor:
        """(f,) the input of each firing."""
        n = len(self.offsets) - 1
        counts = self.offsets.diff()
        return torch.arange(n, device=counts.device).repeat_interleave(
            counts, output_size=len(self.columns)
        )

    def between(self, start: int, stop: int) -> FiredLatents:
        """Those of the latents `start` to `stop`."""
        inside = (self.columns >= start) & (self.columns < stop)
        before = F.pad(inside.cumsum(0), (1, 0))
        return FiredLatents(self.values[inside], self.columns[inside], before[self.offsets])

    def dense(self, width: int) -> Tensor:
        """(n, width) activations of all latents, without a gradient."""
        acts = self.values.new_zeros(len(self.offsets) - 1, width)
        acts[self.rows(), self.columns] = self.values.detach()
        return acts

    def decoded(self, W_dec: Tensor, norms: Tensor | None = None) -> Tensor:
        """(n, d_in) the sum of the rows of `W_dec` (m, d_in), weighted by value, and over `norms` (m,)."""
        values = self.values
        if norms is not None:
            values = values / norms.index_select(0, self.columns)
        return F.embedding_bag(
            self.columns,
            W_dec,
            self.offsets,
            mode="sum",
            per_sample_weights=values.to(W_dec.dtype),
            include_last_offset=True,
        )


class SparseEncode(torch.autograd.Function):
    """Pre-activations, and the latents that fire; the gradient of the encoder from those alone.

    `apply(x, W_enc, b_enc, norms, k, over_batch)`: x (n, d_in), W_enc (d_in, m), b_enc (m,), norms (m,) that
    multiply the pre-activations, or None; k firings an input, or on average over the batch. Returns
    values, columns and offsets of `FiredLatents`, and the pre-activations (n, m).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        norms: Tensor | None,
        k: float,
        over_batch: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pre = x @ W_enc + b_enc
        if norms is not None:
            pre = pre * norms
        fired = largest_of_batch(pre, k) if over_batch else largest_of_rows(pre, int(k))
        ctx.save_for_backward(x, W_enc, norms, pre, *fired)
        ctx.mark_non_differentiable(fired.columns, fired.offsets)
        ctx.set_materialize_grads(False)
        return fired.values, fired.columns, fired.offsets, pre

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_values, _, _, of_pre = gradients
        x, W_enc, norms, pre, *rest = ctx.saved_tensors
        fired = FiredLatents(*rest)
        g = None if of_values is None else of_values * (fired.values > 0)
        if of_pre is not None:
            if g is not None:
                of_pre = of_pre.index_put((fired.rows(), fired.columns), g, accumulate=True)
            return _dense_gradients(ctx, of_pre, x, W_enc, norms, pre)
        if g is None:
            return (None,) * 6
        return _sparse_gradients(ctx, g, x, W_enc, norms, fired)


class SparsePick(torch.autograd.Function):
    """Pre-activations at given latents of each input; the gradient of the encoder from those alone.

    `apply(x, W_enc, b_enc, norms, pre, columns)`: the first four as for `SparseEncode`, pre (n, m) its
    pre-activations, columns (n, k) latents. Returns the values (n, k).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        norms: Tensor | None,
        pre: Tensor,
        columns: Tensor,
    ) -> Tensor:
        values = pre.gather(1, columns)
        ctx.save_for_backward(x, W_enc, norms, *FiredLatents.by_row(values, columns))
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, norms, *fired = ctx.saved_tensors
        return _sparse_gradients(ctx, gradients[0].flatten(), x, W_enc, norms, FiredLatents(*fired))


def _dense_gradients(
    ctx: Any, g: Tensor, x: Tensor, W_enc: Tensor, norms: Tensor | None, pre: Tensor
) -> tuple[Tensor | None, ...]:
    of_norms = None
    if norms is not None:
        of_norms = (g * pre).sum(0) / _above_zero(norms)
        g = g * norms
    g = g.to(W_enc.dtype)
    of_x = g @ W_enc.T if ctx.needs_input_grad[0] else None
    of_W = x.to(W_enc.dtype).T @ g if ctx.needs_input_grad[1] else None
    return of_x, of_W, g.sum(0), of_norms, None, None


def _sparse_gradients(
    ctx: Any, g: Tensor, x: Tensor, W_enc: Tensor, norms: Tensor | None, fired: FiredLatents
) -> tuple[Tensor | None, ...]:
    m, columns = W_enc.shape[1], fired.columns
    g, values = g.float(), fired.values.float()  # sparse products have no bfloat16
    of_norms = None
    if norms is not None:
        of_norms = _summed(g * values, columns, m) / _above_zero(norms.float())
        of_norms = of_norms.to(norms.dtype)
        g = g * norms.float().index_select(0, columns)
    of_x = of_W = None
    if ctx.needs_input_grad[0]:
        by_input = torch.sparse_csr_tensor(
            fired.offsets, columns, g, (len(x), m), check_invariants=False
        )
        of_x = (by_input @ W_enc.float().T).to(x.dtype)
    if ctx.needs_input_grad[1]:
        order = columns.argsort(stable=True)
        ends = torch.bincount(columns, minlength=m).cumsum(0)
        by_latent = torch.sparse_csr_tensor(
            F.pad(ends, (1, 0)),
            fired.rows()[order],
            g[order],
            (m, len(x)),
            check_invariants=False,
        )
        of_W = (by_latent @ x.float()).T.to(W_enc.dtype)
    return of_x, of_W, _summed(g, columns, m).to(W_enc.dtype), of_norms, None, None


def _summed(values: Tensor, columns: Tensor, m: int) -> Tensor:
    return values.new_zeros(m).index_add_(0, columns, values)


def _above_zero(norms: Tensor) -> Tensor:
    """A row of norm 0 has pre-activations of 0, and no gradient of its norm."""
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


def largest_of_rows(pre: Tensor, k: int) -> FiredLatents:
    """The k largest of each row of pre-activations (n, m), 0 where they are below 0."""
    values, columns = torch.topk(pre, k, dim=-1, sorted=False)
    return FiredLatents.by_row(values.relu(), columns)


def largest_of_batch(pre: Tensor, k: float) -> FiredLatents:
    """The k·n largest of pre-activations (n, m) above 0.

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
        estimate = sample.kthvalue(len(sample) - rank + 1).values.clamp_min(0)
        found = (flat > estimate).nonzero().flatten()
    if found is None or len(found) < wanted:
        found = (flat > 0).nonzero().flatten()
    values = flat[found]
    if len(found) > wanted:
        values, chosen = values.topk(wanted, sorted=False)
        found = found[chosen]
    found, order = found.sort()
    counts = torch.bincount(found // m, minlength=n)
    return FiredLatents(values[order], found % m, F.pad(counts.cumsum(0), (1, 0)))


def runs_on(device: torch.device) -> bool:
    """Whether the device has sparse products, and deterministic ones where the user asks for these.

    On CUDA some operations of the step are not deterministic (`kthvalue` is an error under
    `torch.use_deterministic_algorithms`).
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
    firings: FiredLatents | None = None
    """Of the step at hand, where it is sparse."""
    _encoded: tuple[Tensor, Tensor] | None = None  # its inputs of the encoder and pre-activations
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
            yield self._stepping
        finally:
            self._stepping, self.firings, self._encoded = False, None, None

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        with self.stepping(step_input):
            return super().training_forward_pass(step_input)

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self._stepping:
            return super().encode_with_hidden_pre(x)
        sae_in = self.process_sae_in(x)
        *fired, pre = SparseEncode.apply(
            sae_in, self.W_enc, self.b_enc, self.norms, self.cfg.k, self.over_batch
        )
        self.firings, self._encoded = FiredLatents(*fired), (sae_in, pre)
        return self.firings.dense(self.cfg.d_sae), pre

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
        dead = None if dead_neuron_mask is None else dead_neuron_mask.nonzero().flatten()
        if (
            dead is None
            or len(dead) == 0
            or self._encoded is None
            or hidden_pre is not self._encoded[1]
            or self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")  # an error
        ):
            return super().calculate_topk_aux_loss(sae_in, sae_out, hidden_pre, dead_neuron_mask)
        half = sae_in.shape[-1] // 2
        recons = self._decoded_of_dead(dead, min(half, len(dead)), *self._encoded)
        residual = (sae_in - sae_out).detach()
        loss = (self.reshape_fn_out(recons, self.d_head) - residual).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(len(dead) / half, 1.0) * loss

    def _decoded_of_dead(self, dead: Tensor, k: int, x: Tensor, pre: Tensor) -> Tensor:
        """(n, d_in) the sum of the rows of the k strongest latents of `dead` for each input."""
        norms, pre = self.norms, pre.detach()
        chosen = pre.index_select(1, dead).topk(k, sorted=False).indices
        if len(dead) >= LEAST_WIDTH * k:
            columns = dead[chosen]
            values = SparsePick.apply(x, self.W_enc, self.b_enc, norms, pre, columns)
            return FiredLatents.by_row(values, columns).decoded(self.W_dec, norms)
        # Scaled by the norms they are selected; here the norms cancel.
        acts = x @ self.W_enc.index_select(1, dead) + self.b_enc.index_select(0, dead)
        kept = torch.zeros_like(acts).scatter_(1, chosen, 1)
        return (acts * kept) @ self.W_dec.index_select(0, dead)

    @property
    def norms(self) -> Tensor | None:
        """(m,) norms of the decoder rows, where pre-activations are multiplied by them."""
        return self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None

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
