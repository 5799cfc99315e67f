"""Reading of files that others wrote: regular, bounded, UTF-8, JSON and YAML of bounded depth."""

from __future__ import annotations

import csv
import json
import os
import stat
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from taxolens.registry import files
from taxolens.registry.errors import ConfigError, DataError
from taxolens.registry.files import UnreadableError
from taxolens.registry.taxonomies import load_taxonomy

ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (files.read_json, "[" * 20_000 + "]" * 20_000, "nested more than 200 deep"),
        (files.read_json, "[" * 202 + "]" * 202, "nested more than 200 deep"),
        (files.read_json, "9" * 5000, "not JSON"),
        (files.read_json, "9" * 30, "an integer of more than 64 bits"),
        (files.read_json, b"\xff\xfe{}", "not UTF-8"),
        (files.read_json, "", "not JSON"),
        (files.read_json, "[]," * 4_000_001, "lists and objects"),
        (files.read_json_object, "[]", "a JSON list where an object belongs"),
        (files.read_json_object, "null", "a JSON NoneType where an object belongs"),
        (files.read_yaml, ALIASES, "100,000 values or more, aliases expanded"),
        (files.read_yaml, MERGES, "100,000 values or more, aliases expanded"),
        (files.read_yaml, "a: &a [*a, *a]", "100,000 values or more, aliases expanded"),
        (files.read_yaml, "[" * 5000, "nested more than 200 deep"),
        (files.read_yaml, "a: !!int ''", "not YAML"),
        (files.read_yaml, "a: 2020-99-99", "not YAML"),
        (files.read_yaml, "a: !!python/object/apply:os.getpid []", "not YAML"),
        (files.read_yaml, "a: 1\n" * 250_000, "longer than 1,048,576 bytes"),
    ],
)
def test_what_is_refused(read, content, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UnreadableError, match=message):
        read(path)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "link", "/dev/zero", "a\0b", "\ud800"):
        with pytest.raises(UnreadableError, match=r"not a regular file|not a path"):
            files.read_bytes(path)
    with pytest.raises(FileNotFoundError):
        files.read_bytes(tmp_path / "nothing")


def test_the_bound_is_the_last_length_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert files.read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(UnreadableError, match="longer than 4 bytes"):
        files.read_bytes(tmp_path / "file", 4)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text()
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_what_json_writes_is_read_as_json_reads_it(content: object) -> None:
    assert files.parse_json(json.dumps(content)) == content


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.integers(0, 9) | st.sampled_from("abc"), st.lists, max_leaves=20))
def test_yaml_without_aliases_is_read_as_pyyaml_reads_it(content: object) -> None:
    path = Path("/dev/shm" if Path("/dev/shm").is_dir() else ".") / f"taxolens-{os.getpid()}.yaml"
    try:
        path.write_text(yaml.safe_dump(content))
        assert files.read_yaml(path) == content
    finally:
        path.unlink()


def test_aliases_in_moderation_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n")
    expected = {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}
    assert files.read_yaml(tmp_path / "a.yaml") == expected


def test_paths_in_files_stay_inside(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "own").symlink_to("a")
    for name in (
        "/etc/passwd",
        "../secret",
        "a/../../secret",
        "link",
        "a\0b",
        "x" * 5000,
    ):
        with pytest.raises(UnreadableError):
            files.inside(folder, name)
    for name in ("a/b.csv", "own/b.csv", "a/../c", "."):
        assert files.inside(folder, name) == folder / name
    (tmp_path / "alias").symlink_to(folder)
    assert files.inside(tmp_path / "alias", "a").is_dir()


def test_a_walk_follows_every_link_but_none_back_up(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "b" / "self").symlink_to(tmp_path / "a" / "b")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a" / "b")
    found = [os.path.relpath(folder, tmp_path) for folder, _, _ in files.walk_links(tmp_path)]
    assert found == [".", "a", "a/again", "a/b"]
    slashed = [os.path.relpath(f, tmp_path) for f, _, _ in files.walk_links(f"{tmp_path}/")]
    assert slashed == found


def test_links_that_multiply_are_refused(tmp_path: Path, monkeypatch) -> None:
    """Of 30 folders with two links each to the next one, 2**30 paths lead to the last."""
    monkeypatch.setattr(files, "MAX_PLACES", 40)
    for number in range(30):
        (tmp_path / "pool" / f"{number}").mkdir(parents=True)
        for name in "ab":
            (tmp_path / "pool" / f"{number}" / name).symlink_to(tmp_path / "pool" / f"{number + 1}")
    with pytest.raises(DataError, match=r"links lead to it from more than 40 places below"):
        list(files.walk_links(tmp_path / "pool" / "0"))


def test_written_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        file = files.write_atomically(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_full_disk_is_reported_with_the_path(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'a'}'"):
        files.write_atomically(tmp_path / "a", "x")


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    old = [".a.json.123-7f00.tmp", ".a.json.x1y2z3ab"]
    kept = [".a.json.original", ".a.json.backup-1", ".b.json.123-7f00.tmp", "a.json.123-7f00.tmp"]
    for name in [*old, *kept, ".a.json.124-7f00.tmp"]:
        (tmp_path / name).write_text("x")
        if not name.endswith("124-7f00.tmp"):  # this one may still be written
            os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    files.write_atomically(tmp_path / "a.json", "x")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*kept, ".a.json.124-7f00.tmp", "a.json"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0", "a\n", "x" * 201, "\x1b[2J"])
def test_no_file_name(name: str) -> None:
    assert not files.is_file_name(name)


def test_file_names() -> None:
    assert all(
        map(files.is_file_name, ["a", "blocks.0.hook", "päth", "a b", "図\u3000表", "x" * 200])
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


def in_parts(path: Path, **options: int) -> dict[str, object]:
    """The object that `stream_json` reads, put together again."""
    found: dict[str, object] = {}
    lists: set[str] = set()
    text = path.read_text(encoding="utf-8-sig")
    empty = {key for key, value in json.loads(text).items() if isinstance(value, list)}
    for key, value in files.stream_json(path, **options):
        if key in empty and key not in lists:
            assert value is None
            found[key] = []
            lists.add(key)
        elif key in lists:
            found[key].append(value)  # type: ignore[attr-defined]
        else:
            found[key] = value
    return found


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), st.integers(1, 9), st.booleans())
def test_an_object_read_in_parts_is_the_object(content, block: int, indented: bool) -> None:
    text = json.dumps(content, indent=2 if indented else None, ensure_ascii=False)
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.NamedTemporaryFile(suffix=".json") as file,
    ):
        patch.setattr(files, "BLOCK_BYTES", block)
        file.write(text.encode("utf-8", "replace"))
        file.flush()
        path = Path(file.name)
        assert in_parts(path, max_bytes=1 << 20) == json.loads(path.read_bytes())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "not a JSON object"),
        ("", "not a JSON object"),
        ("{", "not JSON"),
        ('{"a": [1, 2', "not JSON"),
        ('{"a": [1 2]}', "not JSON: '2' where ',' belongs"),
        ('{"a": 1} x', "not JSON: text after its end"),
        ('{1: "a"}', "a key that is no text"),
        ('{"a": ' + "[" * 20_000, "nested too deep|not JSON"),
        ('{"a": [' + "[" * 20_000, "nested too deep"),
        ('{"a": "' + "x" * 20_000_000 + '"}', "longer than 16,777,216 bytes"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_what_is_not_read_in_parts(content, message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UnreadableError, match=message):
        list(files.stream_json(path, 1 << 24))


def test_lines_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_bytes("﻿a\r\nb\nå".encode())
    assert list(files.read_lines(path, 100)) == ["a", "b", "å"]
    for content, most, message in (
        (b"x" * 2_000_000, 1 << 24, "a line of more than 1,048,576 characters"),
        (b"xx", 1, "longer than 1 bytes"),
        (b"\xff", 10, "not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(UnreadableError, match=message):
            list(files.read_lines(path, most))


def test_the_number_of_lines_and_of_values_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last file of each kind that is read, and the first that is not."""
    monkeypatch.setattr(files, "MAX_LINES", 3)
    monkeypatch.setattr(files, "MAX_STREAMED", 4)
    monkeypatch.setattr(files, "MAX_STREAMED_CONTAINERS", 3)
    monkeypatch.setattr(files, "MAX_STREAMED_COMMAS", 5)
    path = tmp_path / "f.json"
    for read, most, more, message in (
        (files.read_lines, "\n\na", "\n\n\na", "more than 3 lines"),
        (files.stream_json, '{"a": 1, "b": 2}', '{"a": [1, 2, 3, 4]}', "more than 4 values"),
        (files.stream_json, '{"a": [[]]}', '{"a": [[[]]]}', "more than 3 lists and objects"),
        (files.stream_json, '{"a": [[1,2,3,4,5,6]]}', '{"a": [[1,2,3,4,5,6,7]]}', "5 commas"),
    ):
        path.write_text(most)
        assert list(read(path, 100))
        path.write_text(more)
        with pytest.raises(UnreadableError, match=message):
            list(read(path, 100))


def test_cells_of_csv_that_hold_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "tree.csv"
    rows = [["parent", "child"], ["animal", "great\nwhite shark"], ["a;b", 'the 5" dog'], ["", "x"]]
    for ends in ("\n", "\r\n"):
        with open(path, "w", newline="") as file:
            csv.writer(file, lineterminator=ends).writerows(rows)
        assert list(files.read_rows(path, 1000)) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('p,c\na,dog\na,"cat\na,fish\na,horse\n', "a quote is not closed, in line 3"),
        ('\np;c\n"a";b\na;"cat\na;fish"x\n', "expected after '\"', in line 4"),
        ('p,c\na,"cat', "a quote is not closed, in line 2"),
    ],
)
def test_a_quote_that_is_not_closed_takes_in_no_other_rows(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "tree.csv"
    path.write_text(text)
    with pytest.raises(UnreadableError, match=f"not CSV: .*{message}"):
        list(files.read_rows(path, 1000))
    with pytest.raises(ConfigError, match=f"tree.csv: not CSV: .*{message}"):
        load_taxonomy(path)
