"""`archetypal_topk` and `archetypal_jumprelu`: dictionaries spanned by points of the data.

Source: "Archetypal SAE: Adaptive and Stable Dictionary Learning for Concept Extraction in Large
Vision Models" (Fel et al. 2025, arXiv 2502.12892), section 4, RA-SAE:

    D = (W A + Lambda) e^mu,   rows of W on the simplex,   ||Lambda_i|| <= delta,

with A (n_candidates, d_in) candidate points among the data and mu a scalar. W and Lambda are kept
in their sets by projection after each step (W as in the authors' code: negative entries to 0, rows
divided by their sum); the gradient ignores the projection.

Deviations: A comes from the activation stream itself. It starts as rows of the first batch (and of
the next ones, where it has more candidates than a batch has rows) and is refined by mini-batch
k-means over the first `candidate_steps` training steps, then frozen; the paper runs k-means
beforehand over a fixed set. W starts as one candidate per latent, the encoder as
the projection onto it. `delta` is in the units of the activations; where the SAE normalises each input
(`layer_norm`, `constant_norm_rescale`), candidates and `delta` are those of the normalised ones.

Memory: W has d_sae * n_candidates parameters.

Saved as `topk` or `jumprelu`, with D as the decoder.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import (
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
)
from sae_lens.saes.sae import SAE, SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor, nn
from typing_extensions import override

from ..errors import ConfigError
from ..table import Architecture
from .parts.exact_buffers import ExactBuffers
from .parts.kmeans import seed_centroids, update_centroids
from .parts.plugin_config import check_k
from .parts.precision import at_least_float32
from .parts.step_clock import StepClock
from .parts.straight_through import straight_through


@dataclass
class ArchetypalSettings:
    """Settings of both archetypal architectures.

    Args:
        n_candidates: number of candidate points; by default as many as latents.
        delta: largest distance of an atom from the hull of the candidates, before scaling by e^mu, in the units
            of the activations after their normalisation.
        candidate_steps: training steps over which k-means refines the candidates; 0: they stay rows of the first batch.
        seed: seed of the candidates.
    """

    n_candidates: int | None = None
    delta: float = 1.0
    candidate_steps: int = 100
    seed: int = 0


def _check(cfg: Any) -> None:
    if cfg.n_candidates is not None and cfg.n_candidates < 1:
        raise ConfigError(
            "n_candidates", "out of range", given=cfg.n_candidates, allowed="at least 1"
        )
    if not 0 <= cfg.delta < math.inf:  # infinity would be taken for a training that has diverged
        allowed = "0 or more, and finite"
        raise ConfigError("delta", "out of range", given=cfg.delta, allowed=allowed)
    if cfg.decoder_init_norm is not None:
        raise ConfigError(
            "decoder_init_norm",
            "not possible",
            given=cfg.decoder_init_norm,
            allowed=f"None for {cfg.architecture()}, whose atoms start as points of the data",
        )


@dataclass
class ArchetypalTopKTrainingSAEConfig(ArchetypalSettings, TopKTrainingSAEConfig):
    """Settings of `archetypal_topk`: those of `topk`, and n_candidates, delta, candidate_steps."""

    decoder_init_norm: float | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return "archetypal_topk"

    @override
    def __post_init__(self) -> None:
        _check(self)
        check_k(self)
        super().__post_init__()

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


@dataclass
class ArchetypalJumpReLUTrainingSAEConfig(ArchetypalSettings, JumpReLUTrainingSAEConfig):
    """Settings of `archetypal_jumprelu`: `jumprelu`'s, and n_candidates, delta, candidate_steps."""

    decoder_init_norm: float | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return "archetypal_jumprelu"

    @override
    def __post_init__(self) -> None:
        _check(self)
        super().__post_init__()

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig


class ArchetypalDictionary(ExactBuffers, SAE[Any]):
    """Mixin: `W_dec` is computed from candidates and is not a parameter."""

    exact = ("candidate_counts",)
    mixture: nn.Parameter  # W, (d_sae, n_candidates)
    relaxation: nn.Parameter  # Lambda, (d_sae, d_in)
    log_scale: nn.Parameter  # mu
    candidates: Tensor  # A, (n_candidates, d_in)
    candidate_counts: Tensor
    row_scale: Tensor  # 1 until decoder norms are folded into the encoder
    delta: Tensor
    _held: Tensor | None = None

    @property
    def W_dec(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(d_sae, d_in) decoder."""
        return self.dictionary() if self._held is None else self._held

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Candidates without refinement that were saved as such, before their counts were bytes: given ones.
        saved = state_dict.get(prefix + "candidate_counts")
        steps = getattr(self.cfg, "candidate_steps", None)
        if steps == 0 and saved is not None and saved.shape == self.candidate_counts.shape:
            state_dict[prefix + "candidate_counts"] = torch.ones_like(saved)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # As in SAELens's matching pursuit for W_enc: the base class assigns W_dec.
    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name != "W_dec":
            super().__setattr__(name, value)

    @override
    def initialize_weights(self) -> None:
        cfg, options = self.cfg, {"dtype": self.dtype, "device": self.device}
        c = cfg.n_candidates or cfg.d_sae
        one_each = torch.zeros(cfg.d_sae, c, **options)
        rows = torch.arange(cfg.d_sae, device=self.device)
        one_each[rows, rows % c] = 1.0
        self.mixture = nn.Parameter(one_each)
        self.relaxation = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in, **options))
        self.log_scale = nn.Parameter(torch.zeros((), **options))
        self.register_buffer("candidates", torch.randn(c, cfg.d_in, **options))
        counts = torch.zeros(c, dtype=at_least_float32(self.dtype), device=self.device)
        self.register_buffer("candidate_counts", counts)
        self.register_buffer("row_scale", torch.ones(cfg.d_sae, **options))
        self.register_buffer("delta", torch.tensor(cfg.delta, **options))
        self.clock = StepClock(cfg.seed, self.device)
        super().initialize_weights()

    def dictionary(self) -> Tensor:
        """D (d_sae, d_in)."""
        mixture = _through(self.mixture, _on_simplex)
        relaxation = _through(self.relaxation, self._in_ball)
        atoms = (mixture @ self.candidates + relaxation) * self.log_scale.exp()
        return atoms * self.row_scale[:, None]

    def _in_ball(self, relaxation: Tensor) -> Tensor:
        norms = relaxation.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return relaxation * (self.delta / norms).clamp(max=1.0)

    @torch.no_grad()
    def project(self) -> None:
        """Project W to the simplex and Lambda to its balls."""
        self.mixture.copy_(_on_simplex(self.mixture))
        self.relaxation.copy_(self._in_ball(self.relaxation))

    @torch.no_grad()
    def learn_candidates(self, x: Tensor, step: int) -> None:
        """Initialise candidates with the first batches, and refine them with later ones.

        Args:
            x: inputs (n, d_in), as the SAE gets them.
            step: of the training.
        """
        if step >= max(self.cfg.candidate_steps, 1):
            return
        # What is decoded is scaled back where the SAE normalises each input.
        x = self.run_time_activation_norm_fn_in(x.to(self.candidates.dtype))
        x = x[x.any(dim=1)]  # a zero input could not be normalised as an atom
        if not len(x):
            return
        # Before the first step these are all; later those beyond the rows so far, which
        # repeat others and so have never been the nearest to a point.
        idle = self.candidate_counts == 0
        if bool(idle.any()):
            generator = self.clock.generator(step, self.device)
            self.candidates[idle] = seed_centroids(x, int(idle.sum()), generator)
        if step < self.cfg.candidate_steps:
            update_centroids(self.candidates, self.candidate_counts, x)
        if bool(idle.any()):
            self._aim_encoder(idle[torch.arange(self.cfg.d_sae, device=self.device) % len(idle)])

    def _aim_encoder(self, latents: Tensor) -> None:
        """The encoder of `latents` (d_sae,) bool becomes the projection onto their atoms."""
        atoms = self.dictionary()[latents]
        self.W_enc.data[:, latents] = (
            atoms / atoms.square().sum(1, keepdim=True).clamp_min(1e-12)
        ).T

    @torch.no_grad()
    def set_candidates(self, points: Tensor) -> None:
        """Use these points (n_candidates, d_in), without refinement; the encoder becomes the projection onto the atoms.

        Where the SAE normalises each input, they are points among the normalised ones.

        Raises:
            ConfigError: the points have another shape.
        """
        if points.shape != self.candidates.shape:
            raise ConfigError(
                "points",
                "not possible",
                given=tuple(points.shape),
                allowed=f"shape {tuple(self.candidates.shape)} (n_candidates, d_in)",
            )
        self.candidates.copy_(points)
        self.candidate_counts.fill_(1)  # none is free for a row of the first batch
        self.cfg.candidate_steps = 0
        self._aim_encoder(torch.ones(self.cfg.d_sae, dtype=torch.bool, device=self.device))

    @contextmanager
    def one_dictionary(self):
        """Context in which D is computed once for all uses of `W_dec`."""
        self._held = self.dictionary()
        try:
            yield
        finally:
            self._held = None

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self.learn_candidates(step_input.sae_in, self.clock.tick())
        self.project()
        with self.one_dictionary():
            return super().training_forward_pass(step_input)  # type: ignore[misc]

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        self.W_enc.data *= scaling_factor
        for part in (self.candidates, self.relaxation.data, self.delta, self.b_dec.data):
            part /= scaling_factor
        self.cfg.normalize_activations = "none"

    @override
    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Tensor:
        norms = super().fold_and_get_W_dec_norm()
        self.row_scale /= norms
        return norms

    @override
    @torch.no_grad()
    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        relaxation = self._in_ball(self.relaxation)
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        dtype = torch.promote_types(self.candidates.dtype, unwhitening_matrix.dtype)
        back = unwhitening_matrix.to(self.device, dtype)
        self.candidates.copy_(self.candidates.to(dtype) @ back)
        self.relaxation.copy_(relaxation.to(dtype) @ back)
        # A ball in whitened space is not a ball in raw space: without a bound, by a finite number,
        # since weights that are not finite are those of a training that has diverged.
        self.delta.fill_(torch.finfo(self.delta.dtype).max)

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        state_dict["W_dec"] = self.dictionary().detach()
        for name in _OWN_STATE:
            del state_dict[name]
        super().process_state_dict_for_saving_inference(state_dict)  # type: ignore[misc]


_OWN_STATE = (
    "mixture",
    "relaxation",
    "log_scale",
    "candidates",
    "candidate_counts",
    "row_scale",
    "delta",
    "clock.count",
)


def _on_simplex(rows: Tensor) -> Tensor:
    """Negative entries to 0, then each row divided by its sum; uniform if all are 0."""
    rows = rows.relu()
    total = rows.sum(dim=1, keepdim=True)
    return torch.where(total > 0, rows / total.clamp_min(1e-12), 1.0 / rows.shape[1])


def _through(parameter: Tensor, project: Any) -> Tensor:
    """The projected value with the gradient of the parameter itself (projected gradient)."""
    return straight_through(project(parameter), parameter)


class ArchetypalTopKTrainingSAE(ArchetypalDictionary, TopKTrainingSAE):
    """Trains `archetypal_topk`."""

    cfg: ArchetypalTopKTrainingSAEConfig  # type: ignore[assignment]


class ArchetypalJumpReLUTrainingSAE(ArchetypalDictionary, JumpReLUTrainingSAE):
    """Trains `archetypal_jumprelu`."""

    cfg: ArchetypalJumpReLUTrainingSAEConfig  # type: ignore[assignment]


_SOURCE = "Fel et al. 2025, arXiv 2502.12892"

ARCHETYPAL_TOPK = Architecture(
    name="archetypal_topk",
    training_class=ArchetypalTopKTrainingSAE,
    training_config_class=ArchetypalTopKTrainingSAEConfig,
    description="RA-SAE: atoms are near-convex mixtures of data points, TopK.",
    source=_SOURCE,
)
ARCHETYPAL_JUMPRELU = Architecture(
    name="archetypal_jumprelu",
    training_class=ArchetypalJumpReLUTrainingSAE,
    training_config_class=ArchetypalJumpReLUTrainingSAEConfig,
    description="RA-SAE: atoms are near-convex mixtures of data points, JumpReLU.",
    source=_SOURCE,
)
