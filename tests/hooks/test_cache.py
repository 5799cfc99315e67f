import errno
import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import taxolens  # noqa: F401  (registers the families)
import torch
from far_device import DEVICES, on
from taxolens.hooks.activations import cache_reader, cache_writer, filling
from taxolens.hooks.activations.cache import ActivationCache
from taxolens.hooks.activations.extract import Extraction
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.images.raw import Limits
from taxolens.hooks.images.source import ImageSource
from taxolens.hooks.models.load import from_module
from taxolens.registry.errors import ConfigError, DataError, UnknownNameError
from taxolens.registry.files import only_writer
from tiny_images import hf_dataset, noise
from tiny_models import tiny_model
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
CORRUPT = (0, 7)
N = 11


def vision_model(seed=0, device="cpu"):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return from_module(tiny_model("dinov2", seed=seed).to(device), processor=processor)


@pytest.fixture(scope="module")
def model():
    return vision_model()


@pytest.fixture(scope="module")
def images():
    return load_images(hf_dataset(N, corrupt=CORRUPT, draw=noise))


def build(model, images, path=None, hooks=HOOKS, **options):
    settings = {"batch_size": 2, "max_corrupt_share": 0.5, "progress": False}
    return ActivationCache.build(model, images, hooks, path=path, **{**settings, **options})


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.npy"))}


class Killed(BaseException):
    """What `kill -9` does: nothing after it runs."""


def kill_in_batch(monkeypatch, number, *, commit=True):
    """Die after half of a batch is written, with every batch before it committed, or none."""
    monkeypatch.setattr(filling, "COMMIT_SECONDS", 0.0 if commit else 1e9)
    monkeypatch.setattr(cache_writer.CacheWriter, "__exit__", lambda *_: None)
    append, calls = cache_writer._Column.append, iter(range(1_000_000))

    def dying(self, rows):
        append(self, rows)
        if next(calls) == 4 * number + 2:  # of four columns: labels, indices, two hook points
            raise Killed

    monkeypatch.setattr(cache_writer._Column, "append", dying)


def test_one_forward_pass_for_all_hook_points(model, images, tmp_path, monkeypatch):
    passes = []
    call = filling.extract

    def counting(extractors, batch):
        passes.append(len(batch))
        return call(extractors, batch)

    monkeypatch.setattr(filling, "extract", counting)
    cache = build(model, images, tmp_path, tokens="patch", mean_patch=True)
    assert sum(passes) == N - len(CORRUPT) and len(passes) == 6
    assert cache.complete and len(cache) == N - len(CORRUPT)
    assert cache.hook_names == HOOKS
    for name in HOOKS:
        x = cache.activations(name)
        assert x.shape == (9, 16, 16) and x.dtype == np.float32
        assert isinstance(x, np.memmap) and not x.flags.writeable
        assert np.allclose(cache.mean_patch(name), x.mean(axis=1), atol=1e-5)
    assert cache.indices.tolist() == [i for i in range(N) if i not in CORRUPT]
    assert cache.labels.tolist() == [i % 3 for i in cache.indices]
    assert cache.class_names == ["ant", "bee", "cat"]
    assert sorted(cache.failures) == list(CORRUPT)
    assert cache.failures[7].startswith("7.png: cannot identify")


TOGETHER = {
    "class": Extraction(HOOKS, mean_patch=True),
    "patch": Extraction(HOOKS[1:], tokens="patch"),
    "mean": Extraction(HOOKS[:1], tokens="mean_patch", dtype="float16"),
}


def build_together(model, images, folder, names=tuple(TOGETHER)):
    source = ImageSource(batch_size=2, max_corrupt_share=0.5)
    wanted = {folder / name: TOGETHER[name] for name in names}
    return ActivationCache.build_together(model, images, wanted, source=source, progress=False)


def all_contents(folder):
    return {name: contents(folder / name) for name in TOGETHER}


@pytest.fixture(scope="module")
def one_by_one(model, images, tmp_path_factory):
    """What each of them has in a run of the images of its own."""
    folder = tmp_path_factory.mktemp("one_by_one")
    for name, extraction in TOGETHER.items():
        build(model, images, folder / name, hooks=extraction)
    return all_contents(folder)


def test_several_caches_from_the_same_forward_passes(
    model, images, one_by_one, tmp_path, monkeypatch
):
    passes = []
    call = filling.extract

    def counting(extractors, batch):
        passes.append(len(extractors))
        return call(extractors, batch)

    monkeypatch.setattr(filling, "extract", counting)
    caches = build_together(model, images, tmp_path)
    assert passes == [3] * 6 and all_contents(tmp_path) == one_by_one
    assert [cache.facts["tokens"] for cache in caches] == ["class", "patch", "mean_patch"]
    assert [sorted(cache.failures) for cache in caches] == [list(CORRUPT)] * 3
    build_together(model, images, tmp_path)  # finished ones are used as they are
    assert len(passes) == 6


@pytest.mark.parametrize("number", [0, 3, 7, 12])
def test_caches_filled_together_can_be_killed_at_any_commit(
    model, images, one_by_one, tmp_path, monkeypatch, number
):
    monkeypatch.setattr(filling, "COMMIT_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        commit, calls = cache_writer.CacheWriter.commit, iter(range(1_000_000))

        def dying(self, complete=False):
            if next(calls) == number:
                raise Killed
            commit(self, complete)

        patch.setattr(cache_writer.CacheWriter, "commit", dying)
        patch.setattr(cache_writer.CacheWriter, "__exit__", lambda *_: None)
        build_together(model, images, tmp_path)
    build_together(model, images, tmp_path, names=("patch",))
    build_together(model, images, tmp_path)
    assert all_contents(tmp_path) == one_by_one


@pytest.mark.parametrize("device", DEVICES)
def test_two_caches_are_equal_to_the_bit_and_close_to_that_of_the_cpu(
    model, images, tmp_path, device
):
    how = {"tokens": "patch", "mean_patch": True}
    expected = build(model, images, tmp_path / "expected", **how)
    there = vision_model(device=device)
    with on(device):
        one, _ = (build(there, images, tmp_path / name, **how) for name in ("one", "other"))
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    for hook in HOOKS:
        found, wanted = one.activations(hook), expected.activations(hook)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_opened_again(model, images, tmp_path):
    built = build(model, images, tmp_path)
    opened = ActivationCache.open(tmp_path)
    for name in HOOKS:
        assert np.array_equal(built.activations(name), opened.activations(name))
        assert opened.activations(name).shape == (9, 1, 16)
        assert opened.mean_patch(name) is None
    assert opened.failures == built.failures and opened.facts == built.facts
    raw = np.load(tmp_path / f"{HOOKS[0]}.npy")
    assert np.array_equal(raw, opened.activations(HOOKS[0]))


@pytest.mark.parametrize("batch", [0, 1, 4])
@pytest.mark.parametrize("commit", [True, False])
def test_resumed_after_a_kill_it_is_the_same_to_the_byte(
    model, images, tmp_path, monkeypatch, batch, commit
):
    build(model, images, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_batch(patch, batch, commit=commit)
        build(model, images, tmp_path / "killed")
    if batch and commit:
        unfinished = ActivationCache.open(tmp_path / "killed")
        assert not unfinished.complete and 0 < len(unfinished) < 9
        assert unfinished.activations(HOOKS[0]).shape == (len(unfinished), 1, 16)
    finished = build(model, images, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(finished.failures) == list(CORRUPT)


def test_an_interrupt_keeps_what_is_done(model, images, tmp_path, monkeypatch):
    call = filling.extract

    def interrupted(extractors, batch):
        if 5 in batch.indices.tolist():
            raise KeyboardInterrupt
        return call(extractors, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(filling, "extract", interrupted)
        build(model, images, tmp_path)
    assert ActivationCache.open(tmp_path).indices.tolist() == [1, 2, 3]
    assert build(model, images, tmp_path).indices.tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10]


def test_a_finished_cache_is_used_as_it_is(model, images, tmp_path, monkeypatch):
    build(model, images, tmp_path, mean_patch=True)

    def fail(*_):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(filling, "extract", fail)
    build(model, images, tmp_path)
    assert build(model, images, tmp_path, hooks=HOOKS[1:]).hook_names == HOOKS


def test_an_unfinished_cache_is_finished_with_all_its_hook_points(
    model, images, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_batch(patch, 2)
        build(model, images, tmp_path / "killed")
    cache = build(model, images, tmp_path / "killed", hooks=HOOKS[:1])
    assert cache.hook_names == HOOKS
    build(model, images, tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": "patch"}, "tokens: 'class' there, 'patch' wanted"),
        ({"dtype": "float16"}, "dtype: 'float32' there, 'float16' wanted"),
        ({"image_size": 48}, "preprocessing: "),
        ({"hooks": [*HOOKS, "blocks.0.hook_resid_pre"]}, "hook_names: "),
        ({"mean_patch": True}, "mean_patch: False there, True wanted"),
        ({"autocast": True}, "autocast: False there, True wanted"),
    ],
)
def test_other_activations_are_refused(model, images, tmp_path_factory, change, message):
    path = tmp_path_factory.getbasetemp() / "shared_cache"
    build(model, images, path)
    with pytest.raises(ConfigError, match=f"(?s)other activations: .*{message}"):
        build(model, images, path, **change)


def test_another_model_or_other_images_are_refused(model, images, tmp_path):
    build(model, images, tmp_path)
    with pytest.raises(ConfigError, match="other activations: model: "):
        build(vision_model(seed=1), images, tmp_path)
    with pytest.raises(ConfigError, match="other activations: images: "):
        build(model, load_images(hf_dataset(N, draw=noise)), tmp_path)


@pytest.mark.parametrize(("dtype", "stored"), [("float16", np.float16), ("bfloat16", np.float32)])
def test_dtypes(model, images, tmp_path, dtype, stored):
    cache = build(model, images, tmp_path, dtype=dtype)
    x = cache.activations(HOOKS[0])
    assert x.dtype == stored
    exact = build(model, images).activations(HOOKS[0])
    assert np.allclose(x, exact, atol=0.05) and not np.array_equal(x, exact)
    if dtype == "bfloat16":
        values = torch.from_numpy(np.array(x))
        assert torch.equal(values, values.bfloat16().float())


def test_batches_in_any_order(model, images):
    cache = build(model, images)
    x = torch.from_numpy(np.array(cache.activations(HOOKS[1])))
    batches = list(cache.iter_batches(HOOKS[1], 4))
    assert [len(batch[0]) for batch in batches] == [4, 4, 1]
    assert torch.equal(torch.cat([batch[0] for batch in batches]), x)
    order = np.array([8, 0, 3, 3, 1])
    batches = list(cache.iter_batches(HOOKS[1], 2, order))
    assert torch.equal(torch.cat([batch[0] for batch in batches]), x[order])
    assert torch.equal(
        torch.cat([batch[2] for batch in batches]), torch.from_numpy(cache.indices[order])
    )
    assert torch.cat([batch[1] for batch in batches]).tolist() == cache.labels[order].tolist()
    half = build(model, images, dtype="float16")
    assert next(half.iter_batches(HOOKS[0], 3))[0].dtype == torch.float32


def test_a_temporary_cache_goes_with_its_object(model, images):
    cache = build(model, images)
    path = cache.path
    assert path.exists() and len(cache) == 9
    del cache
    assert not path.exists()


def test_mean_patch_as_the_tokens_themselves(model, images):
    means = build(model, images, tokens="mean_patch", mean_patch=True)
    both = build(model, images, tokens="class", mean_patch=True)
    for name in HOOKS:
        assert means.mean_patch(name).shape == (9, 16)
        assert np.array_equal(means.mean_patch(name), both.mean_patch(name))
        assert np.array_equal(means.activations(name)[:, 0], means.mean_patch(name))


def test_streamed_images(model, images):
    streamed = load_images(hf_dataset(N, corrupt=CORRUPT, draw=noise).to_iterable_dataset())
    cache, expected = build(model, streamed), build(model, images)
    for name in HOOKS:
        assert np.array_equal(cache.activations(name), expected.activations(name))
    assert cache.labels.tolist() == expected.labels.tolist()


def test_a_full_disk_is_seen_before_the_work(model, images, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(2000, 1000, 1000))
        with pytest.raises(
            DataError, match=r"1,000 bytes are free.*need 1,584 bytes, 1,584 of them"
        ):
            build(model, images, tmp_path)  # 11 images x (2 hook points x 16 x 4 bytes + 2 x 8)
    assert not list(tmp_path.glob("*.npy"))


def test_the_disk_must_hold_all_caches_that_are_filled_together(
    model, images, tmp_path, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(20000, 7000, 13000))
    # an image: 2 x 2 x 16 x 4 + 16 bytes of the class, 16 x 16 x 4 + 16 of the patches
    with pytest.raises(DataError, match=r"13,000 bytes are free.*need 14,432 bytes"):
        build_together(model, images, tmp_path)


def test_a_disk_that_fills_in_between_loses_nothing(model, images, tmp_path, monkeypatch):
    append, calls = cache_writer._Column.append, iter(range(1000))

    def full(self, rows):
        if next(calls) == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer._Column, "append", full)
        with pytest.raises(DataError, match=r"the disk is full.*what is done is kept"):
            build(model, images, tmp_path / "full")
    assert len(ActivationCache.open(tmp_path / "full")) == 3
    build(model, images, tmp_path / "full")
    build(model, images, tmp_path / "whole")
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_another_process_writing_is_seen(model, images, tmp_path):
    with (
        only_writer(tmp_path, "cache"),
        pytest.raises(ConfigError, match="another process is writing there"),
    ):
        build(model, images, tmp_path)


def test_damage_is_seen(model, images, tmp_path):
    with pytest.raises(ConfigError, match=r"no cache\.json in"):
        ActivationCache.open(tmp_path)
    build(model, images, tmp_path)
    file = tmp_path / f"{HOOKS[0]}.npy"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"hook_resid_post\.npy cannot be read"):
        ActivationCache.open(tmp_path).activations(HOOKS[0])
    index = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(
        json.dumps({**index, "complete": False, "n_seen": 9, "n_rows": 8})
    )
    with pytest.raises(DataError, match=r"shorter than cache\.json says"):
        build(model, images, tmp_path)
    (tmp_path / "cache.json").write_text("{torn")
    with pytest.raises(DataError, match="cannot be read"):
        ActivationCache.open(tmp_path)
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(DataError, match="is of another schema"):
        ActivationCache.open(tmp_path)


def test_unknown_hook_points_list_the_nearest(model, images):
    cache = build(model, images)
    with pytest.raises(UnknownNameError, match=r"did you mean 'blocks\.1\.hook_resid_post'"):
        cache.activations("blocks.11.hook_resid_post")


def test_nothing_readable(model, tmp_path):
    images = load_images(hf_dataset(4, corrupt=range(4)))
    with pytest.raises(DataError, match="not one image can be read: image 0"):
        build(model, images, tmp_path)


def test_progress_tells_images_per_second(model, images, capsys):
    build(model, images, progress=True)
    assert "11/11" in capsys.readouterr().err


def test_names_that_are_no_file_names(tmp_path):
    assert cache_reader.file_of(tmp_path, "a/b.c d").name == "a_b.c_d.npy"


def test_a_finished_cache_has_as_few_corrupt_images_as_asked_for(model, tmp_path, caplog):
    """As a folder that is filled anew, with the same error; where they are few enough, they are named."""
    images = load_images(hf_dataset(30, corrupt=range(6), draw=noise))
    cache = build(model, images, tmp_path / "acts", max_corrupt_share=0.5)
    caplog.clear()
    again = build(model, images, tmp_path / "acts", max_corrupt_share=0.2)
    assert len(again) == len(cache) == 24
    assert caplog.text.count("6 corrupt image(s) are left out: image 0 (") == 1
    for folder in ("acts", "anew"):
        with pytest.raises(DataError, match=r"max_corrupt_share: .* are corrupt: image 0 \("):
            build(model, images, tmp_path / folder, max_corrupt_share=0.1)


def files_of_images(folder, **limits):
    """Three images of 8 x 8, and one of 20 x 20 pixels."""
    for number, edge in enumerate((8, 20, 8, 8)):
        place = folder / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        noise(number).resize((edge, edge)).save(place)
    return load_images(folder, **limits)


@pytest.mark.parametrize("killed", [False, True])
def test_images_left_out_for_a_limit_are_refused_where_it_is_another(
    model, tmp_path, monkeypatch, killed
):
    small = files_of_images(tmp_path / "images", max_image_pixels=100)
    if killed:
        with monkeypatch.context() as patched:
            kill_in_batch(patched, 2)  # the last but one appends nothing
            with pytest.raises(Killed):
                build(model, small, tmp_path / "acts", batch_size=1)
    else:
        assert len(build(model, small, tmp_path / "acts")) == 3
    large = files_of_images(tmp_path / "images")
    with pytest.raises(ConfigError, match=r"image 2 was left out .*max_image_pixels=64000000"):
        build(model, large, tmp_path / "acts")
    for limit in (100, 399):  # of 20 x 20 pixels both leave it out
        images = files_of_images(tmp_path / "images", max_image_pixels=limit)
        assert len(build(model, images, tmp_path / "acts")) == 3
    assert len(build(model, large, tmp_path / "anew")) == 4
    assert len(build(model, small, tmp_path / "anew")) == 4  # a lower limit takes nothing out


def test_addresses_left_out_are_refused_where_they_are_fetched():
    text = "http://example.com/a.png: cannot be opened: an address, which only remote_images=True fetches"
    assert not Limits().would_admit(text) and Limits(remote_images=True).would_admit(text)
    assert not Limits(remote_images=True).would_admit("a.png: image file is truncated")
