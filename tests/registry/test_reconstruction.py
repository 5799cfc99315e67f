"""Reconstruction against SAELens's own formulae, and splicing into a model of two matrices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.evals import ExplainedVarianceCalculator
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.reconstruction import Reconstruction, _recovered

D, K, M = 6, 3, 10
LABELS = np.repeat(np.arange(12), 8)
GENERATOR = torch.Generator().manual_seed(0)
X = 4 + torch.randn(len(LABELS), K, D, generator=GENERATOR)
ENCODER = torch.randn(D, M, generator=GENERATOR)
ENCODER[:, 0] = 0  # a dead latent
DECODER = 0.3 * torch.randn(M, D, generator=GENERATOR)


def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = ((x - 4) @ ENCODER).relu()
    return z, 4 + z @ DECODER


@pytest.fixture
def pass_over(animals, one_batch, measured) -> Any:
    """The evaluator after it has seen X, three tokens an image."""

    def run(tokens: torch.Tensor = X, size: int | None = None, **facts: Any) -> Reconstruction:
        z = reconstruct(tokens)[0].amax(1)
        batch = one_batch(z, LABELS, x=tokens.mean(1))
        batch = replace(batch, tokens=tokens[batch.index])
        options = facts.pop("options", None)
        facts = {"reconstruct": reconstruct, **facts}
        return measured(animals, batch, [Reconstruction], size=size, options=options, **facts)[0]

    return run


@pytest.fixture
def model(toy_model) -> Any:
    to_embedding = torch.randn(D, 5, generator=torch.Generator().manual_seed(1))
    to_logits = torch.randn(5, 14, generator=torch.Generator().manual_seed(2))
    classes = np.append(np.random.default_rng(0).permutation(12), [-1, 3])
    return toy_model(X, to_embedding, to_logits, classes)


@pytest.mark.parametrize("size", [None, 7])
def test_the_numbers_are_saelenss(pass_over, size: int | None) -> None:
    found = pass_over(size=size).compute()
    x = X.flatten(0, 1)
    z, decoded = reconstruct(x)
    saelens = ExplainedVarianceCalculator()
    saelens.add_batch(decoded, x)
    assert found["explained_variance"] == pytest.approx(saelens.compute(), rel=1e-4)
    assert found["fvu"] == pytest.approx(1 - found["explained_variance"])
    expected = {
        "mse": (x - decoded).pow(2).sum(1).mean(),
        "cossim": torch.cosine_similarity(x, decoded).mean(),
        "l2_ratio": (decoded.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": decoded.pow(2).sum(1).mean() / (x * decoded).sum(1).mean(),
        "l0": (z > 0).sum(1).float().mean(),
        "l0_image": (z.view(-1, K, M) > 0).any(1).sum(1).float().mean(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-5), name


def test_shares_of_latents(pass_over) -> None:
    evaluator = pass_over(options={"dense": 0.5, "almost_dead": 0.2})
    density = (reconstruct(X.flatten(0, 1))[0] > 0).float().mean(0).numpy()
    found = evaluator.compute()
    assert found["dead_share"] == pytest.approx(0.1)
    assert found["almost_dead_share"] == pytest.approx((density < 0.2).mean())
    assert found["dense_share"] == pytest.approx((density > 0.5).mean())
    assert 0 < found["dense_share"] < 1
    table = evaluator.tables()["latents"]
    assert np.allclose(table["token_density"], density)
    assert (table["image_density"] >= table["token_density"]).all()


def test_a_perfect_dictionary(pass_over, model) -> None:
    found = pass_over(reconstruct=lambda x: (reconstruct(x)[0], x), intervene=model).compute()
    assert found["explained_variance"] == 1 and found["fvu"] == found["mse"] == 0
    assert found["cossim"] == pytest.approx(1) and found["l2_ratio"] == pytest.approx(1)
    for name in ("ce_loss_score", "kl_div_score", "embedding_score", "ce_loss_score_mean"):
        assert found[name] == pytest.approx(1), name
    assert found["embedding_change"] == pytest.approx(0)
    assert found["accuracy_with_sae"] == found["accuracy_without_sae"]


def test_the_mean_is_worth_nothing(pass_over, model) -> None:
    """What always gives the mean of the fit half explains nothing and recovers nothing of it."""
    batch_mean = X[[i for i in range(len(X)) if i % 2 == 0]].mean((0, 1))
    found = pass_over(
        reconstruct=lambda x: (reconstruct(x)[0], batch_mean.expand_as(x)), intervene=model
    ).compute()
    assert abs(found["explained_variance"]) < 0.05
    assert found["ce_loss_score_mean"] == pytest.approx(0, abs=1e-5)
    assert found["embedding_score_mean"] == pytest.approx(0, abs=1e-5)


def test_splicing_by_hand(pass_over, model) -> None:
    evaluator = pass_over(intervene=model)
    found = evaluator.compute()
    index = evaluator._images.index(fit=False)
    assert sorted(index) == list(range(1, len(X), 2)) and found["images"] == len(index)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = x.mean(1) @ model.to_embedding
        return embedding.double(), (embedding @ model.to_logits).double()

    def loss(logits: torch.Tensor) -> float:
        p = logits.softmax(1)
        own = [p[i, model.logit_classes == LABELS[at]].sum() for i, at in enumerate(index)]
        return float(-torch.stack(own).log().mean())

    fit = [i for i in range(len(X)) if i not in set(index)]
    x = X[index]
    inputs = {
        "without_sae": x,
        "with_sae": reconstruct(x)[1],
        "with_ablation": torch.zeros_like(x),
        "with_mean_ablation": X[fit].mean((0, 1)).expand_as(x),
    }
    outputs = {name: run(given) for name, given in inputs.items()}
    for name, (embedding, logits) in outputs.items():
        assert found[f"ce_loss_{name}"] == pytest.approx(loss(logits), rel=1e-5)
        said = model.logit_classes[logits.argmax(1).numpy()]
        assert found[f"accuracy_{name}"] == pytest.approx((said == LABELS[index]).mean())
        if name != "without_sae":
            cossim = torch.cosine_similarity(embedding, outputs["without_sae"][0]).mean()
            assert found[f"embedding_cossim_{name}"] == pytest.approx(float(cossim), abs=1e-5)
    clean, spliced, zero, mean = (loss(logits) for _, logits in outputs.values())
    assert found["ce_loss_score"] == pytest.approx((zero - spliced) / (zero - clean), rel=1e-4)
    assert found["ce_loss_score_mean"] == pytest.approx((mean - spliced) / (mean - clean), rel=1e-4)
    before, after = (outputs[n][1].log_softmax(1) for n in ("without_sae", "with_sae"))
    kl = float((before.exp() * (before - after)).sum(1).mean())
    assert found["kl_div_with_sae"] == pytest.approx(kl, rel=1e-4)


def test_the_model_is_run_four_times_on_no_more_images_than_allowed(pass_over, model) -> None:
    evaluator = pass_over(intervene=model, options={"max_images": 5})
    assert evaluator.compute()["images"] == 5
    evaluator.compute(permutation=np.arange(12))
    evaluator.tables(), evaluator.figures()
    assert model.images == 4 * 5


def test_images_of_classes_that_the_head_lacks_have_no_loss(pass_over, model) -> None:
    model.logit_classes = np.where(model.logit_classes < 6, model.logit_classes, -1)
    evaluator = pass_over(intervene=model)
    index = torch.from_numpy(evaluator._images.index(fit=False))
    known = index[torch.from_numpy(LABELS)[index] < 6]
    logits = model(known).logits
    said = model.logit_classes[logits.argmax(1).numpy()]
    found = evaluator.compute()["accuracy_without_sae"]
    assert found == pytest.approx((said == LABELS[known]).mean())


def test_without_a_head_the_embedding_is_left(pass_over, model, toy_model) -> None:
    found = pass_over(intervene=toy_model(X, model.to_embedding)).compute()
    assert math.isnan(found["ce_loss_with_sae"]) and math.isnan(found["kl_div_with_sae"])
    assert 0 < found["embedding_cossim_with_sae"] <= 1 and math.isfinite(found["embedding_score"])


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"no_intervention": "not today"}, "not today"),
        ({"reconstruct": None, "intervene": len}, r"\(sae\) cannot be decoded"),
    ],
)
def test_what_cannot_be_measured_has_a_reason(pass_over, facts: Any, reason: str) -> None:
    evaluator = pass_over(**facts)
    found = evaluator.compute()
    assert math.isnan(found["embedding_score"]) and math.isfinite(found["l0_image"])
    table = evaluator.tables()["splicing"]
    assert table["run"].tolist() == ["none"] and table["reason"].str.contains(reason).all()
    assert set(evaluator.figures()) == {"density"}


def test_what_costs_nothing_cannot_be_recovered() -> None:
    assert _recovered(1.0, 1.5, 3.0) == 0.75 and _recovered(2.0, 2.0, 1.0) == 1.0
    assert math.isnan(_recovered(0.0, 0.5, 1e-6)) and math.isnan(_recovered(0.0, 0.5, -1e-6))
    assert _recovered(0.0, 0.0, 2e-6) == _recovered(0.0, 0.0, -2e-6) == 1.0


def test_options_are_checked() -> None:
    for options in ({"max_images": 0}, {"dense": 2.0}, {"almost_dead": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Reconstruction.Options(**options)
