"""The fuzz of every reader of files, with few examples; it finds what a reader does not catch."""

from pathlib import Path

import fuzz
import pytest
from taxolens.registry.errors import DataError

NAMES = ("sae", "weights", "results", "checkpoint", "cache", "tree", "csv", "study", "config")
NAMES += ("image", "preprocessor", "run", "pickle", "position", "coco", "labels")


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, fuzz.readers(folder)


def test_every_reader_has_its_test(readers):
    assert set(readers[1]) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_any_content_is_read_or_refused(name, readers):
    folder, every = readers
    counts = fuzz.fuzz(name, every[name], folder / name, 60)
    assert counts["refused"] > 0


def test_what_is_not_caught_is_found(tmp_path):
    def read(folder: Path) -> None:
        content = (folder / "f").read_bytes()
        if not content.startswith(b"{"):
            raise DataError("f", "no object")
        if b'"a": 7' not in content:
            raise KeyError("a")

    with pytest.raises(KeyError):
        fuzz.fuzz("x", fuzz.Reader("f", {"a": 7}, read), tmp_path, 60)


def test_a_run_in_miniature(capsys):
    assert fuzz.main(["--examples", "20", "--readers", "csv", "tree"]) == 0
    assert "| csv |" in capsys.readouterr().out
