"""The embedded pictures, their tree and the model: what they are, and that they can be drawn again."""

import hashlib
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset
from PIL import Image
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.images.source import ImageSource
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin import demo_assets
from taxolens.plugin.evaluation.atlas import atlas
from taxolens.plugin.evaluation.evaluate import EvaluationSettings, evaluate_run
from taxolens.plugin.evaluation.held_out import overlap
from taxolens.plugin.study.settings import gather
from taxolens.registry.packaged import PACKAGED
from taxolens.registry.taxonomies.load import load_taxonomy
from taxolens.registry.taxonomies.taxonomy import Taxonomy
from tiny_runs import save_sae
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "demo_assets"


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return Taxonomy.from_json(demo_assets.taxonomy_path().read_text())


def read_split(split: str) -> Dataset:
    dataset = Dataset.from_parquet(str(demo_assets.dataset_path() / f"{split}.parquet"))
    assert isinstance(dataset, Dataset)
    return dataset


@pytest.fixture(scope="module")
def splits() -> dict[str, Dataset]:
    return {split: read_split(split) for split in ("train", "validation")}


@pytest.fixture(scope="module")
def drawing():
    """The drawing scripts' module, imported the way running the script imports it."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import draw_pictures

        yield draw_pictures
    finally:
        sys.path.remove(str(SCRIPTS))


def raw_bytes(dataset: Dataset) -> list[bytes]:
    return [cell["bytes"] for cell in dataset.data.column("image").to_pylist()]


def test_tree_has_four_levels_below_the_root_and_every_leaf_lies_at_the_bottom(taxonomy):
    assert len(taxonomy.classes) >= 48
    assert taxonomy.max_depth == 4
    assert set(taxonomy.depth[taxonomy.class_nodes]) == {4}


def test_every_inner_node_has_two_to_four_children(taxonomy):
    """A node with one child would be no level at all."""
    counts = {len(children) for children in taxonomy.children if len(children)}
    assert counts <= {2, 3, 4}


def test_tree_reaches_the_same_siblings_the_drawings_do(taxonomy):
    names = list(taxonomy.classes)
    depth = taxonomy.leaf_lca_depth

    def shared(a: str, b: str) -> int:
        return int(depth[names.index(a), names.index(b)])

    assert shared("humbug puffer", "polka puffer") == 3
    assert shared("humbug puffer", "sail pike") == 2
    assert shared("humbug puffer", "humbug beetle") == 1
    assert shared("humbug puffer", "humbug parasol") == 0


def test_labels_follow_the_tree_and_classes_are_balanced(splits, taxonomy):
    for dataset in splits.values():
        label = dataset.features["label"]
        assert isinstance(label, ClassLabel)
        assert tuple(label.names) == tuple(taxonomy.classes)
        counts = np.bincount(dataset["label"], minlength=len(taxonomy.classes))
        assert counts.min() == counts.max() > 0


def test_no_picture_lies_in_both_splits_or_twice_in_one(splits):
    digests = [hashlib.sha256(data).digest() for d in splits.values() for data in raw_bytes(d)]
    assert len(set(digests)) == len(digests) == sum(map(len, splits.values()))


def test_pictures_decode_to_64_by_64_rgb(splits):
    for dataset in splits.values():
        picture = dataset[len(dataset) // 2]["image"]
        assert (picture.size, picture.mode) == ((64, 64), "RGB")


def test_assets_stay_small():
    folder = demo_assets.taxonomy_path().parent
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 12e6


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_script_draws_the_shipped_pictures_again(drawing, splits, split):
    """Equal within what another release of the WebP codec may change."""
    dataset = splits[split]
    for row in (0, 100, len(dataset) - 1):
        label = dataset[row]["label"]
        index = row // len(drawing.CLASS_NAMES)
        shipped = np.asarray(dataset[row]["image"], dtype=float)
        again = drawing.shipped_pixels(label, index, split).astype(float)
        assert np.abs(shipped - again).mean() < 2


def test_a_picture_is_a_function_of_split_class_and_number(drawing):
    def pixels(label: int, index: int, split: str) -> np.ndarray:
        return np.asarray(drawing.draw_picture(label, index, split))

    first = pixels(5, 3, "train")
    assert np.array_equal(first, pixels(5, 3, "train"))
    others = [(5, 3, "validation"), (5, 4, "train"), (6, 3, "train")]
    assert not any(np.array_equal(first, pixels(*other)) for other in others)


def test_encoding_is_the_same_bytes_every_time(drawing):
    picture = drawing.draw_picture(0, 0, "validation")
    assert drawing.encode(picture) == drawing.encode(picture)


def test_shipped_tree_is_what_the_script_writes(drawing):
    assert json.loads(demo_assets.taxonomy_path().read_text()) == drawing.taxonomy()


def test_colour_does_not_give_the_class_away(splits):
    """The nearest class by mean and spread of colour is right hardly more often than a guess."""

    def colours(dataset: Dataset) -> np.ndarray:
        pictures = (np.asarray(Image.open(io.BytesIO(b)), dtype=float) for b in raw_bytes(dataset))
        return np.array([np.r_[p.mean(axis=(0, 1)), p.std(axis=(0, 1))] for p in pictures])

    known = splits["train"].select(range(20 * 77)).flatten_indices()
    held_out = splits["validation"].select(range(10 * 77)).flatten_indices()
    x, labels = colours(known), np.array(known["label"])
    centres = np.array([x[labels == c].mean(axis=0) for c in range(77)])
    gaps = (((colours(held_out)[:, None] - centres) / x.std(axis=0)) ** 2).sum(axis=2)
    right = gaps.argmin(axis=1) == np.array(held_out["label"])
    assert right.mean() < 5 / 77


def test_model_loads_as_float32_and_beats_chance_by_far_on_held_out_pictures(splits):
    import torch

    model = AutoModelForImageClassification.from_pretrained(demo_assets.model_path()).eval()
    processor = AutoImageProcessor.from_pretrained(demo_assets.model_path(), backend="pil")
    dataset = splits["validation"].select(range(0, 462))
    pixels = processor(images=list(dataset["image"]), return_tensors="pt")["pixel_values"]
    assert next(model.parameters()).dtype == torch.float32
    assert pixels.shape[1:] == (3, 64, 64)
    with torch.no_grad():
        predicted = model(pixels).logits.argmax(dim=1)
    assert (
        predicted == torch.tensor(dataset["label"])
    ).float().mean() > 0.35  # 77 classes: chance is 0.013
    assert tuple(model.config.id2label.values()) == tuple(
        splits["validation"].features["label"].names
    )
    assert len(AutoModel.from_pretrained(demo_assets.model_path()).encoder.layer) == 8


def test_their_names_are_understood_wherever_one_is_asked_for(tmp_path, monkeypatch):
    """Each is recorded as the path, which is what the SAEs of a run record too."""
    model, pictures, tree = PACKAGED.values()
    assert load_vision_model("demo:model", random_weights=True).cfg.model_name == str(model)
    assert load_taxonomy("demo:tree") == load_taxonomy(tree)
    images = load_images("demo:pictures", split="validation")
    assert images.fingerprint == load_images(pictures, split="validation").fingerprint
    named, placed = (ImageSource(path, split="train") for path in ("demo:pictures", str(pictures)))
    assert named == placed and overlap(named, placed)

    save_sae(tmp_path / "sae", "blocks.0.hook_resid_post", {}, d_in=96)
    settings = EvaluationSettings(
        evaluators="cpcc",
        model_name="demo:model",
        dataset_path="demo:pictures",
        taxonomy="demo:tree",
        max_images=200,
        nulls=["permuted_classes"],
        n_permutations=2,
        n_groups=0,
        progress=False,
    )
    evaluated = evaluate_run(tmp_path / "sae", settings)
    assert evaluated.dataset.title == f"{pictures} (validation)"
    assert math.isfinite(evaluated.saes[0].evaluators["cpcc"].metrics["x_cpcc"].value)
    monkeypatch.setattr("taxolens.plugin.evaluation.atlas.published_saes", lambda *_, **__: [])
    again = atlas("demo:model", settings, also=[tmp_path / "sae"], output_path=tmp_path / "atlas")
    assert again.saes[0].model_name == str(model)
    config = gather(preset="demo").draft()
    assert (config.model_name, config.dataset_path) == (str(model), str(pictures))
