import itertools
import json
import shutil
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import taxolens  # noqa: F401  (registers the families)
import torch
import transformers
from far_device import FAR_DEVICES, on
from taxolens.hooks.activations import token_sources
from taxolens.hooks.activations.cache import ActivationCache
from taxolens.hooks.activations.extract import Extraction, TokenExtractor, model_fingerprint
from taxolens.hooks.activations.stream import ActivationStream
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.images.loader import ImageLoader, worker_context
from taxolens.hooks.images.preprocess import preprocess_for
from taxolens.hooks.images.source import ImageSource
from taxolens.hooks.models.load import from_module, load_vision_model, run_to_hooks
from taxolens.registry.errors import CheckpointError, ConfigError, DataError
from tiny_images import hf_dataset, noise
from tiny_models import VIT, pictures, tiny_model
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

worker_context()  # its server takes long to start: let it while other tests run

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
CORRUPT = (4, 5, 6, 17)  # with two images a forward pass: one of them has none that is readable
N = 23
TOKENS = {"class": 1, "patch": 16, "register": 4, "all": 21, "mean_patch": 1}


@pytest.fixture(scope="module")
def model():
    return vision_model()


def vision_model(family="dinov2_with_registers", seed=0):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return from_module(tiny_model(family, seed=seed), processor=processor)


@pytest.fixture(scope="module")
def images():
    return load_images(hf_dataset(N, corrupt=CORRUPT, draw=noise))


@pytest.fixture(scope="module")
def streamed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed")
    hf_dataset(N, corrupt=CORRUPT, draw=noise).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def cache(model, images, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    return build(model, images, path, tokens="all", mean_patch=True)


def build(model, images, path, **options):
    options = {"batch_size": 2, "max_corrupt_share": 0.5, "progress": False, **options}
    return ActivationCache.build(model, images, HOOKS, path=path, **options)


def stream_of(model, images, **options):
    settings = {
        "tokens": "all",
        "train_batch_size_tokens": 10,
        "store_batch_size_prompts": 2,
        "n_batches_in_buffer": 3,
        "seed": 5,
        "max_corrupt_share": 0.5,
    }
    return ActivationStream(model, images, HOOKS, **{**settings, **options})


def reference(model, images, tokens):
    """{hook: (tokens of all readable images, d)}, image by image in order."""
    loader = ImageLoader(images, preprocess_for(model), batch_size=2, max_corrupt_share=0.5)
    extractor = TokenExtractor(model, HOOKS, [tokens])
    parts = [extractor(batch) for batch in loader.batches(range(len(images)))]
    return {name: torch.cat([part[name].flatten(0, 1) for part in parts]) for name in HOOKS}


def take(stream, n):
    return [next(stream) for _ in range(n)]


def equal(one, other):
    return all(torch.equal(a[k], b[k]) for a, b in zip(one, other, strict=True) for k in HOOKS)


def sorted_rows(tokens):
    """Rows in an order of their own, rounded: activations of other batches differ in a last bit."""
    rows = tokens.numpy().round(3)
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("from_cache", [False, True])
def test_every_token_comes_exactly_once_an_epoch(model, images, tmp_path, tokens, from_cache):
    expected = reference(model, images, tokens)
    cache = build(model, images, tmp_path, tokens=tokens) if from_cache else None
    stream = stream_of(*(None, None) if from_cache else (model, images), tokens=tokens, cache=cache)
    n = (N - len(CORRUPT)) * TOKENS[tokens]
    assert len(expected[HOOKS[0]]) == n and stream.tokens_per_image == TOKENS[tokens]
    n_batches = -(-3 * n // 10)
    batches = take(stream, n_batches)
    assert all(batch[name].shape == (10, 16) for batch in batches for name in HOOKS)
    for name in HOOKS:
        served = torch.cat([batch[name] for batch in batches])
        for epoch in range(3):
            part = served[epoch * n : (epoch + 1) * n]
            assert np.allclose(sorted_rows(part), sorted_rows(expected[name]), atol=2e-3)
    first = torch.cat([batch[HOOKS[0]] for batch in batches])
    assert not torch.equal(first[:n], first[n : 2 * n])  # each epoch has its own order
    assert sorted(stream.failures) == sorted(CORRUPT)


def test_all_hook_points_show_the_same_tokens(model, images):
    stream = stream_of(model, images, tokens="patch")
    expected = reference(model, images, "patch")
    batch = next(stream)
    for row in range(10):
        at = [int((expected[name] - batch[name][row]).abs().sum(dim=1).argmin()) for name in HOOKS]
        assert at[0] == at[1]


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        *itertools.product(["model", "cache"], TOKENS),
        *itertools.product(["streaming"], ["class", "register"]),
    ],
)
def test_seek_goes_on_to_the_bit(
    model, images, cache, streamed_folder, tokens, kind, monkeypatch, tmp_path
):
    if kind == "cache" and tokens not in ("all", "mean_patch"):
        cache = build(model, images, tmp_path, tokens=tokens)
    if kind == "streaming":
        images = streamed(streamed_folder, monkeypatch, tmp_path)

    def fresh():
        if kind == "cache":
            return stream_of(None, None, tokens=tokens, cache=cache)
        return stream_of(model, images, tokens=tokens)

    places = (0, 1, 2, 3) if TOKENS[tokens] == 1 else (0, 3, 17, 33)
    whole, resumed = fresh(), fresh()
    batches = take(whole, places[-1] + 2)
    for n in places:
        resumed.seek(json.loads(json.dumps(whole.state_after(n))))
        assert equal(take(resumed, 2), batches[n : n + 2])
        for after in (0, 1, 2):
            assert resumed.state_after(after) == whole.state_after(n + after)


def streamed(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    return load_images(folder, streaming=True)


def test_streaming_covers_every_epoch_in_another_order(
    model, images, streamed_folder, monkeypatch, tmp_path
):
    expected = sorted_rows(reference(model, images, "class")[HOOKS[0]])
    images = streamed(streamed_folder, monkeypatch, tmp_path)
    stream = stream_of(model, images, tokens="class", train_batch_size_tokens=N - len(CORRUPT))
    one, two = (batch[HOOKS[0]] for batch in take(stream, 2))
    assert np.allclose(sorted_rows(one), expected, atol=2e-3)
    assert np.allclose(sorted_rows(two), expected, atol=2e-3)
    assert not torch.equal(one, two)
    assert len(stream.failures) == len(CORRUPT)


def test_worker_processes_change_nothing(model, images):
    alone, helped = stream_of(model, images), stream_of(model, images, num_workers=2)
    batches = take(alone, 45)
    assert equal(take(helped, 45), batches)
    helped.seek(alone.state_after(31))
    assert equal(take(helped, 14), batches[31:])
    helped.close()
    assert equal(take(helped, 1), take(alone, 1))
    helped.close()


def test_batch_sizes_need_not_divide_anything(model, images):
    for size in (1, 7, 64, 300):
        served = take(stream_of(model, images, train_batch_size_tokens=size), -(-200 // size))
        tokens = torch.cat([batch[HOOKS[1]] for batch in served])[:200]
        if size == 1:
            first = tokens
        assert torch.equal(tokens, first)


def test_seeds_decide(model, images):
    first = take(stream_of(model, images), 3)
    assert equal(take(stream_of(model, images), 3), first)
    assert not equal(take(stream_of(model, images, seed=6), 3), first)


def test_tokens_are_shuffled_within_a_window(model, images):
    served = torch.cat([b[HOOKS[0]] for b in take(stream_of(model, images, tokens="patch"), 4)])
    expected = reference(model, images, "patch")[HOOKS[0]]
    places = (expected[None] - served[:, None]).abs().sum(dim=2).argmin(dim=1)
    assert len({int(place) // 16 for place in places[:16]}) > 2  # of several images
    jumps = (places[1:] - places[:-1]).abs()
    assert (jumps > 1).float().mean() > 0.8


def test_the_global_random_state_is_left_alone(model, images, cache):
    torch.manual_seed(3)
    np.random.seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(stream_of(model, images), 10)
    take(stream_of(None, None, cache=cache), 3)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])


def test_batches_can_be_trained_on(model, images):
    batch = next(stream_of(model, images))[HOOKS[0]]
    assert not batch.is_inference() and not batch.requires_grad
    weight = torch.ones(16, requires_grad=True)
    (batch * weight).sum().backward()
    assert torch.allclose(weight.grad, batch.sum(dim=0))


def test_from_a_background_thread_while_states_are_asked_for(model, images):
    stream = stream_of(model, images)
    expected = take(stream_of(model, images), 30)
    served, states = [], []

    def read():
        for _ in range(30):
            served.append(next(stream))

    thread = threading.Thread(target=read)
    thread.start()
    while thread.is_alive():
        states.append(stream.state_after(len(served)))
    thread.join()
    assert equal(served, expected)
    assert states and all(state["stream"] for state in states)
    with stream.paused():
        assert stream.state_after(30)["position"] != stream.state_after(1)["position"]


def test_closing_frees_a_thread_that_waits_for_a_batch(model, images):
    stream = stream_of(model, images, train_batch_size_tokens=10**7)  # never comes
    ended = threading.Event()

    def read():
        for _ in stream:
            pass
        ended.set()

    thread = threading.Thread(target=read)
    thread.start()
    stream.end()
    thread.join(60)
    assert ended.is_set()
    with pytest.raises(StopIteration):
        next(stream)


def test_states_not_served_or_long_gone_are_refused(model, images, monkeypatch):
    monkeypatch.setattr("taxolens.hooks.activations.stream.STATES_KEPT", 4)
    stream = stream_of(model, images)
    take(stream, 6)
    assert stream.state_after(3) and stream.state_after(0)
    for n in (2, 7):
        with pytest.raises(ValueError, match=f"after batch {n} is not kept: 6 batches"):
            stream.state_after(n)


def test_state_carries_the_corrupt_images_met_so_far(model, images, caplog):
    stream = stream_of(model, images)
    take(stream, 40)
    state = stream.state_after(40)
    assert set(map(int, state["failures"])) == set(CORRUPT)
    resumed = stream_of(model, images)
    caplog.clear()
    resumed.seek(state)
    take(resumed, 40)
    assert sorted(resumed.failures) == sorted(CORRUPT)
    assert "corrupt" not in caplog.text  # told once already


def test_seek_refuses_what_belongs_elsewhere(model, images, cache):
    state = stream_of(model, images).state_after(0)
    others = {
        "seed: 5 then, 6 now": stream_of(model, images, seed=6),
        "tokens: 'all' then, 'class' now": stream_of(model, images, tokens="class"),
        "images": stream_of(model, load_images(hf_dataset(N, draw=noise))),
        "model": stream_of(vision_model(seed=1), images),
        "from: 'model' then, 'cache' now": stream_of(None, None, cache=cache),
    }
    for difference, stream in others.items():
        with pytest.raises(CheckpointError, match=difference):
            stream.seek(state)
    with pytest.raises(CheckpointError, match="fields are missing"):
        stream_of(model, images).seek({"epoch": 3})


def test_describe_is_json_and_does_not_depend_on_the_machine(model, images):
    stream = stream_of(model, images)
    described = stream.describe()
    assert json.loads(json.dumps(described)) == described
    assert described == stream_of(model, images, num_workers=1).describe()
    assert described["images"] == images.fingerprint


@pytest.mark.parametrize("workers", [0, 2])
def test_not_finite_names_hook_point_and_image(images, workers):
    model = vision_model()
    model.original_model.encoder.layer[1].mlp.fc2.original_component.bias.data[3] = float("nan")
    stream = stream_of(model, images, num_workers=workers)
    with pytest.raises(
        DataError,
        match=r"'blocks\.1\.hook_resid_post': its activations are NaN.*\(\d+\.png\) and 1 more",
    ):
        next(stream)


def test_too_large_for_half_precision_is_an_error(images):
    model = vision_model()
    model.original_model.encoder.layer[1].mlp.fc2.original_component.bias.data[3] = 1e6
    next(stream_of(model, images))
    with pytest.raises(DataError, match=r"NaN or infinite .in torch\.float16"):
        next(stream_of(model, images, dtype="float16"))


def test_too_many_corrupt_images_stop_the_stream(model, images):
    with pytest.raises(
        DataError, match=r"max_corrupt_share: .* corrupt: image \d+ \(\d+\.png.*given 0\.1"
    ):
        take(stream_of(model, images, max_corrupt_share=0.1), 50)


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_readable_is_an_error_and_no_endless_loop(model, streaming, tmp_path, monkeypatch):
    data = hf_dataset(7, corrupt=range(7))
    images = load_images(data.to_iterable_dataset() if streaming else data)
    with pytest.raises(DataError, match=r"not one image can be read: image .*cannot identify"):
        next(stream_of(model, images))


def test_dtype_and_evaluation_mode(model, images):
    model.train()
    batch = next(stream_of(model, images, dtype="bfloat16"))
    assert not model.training
    assert batch[HOOKS[0]].dtype == torch.bfloat16
    autocast = next(stream_of(model, images, autocast=True))
    assert autocast[HOOKS[0]].dtype == torch.float32
    assert torch.allclose(autocast[HOOKS[0]], next(stream_of(model, images))[HOOKS[0]], atol=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "cls"}, "tokens: not known.*given 'cls'"),
        ({"train_batch_size_tokens": 0}, "train_batch_size_tokens: too small; given 0"),
        ({"store_batch_size_prompts": 0}, "store_batch_size_prompts: too small; given 0"),
        ({"n_batches_in_buffer": -1}, "n_batches_in_buffer: too small; given -1"),
        ({"seed": -1}, "seed: too small; given -1"),
        ({"dtype": "int8"}, "dtype: not known; given 'int8'; allowed: .*float32"),
        ({"num_workers": -2}, "num_workers: too small; given -2"),
        ({"image_size": -5}, "image_size: too small; given -5"),
    ],
)
def test_bad_settings_are_named(model, images, options, message):
    with pytest.raises(ConfigError, match=message):
        stream_of(model, images, **options)


def test_two_values_say_the_same_as_keywords(model, images, tmp_path):
    source = ImageSource(batch_size=2, max_corrupt_share=0.5)
    wanted = Extraction(HOOKS, "patch", image_size=48, dtype="float16")
    order = {"train_batch_size_tokens": 10, "n_batches_in_buffer": 3, "seed": 5}
    stream = ActivationStream(model, images, wanted, source=source, **order)
    same = stream_of(model, images, tokens="patch", image_size=48, dtype="float16")
    assert stream.describe() == same.describe()
    assert all(torch.equal(a, b) for a, b in zip(next(stream).values(), next(same).values()))
    ActivationCache.build(model, images, wanted, source=source, path=tmp_path, progress=False)
    settings = {"tokens": "patch", "image_size": 48, "dtype": "float16"}
    facts = build(model, images, tmp_path, **settings).facts
    assert (facts["tokens"], facts["dtype"], facts["autocast"]) == ("patch", "float16", False)


@pytest.mark.parametrize("name", ["batchsize", "max_images", "dataset_path"])
def test_settings_that_decide_nothing_here_are_refused(model, images, name):
    with pytest.raises(TypeError, match=f"{name}: no such argument"):
        stream_of(model, images, **{name: 3})
    with pytest.raises(TypeError, match=f"{name}: no such argument"):
        ActivationCache.build(model, images, HOOKS, **{name: 3})


def test_models_and_hook_points_that_do_not_fit(images):
    with pytest.raises(ConfigError, match="has no class token"):
        stream_of(vision_model("siglip"), images, tokens="class")
    with pytest.raises(ConfigError, match="both are needed"):
        stream_of(None, images)
    with pytest.raises(ConfigError, match="each of them once"):
        ActivationStream(vision_model(), images, [HOOKS[0], HOOKS[0]])


def test_hook_points_with_other_numbers_of_tokens_are_refused(images):
    model = vision_model("resnet")
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    stream = ActivationStream(model, images, hooks, tokens="patch", max_corrupt_share=0.5)
    with pytest.raises(ConfigError, match=r"different numbers of tokens.*or the tokens mean_patch"):
        next(stream)


def test_another_image_size(model, images):
    stream = stream_of(model, images, tokens="patch", image_size=48)
    assert stream.tokens_per_image == 36
    assert next(stream)[HOOKS[0]].shape == (10, 16)


def test_cached_and_fresh_activations_are_the_same_numbers(model, images, cache):
    expected = reference(model, images, "all")
    for name in HOOKS:
        assert torch.equal(cache.tensor(name).flatten(0, 1), expected[name])
    served = take(stream_of(None, None, cache=cache, tokens="mean_patch"), 2)
    means = cache.tensor(HOOKS[0], "mean_patch").flatten(0, 1)
    for row in served[0][HOOKS[0]]:
        assert (means == row).all(dim=1).any()


def test_a_cache_is_gathered_in_large_pieces_of_any_size(cache, monkeypatch):
    batches = take(stream_of(None, None, cache=cache), 90)
    monkeypatch.setattr("taxolens.hooks.activations.token_sources.GATHERED_BYTES", 3000)
    assert equal(take(stream_of(None, None, cache=cache), 90), batches)


@pytest.mark.parametrize("device", ["cpu", *FAR_DEVICES])
@pytest.mark.parametrize("share", [0.999, 1.001])
def test_a_cache_that_a_fifth_of_the_device_holds_is_kept_there(cache, monkeypatch, device, share):
    """And is not copied for each batch; either way the batches are the same numbers."""
    expected = take(stream_of(None, None, cache=cache), 30)
    size = sum(cache.tensor(name).nbytes for name in HOOKS)
    monkeypatch.setattr(token_sources, "_free_bytes", lambda device: size * share / 0.2)
    with on(device):
        stream = stream_of(None, None, cache=cache, device=device)
        batches = take(stream, 30)
        assert (stream._source._resident is None) == (share < 1)
        assert {b.device.type for batch in batches for b in batch.values()} == {device}
        batches = [{name: b.cpu() for name, b in batch.items()} for batch in batches]
    assert equal(batches, expected)


@pytest.mark.parametrize(("ranks", "part"), [("1", 60), ("2", 60), ("3", 30), ("6", 20)])
def test_processes_on_one_gpu_share_its_memory(monkeypatch, ranks, part):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    assert token_sources._free_bytes(torch.device("cuda:1")) == part
    assert token_sources._free_bytes(torch.device("cpu")) == 0


def test_a_cache_without_what_is_asked_for(cache):
    with pytest.raises(
        ConfigError, match=r"tokens: the cache .*given 'patch'; allowed: all and mean_patch"
    ):
        stream_of(None, None, cache=cache, tokens="patch")
    with pytest.raises(ConfigError, match=r"did you mean 'blocks\.1\.hook_resid_post'"):
        ActivationStream(None, None, ["blocks.2.hook_resid_post"], tokens="all", cache=cache)


def test_model_fingerprint_follows_every_weight(model):
    assert model_fingerprint(model) == model_fingerprint(vision_model())
    other = vision_model()
    next(itertools.islice(other.original_model.parameters(), 7, None)).data.view(-1)[-1] += 1e-3
    assert model_fingerprint(other) != model_fingerprint(model)


def clip_of(**fields) -> Any:
    """A tapped CLIP of these fields of its config; the same weights each time."""
    config = transformers.CLIPVisionConfig(**{**VIT, **fields})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return from_module(transformers.CLIPVisionModel(config).eval())


@pytest.mark.parametrize(
    "fields", [{"hidden_act": "gelu"}, {"num_attention_heads": 4}, {"layer_norm_eps": 1e-3}]
)
def test_model_fingerprint_follows_the_config(fields):
    """The weights are the same, the activations are not."""
    one, other = clip_of(), clip_of(**fields)
    acts = [run_to_hooks(model, pictures(), HOOKS[1:])[HOOKS[1]] for model in (one, other)]
    assert not torch.equal(*acts)
    assert model_fingerprint(one) != model_fingerprint(other)


def test_model_fingerprint_follows_what_a_module_without_config_computes():
    class Own(torch.nn.Module):
        def __init__(self, n_heads: int, eps: float, act: type[torch.nn.Module]) -> None:
            super().__init__()
            self.norm, self.act = torch.nn.LayerNorm(8, eps), act()
            self.attention = torch.nn.MultiheadAttention(8, n_heads)

    made = []
    for settings in [
        (2, 1e-5, torch.nn.GELU),
        (4, 1e-5, torch.nn.GELU),
        (2, 1e-3, torch.nn.GELU),
    ] + [(2, 1e-5, torch.nn.ReLU)] * 2:
        torch.manual_seed(0)
        made.append(model_fingerprint(from_module(Own(*settings))))
    assert len(set(made)) == 4 and made[3] == made[4]


@pytest.mark.parametrize("config", [None, transformers.PreTrainedConfig(hidden_act="gelu")])
def test_model_fingerprint_follows_plain_attributes(config):
    """Of a model whose config is ours, as timm's: it has sizes alone."""

    class Rope(torch.nn.Module):
        def __init__(self, **settings: Any) -> None:
            super().__init__()
            vars(self).update(settings)

    def made(act: type[torch.nn.Module], **settings: Any) -> str:
        model = torch.nn.Sequential(Rope(**settings), act())
        if config is not None:
            model.config = config  # type: ignore[assignment]
        return model_fingerprint(SimpleNamespace(family="timm", original_model=model))  # type: ignore[arg-type]

    plain: dict[str, Any] = {"temperature": 1e4, "global_pool": "token", "rotate_half": False}
    one = made(torch.nn.GELU, **plain)
    assert one == made(torch.nn.GELU, **plain) == made(torch.nn.GELU, **plain, fused_attn=True)
    changes = [{"temperature": 10.0}, {"global_pool": "avg"}, {"rotate_half": True}]
    others = {made(torch.nn.GELU, **{**plain, **change}) for change in changes}
    others.add(made(torch.nn.ReLU, **plain))
    assert len(others) == 4 and one not in others


def test_model_fingerprint_is_that_of_the_saved_model(tmp_path):
    """It depends on no folder, attention, labels, or hooks that the model is used with."""
    config = transformers.ViTConfig(**VIT, num_labels=2)
    plain = transformers.ViTForImageClassification(config).eval()
    plain.save_pretrained(tmp_path / "one")
    found = {model_fingerprint(from_module(plain))}
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    saved = json.loads((tmp_path / "two" / "config.json").read_text())
    saved["id2label"], saved["transformers_version"] = {"0": "ant", "1": "bee"}, "5.0.0"
    (tmp_path / "two" / "config.json").write_text(json.dumps(saved))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no preprocessor_config.json
        for folder, attention in [("one", "sdpa"), ("one", "eager"), ("two", "sdpa")]:
            model = load_vision_model(tmp_path / folder, attn_implementation=attention)
            found.add(model_fingerprint(model))
            run_to_hooks(model, pictures(), HOOKS)
            found.add(model_fingerprint(model))
    assert len(found) == 1


def test_a_cache_of_another_activation_function_is_refused(images, tmp_path):
    def fill(model):
        setting = {"tokens": "class", "max_corrupt_share": 0.5, "progress": False}
        return ActivationCache.build(model, images, HOOKS, path=tmp_path / "acts", **setting)

    fill(clip_of())
    with pytest.raises(ConfigError, match="model"):
        fill(clip_of(hidden_act="gelu"))
    stream = stream_of(clip_of(), images, tokens="class")
    state = stream.state_after(len(take(stream, 1)))
    with pytest.raises(CheckpointError, match="model"):
        stream_of(clip_of(hidden_act="gelu"), images, tokens="class").seek(state)


def test_map_style_datasets_of_one_image(model):
    one = load_images(
        datasets.Dataset.from_dict(
            {"image": [noise(1)]}, features=datasets.Features({"image": datasets.Image()})
        )
    )
    batches = take(stream_of(model, one, tokens="class"), 2)
    assert torch.equal(batches[0][HOOKS[0]][0], batches[1][HOOKS[0]][9])
