"""Draw the embedded picture set: train and validation pictures, their class tree, a contact sheet.

    python examples/demo_assets/draw_pictures.py
    python examples/demo_assets/draw_pictures.py --contact-sheet docs/images/pictures.png --sheet-only

Writes `pictures/train.parquet`, `pictures/validation.parquet` and `taxonomy.json` into --out, by default the
package's own `plugin/demo_assets`. Every picture is a function of (split, class, number): rerunning gives
the same files, and the two splits share no random numbers.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from world import CLASS_NAMES, LEAVES, ROOT, SIZE, SPLITS, WORLD, draw_picture, edges

PACKAGE_FOLDER = Path(__file__).resolve().parents[2] / "plugin" / "demo_assets"
PER_CLASS = {"train": 50, "validation": 25}


def encode(picture: Image.Image) -> bytes:
    """The picture as it is shipped: WebP, about 0.9 kB."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80, method=6)
    return buffer.getvalue()


def shipped_pixels(label: int, index: int, split: str) -> np.ndarray:
    """(64, 64, 3) uint8: the picture after WebP encoding and decoding, as in the shipped set."""
    with Image.open(io.BytesIO(encode(draw_picture(label, index, split)))) as picture:
        return np.asarray(picture.convert("RGB"))


def _encoded(job: tuple[int, int, str]) -> bytes:
    return encode(draw_picture(*job))


def taxonomy() -> dict:
    """The class tree as parent-child edges; `classes` lists the leaves in label order."""
    return {
        "format": "taxolens.taxonomy/1",
        "edges": [list(edge) for edge in edges()],
        "names": {name: name for name in [ROOT, *(child for _, child in edges())]},
        "classes": CLASS_NAMES,
    }


def write_split(path: Path, split: str, per_class: int, workers: int) -> None:
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    jobs = [(label, i, split) for i in range(per_class) for label in range(len(LEAVES))]
    with multiprocessing.Pool(workers) as pool:
        pictures = pool.map(_encoded, jobs, chunksize=32)
    rows = {
        "image": [
            {"bytes": data, "path": f"{LEAVES[label].name}-{i:03d}.webp"}
            for data, (label, i, _) in zip(pictures, jobs)
        ],
        "label": [label for label, _, _ in jobs],
    }
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASS_NAMES)})
    plain = Features(
        {"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("int64")}
    )
    Dataset.from_dict(rows, features=plain).cast(features).to_parquet(path)


def contact_sheet(index: int) -> Image.Image:
    """Picture `index` of every class: a block per realm, a row per family, a gap between genera."""
    gap, genus_gap, heading, caption, margin = 4, 12, 28, 16, 12
    block_width = 6 * (SIZE + gap) + 2 * genus_gap + 2 * margin
    block_height = heading + 4 * (SIZE + caption + gap) + margin
    sheet = Image.new("RGB", (2 * block_width, 2 * block_height), "white")
    pencil = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(17), ImageFont.load_default(11)
    for block, (realm, families) in enumerate(WORLD.items()):
        left, top = margin + block % 2 * block_width, block // 2 * block_height
        pencil.text((left, top + 4), realm, fill="black", font=large)
        top += heading
        for family, genera in families.items():
            pencil.text((left, top), f"{family}: {', '.join(genera)}", fill="#555", font=small)
            x = left
            for species in genera.values():
                for name in species:
                    picture = draw_picture(CLASS_NAMES.index(name), index, "train")
                    sheet.paste(picture, (x, top + caption))
                    x += SIZE + gap
                x += genus_gap
            top += SIZE + caption + gap
    return sheet


def save_small(sheet: Image.Image, path: Path) -> None:
    """A palette PNG, about a third the size of a full one."""
    palette = sheet.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PACKAGE_FOLDER, help="folder to write into")
    parser.add_argument("--train-per-class", type=int, default=PER_CLASS["train"])
    parser.add_argument("--validation-per-class", type=int, default=PER_CLASS["validation"])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--contact-sheet", type=Path, help="write a PNG with one picture of every class here"
    )
    parser.add_argument("--sheet-number", type=int, default=7, help="which picture of each class")
    parser.add_argument(
        "--sheet-only", action="store_true", help="draw the contact sheet and nothing else"
    )
    args = parser.parse_args()
    if args.contact_sheet:
        save_small(contact_sheet(args.sheet_number), args.contact_sheet)
        print(f"{args.contact_sheet}: {args.contact_sheet.stat().st_size / 1e3:.0f} kB")
    if args.sheet_only:
        return
    (args.out / "pictures").mkdir(parents=True, exist_ok=True)
    (args.out / "taxonomy.json").write_text(json.dumps(taxonomy(), indent=1) + "\n")
    for split, per_class in zip(SPLITS, (args.train_per_class, args.validation_per_class)):
        path = args.out / "pictures" / f"{split}.parquet"
        write_split(path, split, per_class, args.workers)
        print(
            f"{path.name}: {per_class * len(LEAVES)} pictures, {path.stat().st_size / 1e6:.2f} MB"
        )


if __name__ == "__main__":
    main()
