"""Memory and time of reading the largest hostile files: at most 2 GiB beyond the process, and 60 s?

    python benchmarks/memory.py [--store]
    python benchmarks/memory.py --files "png: RGBA" --scale 0.1
    python benchmarks/memory.py --write

Each file is as long as its reader allows, or longer, and made to cost as much memory or time as can be.
It is read in a fork of its own, whose CPU seconds are counted. With --scale the files are shorter by this
factor. --store writes the table into docs/security.md, and --write does so from the stored results.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
from PIL import Image
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.images.raw import RawImage, decode_raw
from taxolens.plugin.reporting.results import Results
from taxolens.registry import files
from taxolens.registry.taxonomies.load import load_taxonomy

BAR = 2048  # MiB
SECONDS = 60.0
PAGE = timing.ROOT / "docs" / "security.md"
COCO = (118_287, 860_001)  # images and objects of instances_train2017.json
OUTLINE = [239.97, 260.24, 222.04, 270.49, 199.84, 253.41, 213.5, 227.79, 259.62, 200.46] * 4


class Hostile(NamedTuple):
    """A file: its name, its text in parts, and what reads it."""

    name: str
    parts: Callable[[float], Iterable[str]]
    read: Callable[[Path], Any]


def repeated(before: str, part: str, times: int, after: str) -> Callable[[float], Iterable[str]]:
    """The parts of `before`, `times` times `part`, and `after`."""

    def parts(scale: float) -> Iterable[str]:
        yield before
        left = max(1, round(times * scale))
        while left > 0:
            yield part * min(left, 100_000)
            left -= 100_000
        yield after

    return parts


def coco(scale: float) -> Iterable[str]:
    """Annotations of the size and form of instances_train2017.json, in its order."""
    n_images, n_objects = (max(80, round(n * scale)) for n in COCO)
    yield '{"info": {"year": 2017}, "licenses": [], "images": ['
    for i in range(n_images):
        yield "," * (i > 0)
        yield f'{{"license": 3, "file_name": "{i:012}.jpg", "height": 427, "width": 640, "id": {i}}}'
    yield '], "annotations": ['
    for i in range(n_objects):
        image = i % n_images
        yield "," * (i > 0)
        yield f'{{"segmentation": [{OUTLINE}], "area": 2765.1, "iscrowd": 0, "image_id": {image}, '
        yield f'"bbox": [199.84, 200.46, 77.71, 70.88], "category_id": {image % 80}, "id": {i}}}'
    yield '], "categories": ['
    yield ",".join(f'{{"supercategory": "x", "id": {i}, "name": "c{i}"}}' for i in range(80))
    yield "]}"


def distinct_pairs(scale: float) -> Iterable[str]:
    """A CSV of pairs of one parent and as many children."""
    yield "parent,child\n"
    for i in range(round(10_000_000 * scale)):
        yield f"root,{i}\n"


def rows_of_one_image(scale: float) -> Iterable[str]:
    """Lines of as many folders and one name, which are all that may be compared with an image."""
    for i in range(round(4_000_000 * scale)):
        yield f"\U0001f600{i:043}/{0:012} cat\n"  # 4 bytes each, in the file 1


def chains(scale: float) -> Iterable[str]:
    """A CSV of chains below one root, as deep as levels may be."""
    for i in range(max(1, round(2000 * scale))):
        for j in range(990):
            yield f"{f'{i}_{j}' if j else 'root'},{i}_{j + 1}\n"


def star(scale: float) -> Iterable[str]:
    """A CSV of the most classes below one root."""
    for i in range(round(29_990 * scale)):
        yield f"root,{i}\n"


def read_json(path: Path) -> object:
    """The JSON of the largest kind of file."""
    return files.read_json(path, files.MAX_DATA_BYTES)


def read_labelled(path: Path) -> None:
    """Two images beside a file of their labels."""
    for name in (0, 1):
        Image.new("RGB", (2, 2)).save(path.with_name(f"{name:012}.jpg"))
    load_images(path.parent).require_labels()


def decode(mode: str) -> Callable[[Path], object]:
    """An image of the most pixels that are decoded."""

    def read(path: Path) -> object:
        if os.fork() == 0:  # made elsewhere, so that it does not count here
            Image.new(mode, (8000, files.MAX_IMAGE_PIXELS // 8000)).save(path)
            os._exit(0)
        os.wait()
        return decode_raw(RawImage(0, None, str(path)))

    return read


def hostile() -> dict[str, Hostile]:
    """What it is -> the file."""
    return {
        "json: numbers": Hostile("a.json", repeated("[", "1e9,", 31 << 20, "1]"), read_json),
        "json: numbers that fit": Hostile(
            "a.json", repeated("[", "1e9,", 16 << 20, "1]"), read_json
        ),
        "json: texts that fit": Hostile(
            "a.json", repeated("[", '"ab",', 16 << 20, "1]"), read_json
        ),
        "json: empty lists": Hostile("a.json", repeated("[", "[],", 3_999_000, "1]"), read_json),
        "json: wide text": Hostile(
            "a.json", repeated('["\U0001f600', "a", 127 << 20, '"]'), read_json
        ),
        "results: numbers": Hostile(
            "results.json",
            repeated('{"saes": [', "1e9,", 16 << 20, "1]}"),
            lambda path: Results.load(path),
        ),
        "csv tree: equal pairs": Hostile(
            "t.csv", repeated("parent,child\n", "a,b\n", 31 << 20, ""), load_taxonomy
        ),
        "csv tree: distinct pairs": Hostile("t.csv", distinct_pairs, load_taxonomy),
        "csv tree: chains": Hostile("t.csv", chains, load_taxonomy),
        "csv tree: one cycle": Hostile(
            "t.csv",
            lambda scale: (f"{i},{(i + 1) % 1_990_000}\n" for i in range(round(1_990_000 * scale))),
            load_taxonomy,
        ),
        "csv tree: classes": Hostile("t.csv", star, load_taxonomy),
        "csv tree: empty lines": Hostile("t.csv", repeated("", "\n", 127 << 20, ""), load_taxonomy),
        "csv tree: columns": Hostile(
            "t.csv", repeated("parent,child\n", "," * 1000 + "\n", 127 << 10, ""), load_taxonomy
        ),
        "json tree: pairs": Hostile(
            "t.json", repeated("[", '["a","b"],', 3_900_000, '["a","b"]]'), load_taxonomy
        ),
        "yaml": Hostile("a.yaml", repeated("[", "1,", 49_000, "1]"), files.read_yaml),
        "labels: csv": Hostile(
            "a.csv", repeated("id,label\n", f"{0:012}, cat\n", 14 << 20, ""), read_labelled
        ),
        "labels: columns": Hostile(
            "a.csv", repeated("", "," * 999_999 + "\n", 256, ""), read_labelled
        ),
        "labels: short rows": Hostile("a.csv", repeated("", ",\n", 127 << 20, ""), read_labelled),
        "labels: cells": Hostile(
            "a.csv", repeated("", "x," * 999 + "\n", 130_000, ""), read_labelled
        ),
        "labels: txt": Hostile("a.txt", repeated("", "x y\n", 63 << 20, ""), read_labelled),
        "labels: long lines": Hostile(
            "a.txt", repeated("", "x " * 500_000 + "\n", 256, ""), read_labelled
        ),
        "labels: one image": Hostile("a.txt", rows_of_one_image, read_labelled),
        "labels: json": Hostile(
            "a.json", repeated("{", '"a":1,', 9 << 20, '"a":1}'), read_labelled
        ),
        "labels: lists in json": Hostile(
            "a.json",
            repeated("{", '"a":[[' + "[]," * 1000 + "1]],", 20_000, '"a":1}'),
            read_labelled,
        ),
        "labels: numbers in json": Hostile(
            "a.json",
            repeated("{", '"a":[[' + "0.125," * 1000 + "1]],", 140_000, '"a":1}'),
            read_labelled,
        ),
        "labels: coco": Hostile("a.json", coco, read_labelled),
        **{
            f"png: {mode}": Hostile("a.png", lambda scale: (), decode(mode))
            for mode in ("RGB", "RGBA", "I;16", "P")
        },
    }


def memory(field: str) -> float:
    """MiB: VmRSS, the memory in use, or VmHWM, its peak."""
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith(field)]
    return int(line.split()[1]) / 1024


def measure(case: Hostile, scale: float) -> tuple[float, float, str]:
    """Peak MiB beyond the process, CPU seconds, and "read" or the error, of a file read in a fork."""
    receiving, sending = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / case.name
        with path.open("w", encoding="utf-8") as file:
            file.writelines(case.parts(scale))
        if os.fork() == 0:
            before, began = memory("VmRSS"), time.process_time()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
            try:
                case.read(path)
                outcome = "read"
            except Exception as error:
                outcome = " ".join(f"{type(error).__name__}: {error}".split())
            line = f"{memory('VmHWM') - before}\t{time.process_time() - began}\t{outcome[:120]}"
            os.write(sending, line.encode())
            os._exit(0)
        os.wait()
    os.close(sending)
    with os.fdopen(receiving) as report:
        peak, seconds, outcome = (report.read() or "inf\t0\tkilled").split("\t", 2)
    return float(peak), float(seconds), outcome.replace(folder, ".").replace("|", "\\|")


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    rows = (
        (name, f"{peak:,.0f}", f"{seconds:.1f}", outcome)
        for name, (peak, seconds, outcome) in found["files"].items()
    )
    head = ("file", "MiB", "CPU seconds", "outcome")
    return f"{timing.table(head, rows)}\n\n{timing.on_what(found)}."


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 where a file costs more than `BAR` or `SECONDS`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    every = hostile()
    parser.add_argument("--files", nargs="+", choices=list(every), metavar="NAME")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    if args.write:
        timing.show("memory", shown(timing.stored("memory")), PAGE)
        return 0
    torch.set_num_threads(1)
    files: dict[str, tuple[float, float, str]] = {}
    for name in args.files or every:
        files[name] = peak, seconds, _ = measure(every[name], args.scale)
        print(f"{name}: {peak:,.0f} MiB, {seconds:.1f} s", file=sys.stderr, flush=True)
    found = {"machine": timing.machine(), "scale": args.scale, "files": files}
    print(shown(found))
    if args.store:
        timing.store("memory", found)
        timing.show("memory", shown(found), PAGE)
    return int(any(peak > BAR or seconds > SECONDS for peak, seconds, _ in files.values()))


if __name__ == "__main__":
    sys.exit(main())
