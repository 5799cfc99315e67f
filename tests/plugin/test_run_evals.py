"""SAELens's own `run_evals` on a vision store: against hand-made numbers on Hugging Face's own model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.evals import EvalConfig, get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from taxolens.hooks.activations.cache import ActivationCache
from taxolens.hooks.activations.stream import ActivationStream
from taxolens.hooks.images.dataset import ImageDataset
from taxolens.hooks.images.preprocess import preprocess_for
from taxolens.hooks.models.evals import labels_of
from taxolens.hooks.models.load import from_module
from taxolens.plugin.training.activations_store import VisionActivationsStore
from taxolens.registry.errors import ConfigError
from tiny_images import hf_dataset, noise
from tiny_models import tiny_model
from torch.nn.functional import cross_entropy, log_softmax

N, CLASSES = 8, ["ant", "bee", "cat", "dog", "eel"]
HOOK = "blocks.0.hook_resid_post"
SPANS = {"class": slice(0, 1), "patch": slice(1, 17), "all": slice(0, 17)}
SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def images() -> ImageDataset:
    return ImageDataset(hf_dataset(N, CLASSES, draw=noise))


def model_of(variant: str, names: list[str] | None = None) -> Any:
    plain = tiny_model(variant)
    if names is not None:
        plain.config.id2label = dict(enumerate(names))
    model = from_module(plain)
    model.preprocessor_config = {"size": SIZE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return model


def sae_of(d_in: int = 16, hook: str = HOOK) -> StandardSAE:
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=8))
    generator = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.requires_grad_(False)
    sae.cfg.metadata.hook_name = hook
    return sae


def store_of(model: Any, images: Any, tokens: str, hook: str = HOOK) -> VisionActivationsStore:
    stream = ActivationStream(model, images, [hook], tokens=tokens, store_batch_size_prompts=N)
    return VisionActivationsStore(stream, hook)


def evaluate(sae: Any, model: Any, store: Any, **options: Any) -> dict[str, float]:
    cfg = get_eval_everything_config(
        n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1
    )
    cfg = EvalConfig(**{**vars(cfg), **options})
    groups, _ = run_evals(sae, store, model, ActivationScaler(), cfg)
    return {name: value for group in groups.values() for name, value in group.items()}


def by_hand(
    variant: str, pixels: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The logits of Hugging Face's own model with `change` applied to what its first block gives."""
    plain = tiny_model(variant)
    layers = plain.vit.layers if variant == "vit_classifier" else plain.resnet.encoder.stages

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        value = change(value.clone())
        return (value, *output[1:]) if isinstance(output, tuple) else value

    layers[0].register_forward_hook(hook)
    with torch.no_grad():
        return plain(pixels).logits


def pixels_of(model: Any, images: ImageDataset) -> torch.Tensor:
    preprocess = preprocess_for(model)
    return torch.stack([torch.from_numpy(preprocess(images.decode(i))) for i in range(N)])


@pytest.mark.parametrize("tokens", [*SPANS, "mean_patch"])
def test_the_numbers_are_those_at_the_tokens_of_the_store(tokens: str, images: Any) -> None:
    model, sae = model_of("vit_classifier"), sae_of()
    found = evaluate(sae, model, store_of(model, images, tokens))
    pixels, labels = pixels_of(model, images), torch.from_numpy(images.labels)
    kept: list[torch.Tensor] = []

    def changed(new: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def change(x: torch.Tensor) -> torch.Tensor:
            if tokens == "mean_patch":
                mean = x[:, 1:].mean(1, keepdim=True)
                kept.append(mean)
                x[:, 1:] += new(mean) - mean
            else:
                kept.append(x[:, SPANS[tokens]].clone())
                x[:, SPANS[tokens]] = new(x[:, SPANS[tokens]])
            return x

        return change

    own, spliced, ablated = (
        by_hand("vit_classifier", pixels, changed(new))
        for new in (lambda x: x, lambda x: sae(x), torch.zeros_like)
    )

    def kl(other: torch.Tensor) -> float:
        p, q = log_softmax(own, -1), log_softmax(other, -1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    x = kept[0]
    expected = {
        "kl_div_with_sae": kl(spliced),
        "kl_div_with_ablation": kl(ablated),
        "ce_loss_with_sae": float(cross_entropy(spliced, labels)),
        "ce_loss_without_sae": float(cross_entropy(own, labels)),
        "ce_loss_with_ablation": float(cross_entropy(ablated, labels)),
        "l0": float((sae.encode(x) > 0).sum(-1).float().mean()),
        "mse": float((x - sae(x)).square().sum(-1).mean()),
        "l2_norm_in": float(x.norm(dim=-1).mean()),
        "total_tokens_eval_reconstruction": N * x.shape[1],
    }
    assert kl(spliced) > 1e-5
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-3)


def test_a_wrapped_model_has_them_too(images: Any) -> None:
    model, hook = model_of("resnet_classifier"), "blocks.0.hook_resid_post"
    sae = sae_of(d_in=16, hook=hook)
    found = evaluate(sae, model, store_of(model, images, "patch", hook))
    pixels, labels = pixels_of(model, images), torch.from_numpy(images.labels)
    spliced = by_hand("resnet_classifier", pixels, lambda x: sae(x.movedim(1, -1)).movedim(-1, 1))
    assert found["ce_loss_with_sae"] == pytest.approx(
        float(cross_entropy(spliced, labels)), rel=1e-3
    )


def test_heads_are_joined(images: Any) -> None:
    hook = "blocks.1.attn.hook_z"
    model, sae = model_of("vit_classifier"), sae_of(hook=hook)
    found = evaluate(sae, model, store_of(model, images, "class", hook))
    from taxolens.hooks.models.load import run_to_hooks

    x = run_to_hooks(model, pixels_of(model, images), [hook])[hook][:, :1]
    assert found["mse"] == pytest.approx(float((x - sae(x)).square().sum(-1).mean()), rel=1e-3)
    assert found["kl_div_with_sae"] > 0


@pytest.mark.parametrize("tokens", ["class", "patch", "mean_patch"])
@pytest.mark.parametrize(
    ("hook", "head"),
    [
        ("blocks.0.attn.hook_z", None),
        ("blocks.0.attn.hook_z", 1),
        ("blocks.0.attn.o.hook_in", None),
    ],
)
def test_an_sae_of_a_head_acts_on_it_alone(
    hook: str, head: int | None, tokens: str, images: Any
) -> None:
    model, sae = model_of("vit_classifier"), sae_of(16 if head is None else 8, hook)
    sae.cfg.metadata.hook_head_index = head
    store = store_of(model, images, tokens, hook)
    columns = slice(None) if head is None else slice(8, 16)

    def spliced(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        if tokens == "mean_patch":
            mean = z[:, 1:, columns].mean(1, keepdim=True)
            z[:, 1:, columns] += sae(mean) - mean
        else:
            z[:, SPANS[tokens], columns] = sae(z[:, SPANS[tokens], columns])
        return z

    def logits(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        plain = tiny_model("vit_classifier")
        projection = plain.vit.layers[0].attention.o_proj
        projection.register_forward_pre_hook(lambda module, given: (change(given[0]),))
        with torch.no_grad():
            return plain(pixels_of(model, images)).logits

    found = evaluate(sae, model, store)
    p, q = log_softmax(logits(lambda z: z), -1), log_softmax(logits(spliced), -1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert expected > 1e-6
    assert found["kl_div_with_sae"] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("hook", ["blocks.0.attn.o.hook_in", HOOK])
@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        (("kl", "ce_loss"), "hook_head_index: run_evals knows heads by the name of the hook point"),
        (
            ("l2_norms", "sparsity_metrics", "variance_metrics"),
            r"hook point blocks\..*: the SAE cannot act on activations of shape \(8, 16, 16\): ",
        ),
    ],
)
def test_an_sae_of_a_head_elsewhere_is_refused(
    hook: str, left_out: tuple[str, ...], message: str, images: Any
) -> None:
    model, sae = model_of("vit_classifier"), sae_of(8, hook)
    sae.cfg.metadata.hook_head_index = 1
    store = store_of(model, images, "patch", hook)
    with pytest.raises(
        ConfigError, match=message + ".*a hook point named hook_q, hook_k, hook_v, hook_z"
    ):
        evaluate(sae, model, store, **{f"compute_{name}": False for name in left_out})


def test_classes_are_matched_by_name(images: Any) -> None:
    model = model_of("vit_classifier", CLASSES[::-1])
    found = evaluate(sae_of(), model, store_of(model, images, "class"))
    own = by_hand("vit_classifier", pixels_of(model, images), lambda x: x)
    labels = 4 - torch.from_numpy(images.labels)
    assert found["ce_loss_without_sae"] == pytest.approx(
        float(cross_entropy(own, labels)), rel=1e-4
    )


def test_classes_that_the_head_does_not_have(images: Any) -> None:
    model = model_of("vit_classifier", ["fox", *CLASSES[1:]])
    with pytest.raises(ConfigError, match=r"'ant' is none of them; allowed: compute_ce_loss=False"):
        evaluate(sae_of(), model, store_of(model, images, "class"))
    found = evaluate(sae_of(), model, store_of(model, images, "class"), compute_ce_loss=False)
    assert found["kl_div_with_sae"] > 0 and "ce_loss_with_sae" not in found


def test_a_class_that_two_outputs_of_the_head_are_named_for(images: Any) -> None:
    model = model_of("vit_classifier", [*CLASSES[:-1], CLASSES[0]])
    message = f"'{CLASSES[0]}' is the name of several of them; allowed: compute_ce_loss=False"
    problem = labels_of(model, CLASSES[:-1], torch.tensor([0, 1]))
    assert isinstance(problem, ConfigError) and message in str(problem)
    others = labels_of(model, CLASSES[1:-1], torch.tensor([1, 0]))
    assert isinstance(others, torch.Tensor) and others.tolist() == [2, 1]


def test_a_model_without_logits(images: Any) -> None:
    model = model_of("vit")
    store = store_of(model, images, "class")
    with pytest.raises(ConfigError, match="gives no logits: without a head of classes there is no"):
        evaluate(sae_of(), model, store)
    found = evaluate(sae_of(), model, store, compute_kl=False, compute_ce_loss=False)
    assert found["mse"] > 0 and "kl_div_with_sae" not in found


def test_more_images_in_a_batch_than_there_are(images: Any) -> None:
    model = model_of("vit_classifier")
    with pytest.raises(
        ConfigError, match=r"batch_size_prompts: fewer images .* given 9; allowed: 1"
    ):
        evaluate(sae_of(), model, store_of(model, images, "class"), batch_size_prompts=9)


def test_a_store_of_a_cache_has_no_images(images: Any, tmp_path: Any) -> None:
    model = model_of("vit_classifier")
    cache = ActivationCache.build(model, images, [HOOK], path=tmp_path, tokens="class")
    stream = ActivationStream(None, None, [HOOK], cache=cache, tokens="class")
    with pytest.raises(ConfigError, match="run_evals runs the model on images, and this one reads"):
        evaluate(sae_of(), model, VisionActivationsStore(stream, HOOK))


def test_what_the_training_reads_stays(images: Any) -> None:
    model = model_of("vit_classifier")
    first, second = (store_of(model, images, "class") for _ in range(2))
    first.open(), second.open()
    expected = [next(first).clone() for _ in range(2)]
    found = [next(second).clone()]
    evaluate(sae_of(), model, second)
    found.append(next(second))
    assert all(map(torch.equal, expected, found))
