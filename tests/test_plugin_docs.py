"""docs/plugins.md: its plugin is run, and it names whatever an author is given."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import getmembers
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numpy as np
import pytest
import taxolens
import taxolens_example_plugin as example
import torch
import transformers
from documented_plugin import DOCS, documented_plugin
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from taxolens.hooks.models.load import from_module, run_to_hooks
from taxolens.plugin import hookspecs
from taxolens.registry.evaluators import parts
from taxolens.registry.evaluators.base import (
    Accumulator,
    Evaluator,
    Firings,
    InterventionResult,
    Peer,
    stream,
)
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.presentation import Headline, NodeTable
from temporary_plugins import temporary_plugins

TEXT = DOCS.read_text()
HOOKS = [name for name, member in vars(hookspecs).items() if hasattr(member, "taxolens_spec")]


def section(title: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    found = re.search(rf"^(##+) {title}\n(.*?)(?=^##\s|^\1\s|\Z)", TEXT, flags=re.M | re.S)
    assert found, f"docs/plugins.md has no section {title!r}"
    return found[2]


def public_names(cls: type[Any]) -> list[str]:
    """What a user of `cls` may touch: its fields, attributes and methods without an underscore."""
    own = {name for name, _ in getmembers(cls)} | {*getattr(cls, "__annotations__", {})}
    if is_dataclass(cls):
        own |= {field.name for field in fields(cls)}
    return sorted(n for n in own if not n.startswith("_") and not hasattr(object, n))


NAMED = {  # section -> what must be named in it
    "The batch": [taxolens.EvaluationBatch],
    "The context": [taxolens.EvaluationContext],
    "The taxonomy": [taxolens.Taxonomy],
    "Peers": [Peer],
    "What an evaluator declares": [Evaluator],
    "How an evaluator is shown": [Headline, NodeTable],
    "An architecture": [taxolens.Architecture],
    "A model family": [taxolens.VisionFamily],
    "A taxonomy": [taxolens.TaxonomySource],
    "A loader": [taxolens.Loader],
}


@pytest.mark.parametrize("title", NAMED)
def test_every_public_name_is_explained(title: str) -> None:
    code = " ".join(re.findall(r"`([^`\n]+)`", section(title)))
    for cls in NAMED[title]:
        for name in public_names(cls):
            assert re.search(rf"\b{name}\b", code), f"{cls.__name__}.{name}"
    assert len(public_names(NAMED[title][0])) >= 4


def test_what_is_found_by_introspection_is_what_there_is() -> None:
    assert {"x", "firings", "labels_of"} <= {*public_names(taxolens.EvaluationBatch)}
    assert {"W_dec", "share", "permutations"} <= {*public_names(taxolens.EvaluationContext)}
    assert {"names", "lch_many", "leaf_lch"} <= {*public_names(taxolens.Taxonomy)}
    assert {"name", "Options", "notes", "headlines"} <= {*public_names(Evaluator)}


def test_firings_and_interventions_are_explained() -> None:
    assert all(f"`{name}`" in section("The batch") for name in Firings._fields)
    text = section("Intervention")
    assert all(f"result.{name}`" in text for name in InterventionResult._fields)
    assert "`intervene.logit_classes`" in text


def accumulators() -> Iterator[type[Accumulator]]:
    for info in iter_modules(parts.__path__):
        module = import_module(f"{parts.__name__}.{info.name}")
        for _, member in getmembers(module, lambda m: isinstance(m, type)):
            public = not member.__name__.startswith("_")
            if public and issubclass(member, Accumulator) and member.__module__ == module.__name__:
                yield member


def test_every_shared_accumulator_is_named() -> None:
    found = list(accumulators())
    assert len(found) >= 10
    for cls in found:
        module = cls.__module__.rpartition(".")[2]
        assert f"`{module}.{cls.__name__}" in section("Shared accumulators"), cls


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_an_example(hook: str) -> None:
    assert f"| `{hook}` |" in TEXT
    assert hasattr(documented_plugin(), hook), f"no block of docs/plugins.md implements {hook}"


# The plugin ---------------------------------------------------------------------------------------


@pytest.fixture
def plugin() -> Iterator[Any]:
    """The documented module, registered."""
    module = documented_plugin()
    with temporary_plugins() as load:
        load("documented", **{hook: getattr(module, hook) for hook in HOOKS})
        yield module


TREE = taxolens.Taxonomy.from_edges(
    [(f"{n}", f"{n}{i}") for n in "ab" for i in range(3)] + [("root", "a"), ("root", "b")]
)


def test_the_evaluator_on_known_truth(plugin: Any) -> None:
    """Six classes in two families: one latent fires on a family, one on everything."""
    labels = torch.arange(6).repeat(4)
    z = torch.stack([(labels < 3).float(), torch.ones(24)], dim=1)
    value, permuted, shuffled = plugin.measure_siblings(z, labels, TREE)
    # of 30 ordered pairs of different classes, 12 are siblings
    assert value == pytest.approx({"sibling_share": (1 + 12 / 30) / 2, "latents": 2.0})
    shares = [found["sibling_share"] for found in permuted]
    assert max(shares) <= value["sibling_share"] and min(shares) < value["sibling_share"]
    assert all(found["latents"] == 2 for found in permuted)
    assert shuffled["sibling_share"] == pytest.approx(value["sibling_share"])  # families flip
    few, _, _ = plugin.measure_siblings(z, labels, TREE, min_firings=13)
    assert few == pytest.approx({"sibling_share": 12 / 30, "latents": 1.0})


def test_own_counts_give_what_shared_accumulators_give(plugin: Any) -> None:
    labels = torch.arange(6).repeat_interleave(20)
    index = torch.arange(len(labels))
    z = PlantedLatents(TREE, recall=0.8, false_alarm=0.05).encode(labels=labels, index=index)
    generator = torch.Generator().manual_seed(0)
    batch = taxolens.EvaluationBatch(
        x=torch.zeros(120, 2),
        z=z,
        labels=labels,
        shuffled_labels=labels[torch.randperm(120, generator=generator)],
        index=index,
        is_fit=index < 60,
    )
    context = taxolens.EvaluationContext(TREE, 120, 2, z.shape[1])
    chosen = {"own": (plugin.Siblings, None), "shared": (example.ExampleSiblings, None)}
    done = stream(context, chosen, [batch])
    assert done.errors == {}
    for given in ({}, {"shuffled": True}, {"permutation": TREE.permutation(3)}):
        own, shared = done.compute("own", **given), done.compute("shared", **given)
        assert own == pytest.approx(shared) and own["latents"] > 3
    assert done.compute("own") != done.compute("own", shuffled=True)
    table = done.evaluators["own"].tables()["latents"]
    assert {*table["node"]} <= {*TREE.nodes}


def test_the_architecture_trains_and_is_saved_as_topk(plugin: Any, tmp_path: Path) -> None:
    settings = {"architecture": "noisy_topk", "d_in": 8, "d_sae": 16, "k": 2, "noise": 0.5}
    sae = TrainingSAE.from_dict(settings)
    assert type(sae) is plugin.NoisyTopK and sae.cfg.noise == 0.5
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    step = TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )
    sae.training_forward_pass(step).loss.backward()
    assert sae.W_enc.grad is not None and sae.W_enc.grad.abs().sum() > 0
    assert not torch.equal(sae.encode(x), sae.encode(x))  # noise in training, none after
    sae.eval().save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.architecture() == "topk"
    assert loaded.cfg.metadata.training_architecture == "noisy_topk"
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))


def test_the_model_family_is_equal_to_hugging_face(plugin: Any) -> None:
    config = transformers.ViTMSNConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = transformers.ViTMSNModel(config).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = plain(images, output_hidden_states=True).hidden_states
    model = from_module(plain)
    assert model.family == "vit_msn" and model.cfg.has_class_token
    got = run_to_hooks(model, images, ["hook_embed", "blocks.0.hook_resid_post"])
    assert torch.equal(got["hook_embed"], expected[0])
    assert torch.equal(got["blocks.0.hook_resid_post"], expected[1])


def test_the_taxonomy_is_found_by_name(plugin: Any) -> None:
    tree = taxolens.load_taxonomy("weather", classes=["sun", "rain", "snow"])
    assert tree.classes == ("sun", "rain", "snow")
    assert tree.label(tree.index("sun")) == "sunshine"
    assert tree.nodes[tree.lch([1, 2])] == "wet"


def test_the_loader_reads_another_library_s_file(plugin: Any, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    shapes = {"W_enc": (4, 6), "b_enc": (6,), "W_dec": (6, 4), "b_dec": (4,)}
    arrays = {n: generator.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    np.savez(tmp_path / "theirs.npz", **arrays)
    sae = SAE.load_from_disk(
        tmp_path / "theirs.npz", converter=taxolens.LOADERS["npz"].disk, dtype="float64"
    )
    assert sae.dtype == torch.float64  # the override
    x = np.ones((1, 4))
    expected = np.maximum((x - arrays["b_dec"]) @ arrays["W_enc"] + arrays["b_enc"], 0)
    np.testing.assert_allclose(sae.encode(torch.from_numpy(x)).detach(), expected, rtol=1e-5)
