"""Caches that the ranks of a job have written in parts: equal to that of one process, to the bit."""

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
import taxolens  # noqa: F401  (registers the families)
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rank_threads import on_ranks
from taxolens.hooks.activations import cache_writer, division, filling
from taxolens.hooks.activations.cache import ActivationCache
from taxolens.hooks.activations.extract import Extraction
from taxolens.hooks.activations.joined_rows import JoinedRows
from taxolens.hooks.activations.stream import ActivationStream
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.images.loader import ImageLoader
from taxolens.hooks.images.preprocess import preprocess_for
from taxolens.hooks.images.source import ImageSource
from taxolens.hooks.models.load import from_module
from taxolens.registry.errors import ConfigError, DataError, LostRankError
from taxolens.registry.files import only_writer
from taxolens.registry.ranks import Ranks
from tiny_images import hf_dataset, noise
from tiny_models import tiny_model
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
CORRUPT = (0, 7, 12, 13)  # the last two are one forward pass
N = 23
ALONE = Ranks()


def vision_model(seed=0):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return from_module(tiny_model("dinov2", seed=seed), processor=processor)


MODELS = [vision_model() for _ in range(3)]  # of each thread its own, since hooks are on the model


def images_of(kind="list", corrupt=CORRUPT, n=N):
    """The same images by index, as a stream, and as a stream of that many shards."""
    data = hf_dataset(n, corrupt=corrupt, draw=noise)
    if kind == "list":
        return load_images(data)
    return load_images(data.to_iterable_dataset(num_shards=kind))


def build(path, ranks=ALONE, images="list", hooks=HOOKS, **options):
    settings = {"batch_size": 2, "max_corrupt_share": 0.5, "progress": False, "mean_patch": True}
    if isinstance(images, str | int):
        images = images_of(images)
    return ActivationCache.build(
        MODELS[ranks.rank], images, hooks, path=path, ranks=ranks, **{**settings, **options}
    )


def build_on(size, path, **options):
    """The cache of each rank; raises the first error that is not of a lost rank."""
    found = on_ranks(size, lambda ranks: build(path, ranks, **options))
    errors = [each for each in found if isinstance(each, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, LostRankError)):
        raise error
    return found


def contents(cache):
    """All that a cache holds."""
    found = {name: np.asarray(cache.activations(name)).tobytes() for name in HOOKS}
    found |= {f"{name} mean": np.asarray(cache.mean_patch(name)).tobytes() for name in HOOKS}
    facts = (cache.facts, cache.class_names, cache.failures, cache.complete, len(cache))
    return found, cache.labels.tolist(), cache.indices.tolist(), facts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process makes of the images by index."""
    return contents(build(tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("batches", [1, 4])
def test_ranks_make_the_cache_of_one_process(whole, tmp_path, monkeypatch, size, batches):
    monkeypatch.setattr(filling, "images_in_part", lambda *_: 2 * batches)
    caches = build_on(size, tmp_path)
    assert all(contents(cache) == whole for cache in caches)
    assert contents(ActivationCache.open(tmp_path)) == whole
    parts = sorted(folder.name for folder in tmp_path.iterdir() if folder.is_dir())
    assert parts == [f"part-{i:05}" for i in range(-(-N // (2 * batches)))]
    indices = [json.loads((tmp_path / part / "cache.json").read_text()) for part in parts]
    assert sum(index["n_seen"] for index in indices) == N
    assert not list(tmp_path.rglob(".lock"))


def test_each_image_runs_through_the_model_once(tmp_path, monkeypatch):
    passes = []
    call = filling.extract

    def counting(extractors, batch):
        passes.append((threading.current_thread().name, tuple(batch.indices.tolist())))
        return call(extractors, batch)

    monkeypatch.setattr(filling, "extract", counting)
    build_on(2, tmp_path)
    assert sorted(images for _, images in passes) == sorted(
        tuple(i for i in pair if i not in CORRUPT and i < N)
        for pair in ((i, i + 1) for i in range(0, N, 2))
        if set(pair) != {12, 13}
    )
    assert {name for name, _ in passes} == {"rank 0", "rank 1"}
    build_on(3, tmp_path)  # a finished one is used as it is
    build(tmp_path)
    assert len(passes) == 11


@pytest.mark.parametrize(
    ("shards", "size", "message", "n_parts"),
    [
        (4, 2, "4 shards of a stream in 4 parts", 4),
        (1, 2, r"1 shard\(s\) of a stream by rows, 32 images a part", 1),
        (2, 3, r"2 shard\(s\) of a stream by rows, 32 images a part", 2),
    ],
)
def test_streams_are_divided_by_shards_or_rows(tmp_path, caplog, shards, size, message, n_parts):
    caplog.set_level(logging.INFO)
    expected = contents(build(tmp_path / "one", images=shards))
    for cache in build_on(size, tmp_path / "parts", images=shards):
        assert contents(cache) == expected
    assert re.search(f"{size} ranks; {message}", caplog.text), caplog.text
    index = json.loads((tmp_path / "parts" / "cache.json").read_text())
    assert index["n_parts"] == n_parts and index["complete"]


def test_rows_of_a_stream_are_shared(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(division, "STREAM_BATCHES", 2)
    cache = build_on(3, tmp_path, images=1)[0]
    assert json.loads((tmp_path / "cache.json").read_text())["n_parts"] == 6
    for name in HOOKS:
        assert np.asarray(cache.activations(name)).tobytes() == whole[0][name]


class Killed(BaseException):
    """What `kill -9` does: nothing after it runs."""


def kill(monkeypatch, after, *, all_ranks):
    """The rank that comes to forward pass number `after` of all dies with half of it written, or then all ranks."""
    monkeypatch.setattr(filling, "COMMIT_SECONDS", 0.0)
    leave, append = cache_writer.CacheWriter.__exit__, cache_writer._Column.append
    lock, n_columns, killed = threading.Lock(), Counter(), []

    def exit_unless_killed(self, kind, *more):
        if kind is not Killed:
            leave(self, kind, *more)

    def dying(self, rows):
        append(self, rows)
        with lock:
            rank = threading.current_thread().name
            n_columns[rank] += 1
            n_columns["half"] += (
                n_columns[rank] % 6 == 3
            )  # of labels, indices, and four of hook points
            if (killed and all_ranks) or (n_columns["half"] > after and not killed):
                killed.append(rank)
                raise Killed

    monkeypatch.setattr(cache_writer.CacheWriter, "__exit__", exit_unless_killed)
    monkeypatch.setattr(cache_writer._Column, "append", dying)


@pytest.mark.parametrize("after", [0, 3, 8])
@pytest.mark.parametrize("all_ranks", [False, True])
@pytest.mark.parametrize(("images", "first"), [("list", 2), (4, 2), (2, 3)])
def test_killed_and_resumed_by_another_number(
    tmp_path, monkeypatch, images, first, all_ranks, after
):
    monkeypatch.setattr(division, "STREAM_BATCHES", 2)
    monkeypatch.setattr(filling, "images_in_part", in_larger_parts)
    expected = contents(build(tmp_path / "one", images=images))
    with monkeypatch.context() as patch:
        kill(patch, after, all_ranks=all_ranks)
        found = on_ranks(first, lambda ranks: build(tmp_path / "killed", ranks, images=images))
    assert any(isinstance(each, Killed) for each in found)
    for size in (1, 2, 3):
        path = shutil.copytree(tmp_path / "killed", tmp_path / f"then {size}")
        assert not json.loads((path / "cache.json").read_text())["complete"]
        unfinished = ActivationCache.open(path)
        assert not unfinished.complete and len(unfinished) < N - len(CORRUPT)
        caches = [build(path, images=images)] if size == 1 else build_on(size, path, images=images)
        assert all(contents(cache) == expected for cache in caches)


def in_larger_parts(images, batch_size, n_ranks):
    found = division.images_in_part(images, batch_size, n_ranks)
    return 6 if found == 2 else found


def test_an_unfinished_cache_of_one_process_is_finished_by_rank_0(
    whole, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, 4, all_ranks=True)
        build(tmp_path)
    assert all(contents(cache) == whole for cache in build_on(2, tmp_path))
    assert "finished by rank 0 alone" in caplog.text and not list(tmp_path.glob("part-*"))
    assert all(contents(cache) == whole for cache in build_on(3, tmp_path))


def test_corrupt_images_are_judged_over_all_ranks(tmp_path):
    images = images_of(n=60, corrupt=(3, 5, 40, 41, 42, 59))
    caches = build_on(3, tmp_path, images=images, max_corrupt_share=0.1)
    assert sorted(caches[1].failures) == [3, 5, 40, 41, 42, 59] and len(caches[2]) == 54
    again = tmp_path / "again"
    with pytest.raises(DataError, match=r"6 of the 60 images read .* and 1 more; given 0\.09"):
        build_on(3, again, images=images, max_corrupt_share=0.09)
    assert not ActivationCache.open(again).complete
    assert len(build(again, images=images, max_corrupt_share=0.1)) == 54


@pytest.mark.parametrize(("n_ranks", "stops"), [(1, True), (2, False)])
def test_before_the_end_the_images_of_other_ranks_count_as_readable(n_ranks, stops):
    images = images_of(n=60, corrupt=range(20))  # a third, and all of those that come first
    preprocess = preprocess_for(MODELS[0])
    loader = ImageLoader(images, preprocess, batch_size=5, max_corrupt_share=0.4, n_ranks=n_ranks)
    if stops:
        with pytest.raises(DataError, match="20 of the 20 images read so far"):
            list(loader.batches(range(60)))
    else:
        assert sum(map(len, loader.batches(range(60)))) == 40


def test_ranks_fill_several_caches_from_the_same_forward_passes(tmp_path, monkeypatch):
    kinds = {"class": Extraction(HOOKS, mean_patch=True), "patch": Extraction(HOOKS, "patch")}
    passes, call = [], filling.extract

    def counting(extractors, batch):
        passes.append(len(extractors))
        return call(extractors, batch)

    monkeypatch.setattr(filling, "extract", counting)

    def together(ranks):
        wanted = {tmp_path / name: kind for name, kind in kinds.items()}
        source = ImageSource(batch_size=2, max_corrupt_share=0.5)
        return ActivationCache.build_together(
            MODELS[ranks.rank], images_of(), wanted, source=source, progress=False, ranks=ranks
        )

    found = on_ranks(2, together)
    assert passes == [2] * 11
    for caches in found:
        for cache, (name, kind) in zip(caches, kinds.items(), strict=True):
            alone = build(tmp_path / f"alone_{name}", hooks=kind, mean_patch=kind.mean_patch)
            assert cache.is_parted and cache.facts == alone.facts
            for hook in HOOKS:
                assert np.array_equal(cache.activations(hook), alone.activations(hook))


def test_nothing_readable(tmp_path):
    with pytest.raises(DataError, match="not one image can be read: image 0"):
        build_on(2, tmp_path, images=images_of(n=8, corrupt=range(8)))


def test_the_error_of_a_rank_ends_the_others(tmp_path, monkeypatch):
    call = filling.extract

    def failing(extractors, batch):
        if 10 in batch.indices.tolist():
            raise DataError("hook point", "it is NaN")
        return call(extractors, batch)

    with monkeypatch.context() as patch:
        patch.setattr(filling, "extract", failing)
        found = on_ranks(3, lambda ranks: build(tmp_path, ranks))
    assert sorted(type(each).__name__ for each in found) == [
        "DataError",
        "LostRankError",
        "LostRankError",
    ]
    lost = [str(each) for each in found if isinstance(each, LostRankError)]
    assert all(": failed: hook point: it is NaN" in text for text in lost)
    assert len(build_on(2, tmp_path)[0]) == N - len(CORRUPT)


def test_ranks_of_different_models_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "MODELS", [MODELS[0], vision_model(seed=1)])
    with pytest.raises(ConfigError, match=r"model: rank \d has another one than rank \d"):
        build_on(2, tmp_path)


def test_several_ranks_need_a_folder():
    with pytest.raises(ConfigError, match="path: several processes need one folder"):
        build_on(2, None)


def test_another_job_in_the_same_folder_is_seen(tmp_path):
    with (
        only_writer(tmp_path, "cache"),
        pytest.raises(ConfigError, match="another process is writing there"),
    ):
        build_on(2, tmp_path)


def test_a_full_disk_is_seen_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(9000, 4000, 5000))
        with pytest.raises(DataError, match=r"5,000 bytes are free.*need 6,256 bytes"):
            build_on(2, tmp_path)  # 23 images x (2 hook points x 2 x 16 x 4 bytes + 2 x 8)
    append, calls = cache_writer._Column.append, iter(range(1000))

    def full(self, rows):
        if next(calls) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer._Column, "append", full)
        with pytest.raises(DataError, match=r"the disk is full.*what is done is kept"):
            build_on(2, tmp_path)
    assert build_on(2, tmp_path)[0].complete


def test_damage_is_seen(tmp_path):
    build_on(2, tmp_path)
    part = tmp_path / "part-00003"
    file = part / f"{HOOKS[0]}.npy"
    saved = file.read_bytes()
    file.write_bytes(saved[:-10])
    with pytest.raises(
        DataError, match=r"part-00003: .*hook_resid_post\.npy has 0 rows and should have 1"
    ):
        ActivationCache.open(tmp_path).activations(HOOKS[0])
    file.write_bytes(saved.replace(b"f4", b"f8"))
    with pytest.raises(DataError, match="cannot be read: not rows of float32 or float16"):
        ActivationCache.open(tmp_path).activations(HOOKS[0])
    index = json.loads((part / "cache.json").read_text())
    (part / "cache.json").write_text(json.dumps({**index, "complete": False}))
    with pytest.raises(DataError, match="part-00003 is not complete, or one of another cache"):
        ActivationCache.open(tmp_path)
    shutil.rmtree(part)
    with pytest.raises(DataError, match=r"part-00003 is not there, or has no cache\.json"):
        build(tmp_path)


def test_many_parts_need_few_open_files(tmp_path):
    build_on(2, tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    cache = ActivationCache.open(tmp_path)
    held = [cache.joined(name) for name in HOOKS]
    assert len(os.listdir("/proc/self/fd")) <= before and len(held) == 2


@pytest.mark.parametrize("tokens", ["patch", "mean_patch"])
def test_training_reads_parts_as_one_cache(tmp_path, tokens, monkeypatch):
    monkeypatch.setattr("taxolens.hooks.activations.token_sources.GATHERED_BYTES", 3000)
    caches = [
        build(tmp_path / "one", tokens="patch"),
        build_on(2, tmp_path / "parts", tokens="patch")[0],
    ]
    options = {"tokens": tokens, "train_batch_size_tokens": 10, "seed": 5}
    streams = [ActivationStream(None, None, HOOKS, cache=cache, **options) for cache in caches]
    assert streams[0].describe() == streams[1].describe()
    for _ in range(70):
        one, parts = (next(stream) for stream in streams)
        assert all(torch.equal(one[name], parts[name]) for name in HOOKS)
    order = np.array([8, 0, 3, 3, 17])
    one, parts = (list(cache.iter_batches(HOOKS[1], 2, order)) for cache in caches)
    assert all(torch.equal(a, b) for x, y in zip(one, parts) for a, b in zip(x, y))
    assert torch.equal(*(cache.tensor(HOOKS[0]) for cache in caches))


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_cache_parts as test
from taxolens.registry.ranks import Ranks

ranks = Ranks.here()
call, passes = test.filling.extract, []

def counted(extractors, batch):
    passes.append(ranks.add("passes"))
    if passes[-1] == 11 + 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(extractors, batch)

test.filling.extract = counted
with ranks.joined():
    cache = test.build("whole", Ranks.here())
    assert ranks.gather(len(cache)) == [19] * ranks.size
    assert ranks.add("passes", 0) == 11 and sum(ranks.gather(len(passes))) == 11
    test.build("killed", Ranks.here())
"""


def test_processes_of_torchrun_of_which_one_is_killed(whole, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr
    assert contents(ActivationCache.open(tmp_path / "whole")) == whole
    assert not ActivationCache.open(tmp_path / "killed").complete
    assert contents(build(tmp_path / "killed")) == whole


# Division -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 10**7), batch_size=st.sampled_from([1, 2, 32, 64]))
def test_parts_are_whole_batches_and_not_too_many(n, batch_size):
    class Images:
        is_streaming = False
        n_at_most = n

    found = division.images_in_part(Images(), batch_size, 2)
    n_batches, n_parts = -(-n // batch_size), -(-n // found)
    assert found % batch_size == 0
    assert min(n_batches, 32) <= n_parts <= 512


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400))
def test_groups_of_shards_are_all_shards_in_order(n):
    class Images:
        n_shards = n

    groups = division.shard_groups(Images())
    assert [shard for group in groups for shard in group] == list(range(n))
    assert len(groups) == min(n, division.SHARD_GROUPS)
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1


# Rows of several tensors --------------------------------------------------------------------------

PARTS = st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any)


@settings(max_examples=200, deadline=None)
@given(PARTS, st.sampled_from(["float32", "float16"]), st.data())
def test_joined_rows_index_as_numpy_does(sizes, dtype, data):
    n = sum(sizes)
    whole = np.arange(n * 6, dtype=dtype).reshape(n, 3, 2)
    ends = np.cumsum(sizes)
    rows = JoinedRows([torch.from_numpy(p.copy()) for p in np.split(whole, ends[:-1])])
    assert rows.shape == whole.shape and rows.dtype == whole.dtype and len(rows) == n
    number = st.integers(-n, n - 1)
    index = data.draw(
        st.one_of(
            number,
            st.slices(n),
            arrays.arrays(np.int64, arrays.array_shapes(max_dims=2, min_side=0), elements=number),
            arrays.arrays(bool, n),
            st.lists(number),
        )
    )
    behind = data.draw(
        st.sampled_from([(), (0,), (slice(1, 3),), (slice(None), -1), (..., 1), (None,)])
    )
    if isinstance(index, list):
        index = np.array(index, dtype=int)
    expected = whole[(index, *behind)]
    found = np.asarray(rows[(index, *behind)])
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert np.array_equal(found, expected)
    assert np.array_equal(rows[:, 1], whole[:, 1]) and isinstance(rows[:, 1], JoinedRows)
    assert np.array_equal(rows.flatten(), whole.reshape(-1, 2))
    assert torch.equal(rows.tensor(), torch.from_numpy(whole))
    ascending = np.sort(data.draw(arrays.arrays(np.int64, 7, elements=st.integers(0, n - 1))))
    assert np.array_equal(rows.gather(torch.from_numpy(ascending)).numpy(), whole[ascending])


@pytest.mark.parametrize("index", [5, -6, [0, 5], [True, False], "a", 0.5, (0, [1])])
def test_joined_rows_refuse_what_is_no_index(index):
    rows = JoinedRows([torch.zeros(3, 2), torch.zeros(2, 2)])
    with pytest.raises(IndexError):
        rows[index]
