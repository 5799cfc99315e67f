"""Byte-identical files are found, whatever they are called, and others of equal size are not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from taxolens.hooks.images import same_files as module
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.images.same_files import BLOCK, same_files
from tiny_images import class_folders, hf_dataset


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_comparison_of_every_pair(seed: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(seed)
    paths: list[str] = []
    for i in range(60):  # of few sizes and contents, so that some are alike; 0 is an empty file
        size = int(generator.choice([0, 3, BLOCK, 3 * BLOCK]))
        content = bytearray(size)
        if size:
            content[int(generator.choice([0, size // 2, size - 1]))] = int(generator.integers(2))
        (tmp_path / f"{i}").write_bytes(content)
        paths.append(str(tmp_path / f"{i}"))
    one, other = paths[:40], paths[40:]
    read = {path: Path(path).read_bytes() for path in paths}
    expected = {
        i for i, path in enumerate(other) if read[path] and any(read[path] == read[p] for p in one)
    }
    found = same_files(one, other)
    assert set(found) == expected and 0 < len(expected) < len(other)
    assert all(read[found[i]] == read[other[i]] for i in found)


def test_files_that_cannot_be_read_are_like_no_other(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").write_bytes(b"a")
    names = [str(tmp_path / "pipe"), str(tmp_path / "none"), str(tmp_path), "\0"]
    assert same_files([*names, str(tmp_path / "a")], [*names, str(tmp_path / "a")]) == {
        4: str(tmp_path / "a")
    }


def test_whole_files_are_read_only_where_size_and_middle_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(20):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 9)
    read: list[str] = []
    digest = module.files.file_digest
    monkeypatch.setattr(module.files, "file_digest", lambda p: read.append(p) or digest(p))
    paths = [str(tmp_path / f"{i}") for i in range(20)]
    assert not same_files(paths[:10], paths[10:]) and not read


def test_paths_of_images(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": [1, 2], "dog": [3]})
    images = load_images(tmp_path)
    found = images.files()
    assert found is not None and found == [str(tmp_path / images.source(i)) for i in range(3)]
    assert images.limited(1).files() == [found[int(images.limited(1).positions[0])]]
    assert load_images(hf_dataset(3)).files() is None
    assert load_images(tmp_path, streaming=True).files() is None
