"""What must not change a number: the order of latents and of images, the unit of x, latents that never fire, and
the form of an SAE."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import taxolens
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.evaluators.parts.sae_latents import SAELatents
from torch import Tensor

SAMPLED = {
    ("latents", "hyperbolicity"): ("decoder_delta", "decoder_gaussian_delta"),  # base points
    ("latents", "feature_geometry"): ("random_cosine",),  # pairs of latents
    ("latents", "detection"): ("steering", "group_steering"),  # latents that are steered by
    ("latents", "meta_sae"): ("explained_variance", "common_depth"),  # batches of rows
    ("latents", "latent_graph"): ("chance_",),  # permuted activations
    ("images", "hyperbolicity"): ("images_delta", "images_gaussian_delta"),  # base points
    ("images", "infomec"): ("infoe",),  # images that stop the fit
    ("images", "feature_geometry"): ("coactive_babel",),  # images that it is measured on
}
"""Prefixes of metrics that rest on a random sample, which is another one."""
BY_DEFINITION = {
    ("unit", "reconstruction"): ("mse",),  # has the unit of x, squared
    ("dead", "quasi_orthogonality"): ("epsilon_lbo",),  # divides by the number of latents
    ("dead", "reconstruction"): ("dead_share", "almost_dead_share", "dense_share"),
}
OPTIONS = {"meta_sae": {"steps": 60}}
ALMOST = ("epsilon_lbo_l0",)
"""Metrics that begin like one of these and do not change."""


@dataclass(frozen=True)
class World:
    """What an evaluator is given: an evaluation set, a decoder and what encodes, a model."""

    batch: Any
    W_dec: Tensor  # (m, d)
    W_enc: Tensor  # (d, m)
    living: Tensor  # (m,) 0 for latents that never fire
    images: Tensor  # (n, 1, d) in the order of the evaluation set
    unit: float = 1.0

    def facts(self) -> dict[str, Any]:
        """Of the context, beside the decoder's rows."""
        return {"b_dec": torch.zeros(self.W_dec.shape[1]), "reconstruct": self.reconstruct}

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x @ self.W_enc - 0.5 * self.unit).relu() * self.living
        return z, z @ self.W_dec


@pytest.fixture(scope="module")
def world(animals, one_batch) -> World:
    """Detectors of every node with activations of their own size, and latents that fire at random."""
    generator, numbers = torch.Generator().manual_seed(0), np.random.default_rng(0)
    labels = numbers.permutation(np.repeat(np.arange(12), 40))
    index = torch.arange(len(labels))
    planted = PlantedLatents(animals, recall=0.8, false_alarm=0.02)
    fires = planted.encode(labels=torch.from_numpy(labels), index=index) > 0
    fires = torch.cat([fires, torch.rand(len(labels), 30, generator=generator) < 0.3], 1)
    size = torch.from_numpy(numbers.gamma(2.0, 0.5, fires.shape)).float() + 0.05
    z = torch.where(fires, size, 0.0)
    W_dec = torch.randn(z.shape[1], 24, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    x = z @ W_dec + 0.3 * torch.randn(len(z), 24, generator=generator)
    batch = one_batch(z, labels, x=x, mean_patch=x.flip(1))
    return World(batch, W_dec, W_dec.T.clone(), torch.ones(z.shape[1]), x[:, None])


def other_order_of_latents(world: World) -> World:
    order = torch.randperm(len(world.W_dec), generator=torch.Generator().manual_seed(1))
    z = world.batch.z[:, order]
    return replace(
        world,
        batch=replace(world.batch, z=z),
        W_dec=world.W_dec[order],
        W_enc=world.W_enc[:, order],
    )


def other_order_of_images(world: World) -> World:
    """Within each half, since the fit half comes first."""
    generator = torch.Generator().manual_seed(2)
    halves = [torch.where(world.batch.is_fit == of)[0] for of in (True, False)]
    order = torch.cat([half[torch.randperm(len(half), generator=generator)] for half in halves])
    fields = {k: v[order] for k, v in vars(world.batch).items() if isinstance(v, Tensor)}
    return replace(world, batch=replace(world.batch, **fields))


def other_unit(world: World) -> World:
    batch = world.batch
    scaled = {name: 4 * getattr(batch, name) for name in ("x", "z", "mean_patch")}
    return replace(world, batch=replace(batch, **scaled), images=4 * world.images, unit=4.0)


def with_dead_latents(world: World) -> World:
    rows = torch.randn(30, 24, generator=torch.Generator().manual_seed(3))
    z = torch.cat([world.batch.z, torch.zeros(len(world.batch), 30)], 1)
    return replace(
        world,
        batch=replace(world.batch, z=z),
        W_dec=torch.cat([world.W_dec, rows]),
        W_enc=torch.cat([world.W_enc, rows.T], 1),
        living=torch.cat([world.living, torch.zeros(30)]),
    )


CHANGES = {
    "latents": other_order_of_latents,
    "images": other_order_of_images,
    "unit": other_unit,
    "dead": with_dead_latents,
}


@pytest.fixture
def numbers_of(animals, measured, toy_model) -> Any:
    generator = torch.Generator().manual_seed(4)
    to_embedding = torch.randn(24, 6, generator=generator)
    to_logits = torch.randn(6, 12, generator=generator)

    def compute(world: World, name: str) -> dict[str, float]:
        model = toy_model(world.images, to_embedding / world.unit, to_logits, np.arange(12))
        (evaluator,) = measured(
            animals,
            world.batch,
            [taxolens.EVALUATORS[name]],
            options=OPTIONS.get(name),
            W_dec=world.W_dec,
            intervene=model,
            **world.facts(),
        )
        return evaluator.compute()

    return compute


def differing(one: dict[str, float], other: dict[str, float]) -> dict[str, tuple[float, float]]:
    """The metrics that differ."""
    return {
        metric: (value, other[metric])
        for metric, value in one.items()
        if not math.isclose(value, other[metric], rel_tol=1e-3, abs_tol=1e-4)
        and not (math.isnan(value) and math.isnan(other[metric]))
    }


@pytest.mark.parametrize("name", sorted(taxolens.EVALUATORS))
def test_what_must_not_change_a_number(world: World, numbers_of: Any, name: str) -> None:
    numbers = numbers_of(world, name)
    assert any(math.isfinite(value) for value in numbers.values())
    for change, changed in CHANGES.items():
        free = SAMPLED.get((change, name), ()) + BY_DEFINITION.get((change, name), ())
        again = numbers_of(changed(world), name)
        moved = [
            metric
            for metric in differing(numbers, again)
            if metric in ALMOST or not metric.startswith(free)
        ]
        assert not moved, change


@pytest.mark.parametrize(("change", "name"), [*SAMPLED, *BY_DEFINITION])
def test_the_exceptions_are_needed(world: World, numbers_of: Any, change: str, name: str) -> None:
    numbers, again = (numbers_of(of, name) for of in (world, CHANGES[change](world)))
    for prefix in {**SAMPLED, **BY_DEFINITION}[change, name]:
        moved = [m for m in numbers if m.startswith(prefix) and numbers[m] != again[m]]
        assert moved, prefix


# SAEs of one function in other forms ----------------------------------------------------------------


@dataclass(frozen=True)
class OfSAE(World):
    """A world whose latents are those of an SAE, with what evaluators are given of it."""

    latents: Any = None

    @classmethod
    def of(cls, world: World, sae: Any, unit: float = 1.0) -> OfSAE:
        latents, x = SAELatents(sae), world.batch.x * unit
        z, rows = latents.encode(x), latents.W_dec
        assert rows is not None
        batch = replace(world.batch, x=x, z=z, mean_patch=world.batch.mean_patch * unit)
        living = torch.ones(z.shape[1])
        return cls(batch, rows, rows.T, living, world.images * unit, unit, latents)

    def facts(self) -> dict[str, Any]:
        return {
            "b_dec": self.latents.b_dec,
            "as_decoded": self.latents.as_decoded,
            "reconstruct": self.latents.reconstruct,
        }


def topk(world: World) -> TopKTrainingSAE:
    """With rows of different lengths, by which it divides."""
    d, m = world.batch.x.shape[1], 48
    cfg = TopKTrainingSAEConfig(d_in=d, d_sae=m, k=6, rescale_acts_by_decoder_norm=True)
    sae = TopKTrainingSAE(cfg)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        rows = torch.randn(m, d, generator=generator)
        sae.W_dec.copy_(rows * torch.linspace(0.3, 3, m)[:, None])
        sae.W_enc.copy_(rows.T)
        sae.b_dec.copy_(world.batch.x.mean(0))
    return sae.eval().requires_grad_(False)


@pytest.mark.parametrize("name", sorted(set(taxolens.EVALUATORS) - {"meta_sae"}))
def test_folded_decoder_norms_change_no_number(world: World, numbers_of: Any, name: str) -> None:
    sae = topk(world)
    folded = copy.deepcopy(sae)
    folded.fold_W_dec_norm()
    assert not torch.allclose(sae.W_dec, folded.W_dec)
    one, other = (numbers_of(OfSAE.of(world, form), name) for form in (sae, folded))
    assert any(math.isfinite(value) for value in one.values())
    assert not differing(one, other)


@pytest.mark.parametrize(
    "name", ["absorption", "quasi_orthogonality", "supervised_dictionary", "reconstruction"]
)
@pytest.mark.parametrize("normalise", ["layer_norm", "constant_norm_rescale"])
def test_an_sae_that_normalises_equal_inputs_is_one_that_does_not(
    world: World, numbers_of: Any, name: str, normalise: str
) -> None:
    """Inputs of one mean and length are 3 times what the SAE makes of them."""
    x = world.batch.x - world.batch.x.mean(1, keepdim=True)
    d = x.shape[1]
    x = x / x.norm(dim=1, keepdim=True) * (d - (normalise == "layer_norm")) ** 0.5
    images = torch.zeros_like(world.images)
    images[world.batch.index, 0] = x
    world = replace(world, batch=replace(world.batch, x=x, mean_patch=x.flip(1)), images=images)
    plain, normalising = topk(world), topk(world)
    normalising.cfg.normalize_activations = normalise
    again = type(normalising)(normalising.cfg).eval().requires_grad_(False)
    again.load_state_dict(plain.state_dict())
    assert SAELatents(again).encode(3 * x).sub(SAELatents(plain).encode(x)).abs().max() < 1e-3
    one, other = (
        numbers_of(OfSAE.of(world, sae, unit), name) for sae, unit in ((plain, 1.0), (again, 3.0))
    )
    assert not {k: v for k, v in differing(one, other).items() if k != "mse"}
