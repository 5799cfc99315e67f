"""Fuzz of every reader of files: for any content it is right, or raises an error of taxolens.

    python benchmarks/fuzz.py                          # 10,000 examples, over all readers
    python benchmarks/fuzz.py --readers results tree --examples 2000

Contents are any bytes, any JSON, and a valid document in which one value was replaced, removed or
put in twice. tests/benchmarks/test_fuzz.py runs a few hundred of them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from taxolens.hooks.activations.cache_reader import CacheReader
from taxolens.hooks.activations.stream import ActivationStream
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.images.preprocess import PilPreprocess
from taxolens.hooks.images.raw import RawImage, decode_raw
from taxolens.hooks.images.source import ImageSource
from taxolens.plugin.evaluation.forward import ModelSetting
from taxolens.plugin.evaluation.sae_folders import find_saes
from taxolens.plugin.reporting.report import write_report
from taxolens.plugin.reporting.results import (
    DatasetInfo,
    EvaluatorInfo,
    EvaluatorResult,
    LatentCard,
    MetricResult,
    NullResult,
    PermutedClassesInfo,
    Results,
    SAEResult,
    SkippedImage,
    TaxonomyInfo,
    TopImage,
)
from taxolens.plugin.study.settings import gather
from taxolens.plugin.training.activations_store import VisionActivationsStore
from taxolens.plugin.training.checkpoints import RunIdentity, verify_checkpoint, write_manifest
from taxolens.plugin.training.config import VisionSAERunnerConfig
from taxolens.registry.errors import TaxolensError
from taxolens.registry.loaders.parts.read import read_sae as read_sae_file
from taxolens.registry.presentation import Headline, NodeTable, Support
from taxolens.registry.taxonomies.load import load_taxonomy
from taxolens.registry.taxonomies.taxonomy import Taxonomy

TREE = Taxonomy.from_edges([("thing", "cat"), ("thing", "dog"), ("dog", "pug"), ("dog", "husky")])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["/etc/passwd", "../x", "a\0b", "x" * 300, "\x1b[2J", "taxolens.results/1"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


class Reader(NamedTuple):
    """A reader: the valid document at `file`, and what reads the folder that holds it."""

    file: str
    document: Any
    read: Callable[[Path], object]


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document, its own first."""
    yield path
    items = document.items() if isinstance(document, dict) else ()
    items = enumerate(document) if isinstance(document, list) else items
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def changed(draw: Any, document: Any) -> Any:
    """`document` with one value replaced, removed or put in twice."""
    path = draw(st.sampled_from(list(places(document))[1:]))
    result = copy.deepcopy(document)
    *above, last = path
    holder = result
    for key in above:
        holder = holder[key]
    how = draw(st.sampled_from(["replaced", "replaced", "removed", "twice"]))
    if how == "removed":
        del holder[last]
    elif how == "twice" and isinstance(holder, list):
        holder.append(holder[last])
    else:
        holder[last] = draw(JSON)
    return result


def contents(document: Any, *, as_yaml: bool = False) -> st.SearchStrategy[bytes]:
    """Bytes of a file: any, any JSON, and changed documents."""
    if isinstance(document, bytes):
        cut = st.integers(0, len(document)).map(lambda n: document[:n])
        flipped = st.tuples(st.integers(0, len(document) - 1), st.integers(0, 255)).map(
            lambda change: document[: change[0]] + bytes([change[1]]) + document[change[0] + 1 :]
        )
        return st.binary(max_size=200) | cut | flipped
    if as_yaml:
        dumped = changed(document).map(lambda value: yaml.safe_dump(value).encode())
    else:
        dumped = changed(document).map(lambda value: json.dumps(value).encode())
    return st.binary(max_size=60) | JSON.map(lambda v: json.dumps(v).encode()) | dumped | dumped


def example_results() -> dict[str, Any]:
    """The content of a small results.json that uses every kind of entry."""
    nulls = {
        "shuffled": NullResult(0.1, 0.2, 3, True),
        "permuted_classes": NullResult(0.1, 0.2, 19, True, None, 0.05, 0.05),
    }
    number = MetricResult(0.5, nulls, {"planted": 1.0}, low=0.4, high=0.6, support=12, least=10)
    card = LatentCard(
        3, "dog", ["thing", "dog"], 1.0, 1.0, 0.5, 0.1, [TopImage(0, "pug", 2.0, None)]
    )
    sae = SAEResult(
        id="sae",
        run="run",
        name="sae",
        hook_name="blocks.0.hook_resid_post",
        layer=0,
        model_name="a/model",
        architecture="topk",
        tokens="class",
        d_in=8,
        d_sae=16,
        l0=4.0,
        fingerprint="f",
        evaluators={"e": EvaluatorResult({"m": number}, {"t": "t.csv"}, {"f": "f.json"}, 0.5)},
        most_specific=[card],
        least_specific=[card],
        node_f1=dict.fromkeys(TREE.nodes, 0.5),
        seconds=1.0,
        trained_as="batchtopk",
        constraint="frozen_decoder",
        l0_token=3.5,
        weights="0" * 64,
    )
    info = EvaluatorInfo(
        description="e",
        directions={"m": True},
        nulls={"shuffled": None},
        headlines=[Headline("m", "metric", "what it is", priority=1)],
        labels={"m": "metric"},
        node_table=NodeTable("t"),
        support={"m": Support("m", "nodes")},
    )
    return Results(
        created="2026-01-01T00:00:00+00:00",
        settings={"n_permutations": 3},
        provenance={"taxolens": "0.1.0"},
        dataset=DatasetInfo(
            *("photos", "validation", "abc", 6, 3, 3, list(TREE.classes)),
            skipped=[SkippedImage(4, "damaged")],
            holdout=0.2,
            holdout_seed=0,
            n_present=3,
        ),
        taxonomy=TaxonomyInfo("tree", 5, 3, 2, json.loads(TREE.to_json())),
        evaluators={"e": info},
        saes=[sae],
        permuted_classes=PermutedClassesInfo(3, 2, 1, 19, 0, 0),
    ).to_dict()


def read_results(folder: Path) -> None:
    """Read results.json, and write the report from it."""
    write_report(Results.load(folder), interactive=True)


def read_sae(folder: Path) -> None:
    """Find the SAE, take every setting that an evaluation takes, and load it."""
    for sae in find_saes(folder):
        source = ImageSource.of(sae.setting)
        source.held_out(sae.setting)
        ModelSetting.of(sae)
        sae.setting("taxonomy")
        sae.setting("evaluators", [])
        sae.load()


def read_cache(folder: Path) -> None:
    """Open the cache and read its activations."""
    cache = CacheReader(folder)
    for name in cache.hook_names:
        np.asarray(cache.activations(name)).sum()


def read_run(folder: Path) -> None:
    """Find the SAEs of a run by its runner_cfg.json, and take the settings of an evaluation."""
    for sae in find_saes(folder):
        ImageSource.of(sae.setting)
        ModelSetting.of(sae)


def read_other(folder: Path) -> None:
    """Read the SAE of another library, with all facts that its files may lack."""
    read_sae_file(
        folder / "ae.pt", sae_class="AutoEncoder", model_name="a/model", hook_name="blocks.0.hook_x"
    )


def read_position(folder: Path) -> None:
    """Go to a checkpoint's position in the activations of a cache, and read on."""
    stream = ActivationStream(
        None, None, ["h"], cache=CacheReader(folder / "cache"), train_batch_size_tokens=2
    )
    store = VisionActivationsStore(stream, "h")
    store.load_from_checkpoint(folder)
    store.open()
    next(store)


def read_labelled(folder: Path) -> None:
    """Read images, and the classes that a file beside them gives."""
    load_images(folder).require_labels()


def readers(folder: Path) -> dict[str, Reader]:
    """Name -> reader; the files beside its document lie in the folder of that name."""
    names = ("sae", "weights", "results", "checkpoint", "cache", "tree", "csv", "study", "config")
    names += ("image", "preprocessor", "run", "pickle", "position", "coco", "labels")
    here = {name: folder / name for name in names}
    for place in here.values():
        place.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=4, d_sae=6, k=2))
    for name, value in {
        "model_name": "a/model",
        "hook_name": "blocks.0.hook_resid_post",
        "tokens": "class",
        "dataset_path": "photos",
        "image_size": 16,
        "max_images": 5,
        "taxonomy": "imagenet",
        "evaluators": ["pair_depth"],
        "model_from_pretrained_kwargs": {"dtype": "float32"},
    }.items():
        sae.cfg.metadata[name] = value
    for name in ("sae", "weights", "run"):
        sae.save_inference_model(here[name])
    (here["checkpoint"] / "a.json").write_text("{}")
    write_manifest(
        here["checkpoint"],
        RunIdentity({"saes": {"sae": {"k": 4}}}, {"lr": 0.1}),
        n_training_samples=8,
        n_training_steps=1,
    )
    for name, shape in (("h", (3, 1, 4)), ("labels", (3,)), ("indices", (3,))):
        np.save(
            here["cache"] / f"{name}.npy", np.zeros(shape, "int64" if shape == (3,) else "float32")
        )
    index = {
        "schema": "taxolens.activations/1",
        "facts": {"hook_names": ["h"], "tokens": "class", "mean_patch": False, "dtype": "float32"},
        "complete": True,
        "class_names": ["cat"],
        "failures": {"4": "damaged"},
        "n_seen": 4,
        "n_rows": 3,
    }
    shutil.copytree(here["cache"], here["position"] / "cache")
    (here["position"] / "cache" / "cache.json").write_text(json.dumps(index))
    position = VisionActivationsStore(
        ActivationStream(
            None,
            None,
            ["h"],
            cache=CacheReader(here["position"] / "cache"),
            train_batch_size_tokens=2,
        )
    ).stream.state_after(0)
    dense = torch.arange(24, dtype=torch.float32).reshape(6, 4) / 24 + 0.1
    other = io.BytesIO()
    torch.save(
        {
            "bias": torch.zeros(4),
            "encoder.weight": dense,
            "encoder.bias": torch.zeros(6),
            "decoder.weight": dense.T.clone(),
        },
        other,
    )
    for name in ("coco", "labels"):
        for image in ("1.png", "2.png"):
            Image.new("RGB", (2, 2)).save(here[name] / image)
    coco = {
        "info": {"year": 2017},
        "images": [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}],
        "annotations": [
            {"image_id": 1, "category_id": 7, "segmentation": [[1.5, 2.0]]},
            {"image_id": 2, "category_id": 8},
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}],
    }
    study = {
        "model_name": "a/model",
        "dataset_path": "photos",
        "hook_names": ["blocks.*.hook_resid_post"],
        "architecture": "topk",
        "k": 4,
        "d_sae": 24,
        "training_tokens": 64,
        "train_batch_size_tokens": 16,
        "lr": 0.1,
        "evaluators": ["pair_depth"],
        "logger": {"log_to_wandb": False},
        "saes": {"a": {"architecture": "topk", "k": 2}},
        "model_from_pretrained_kwargs": {"dtype": "float32"},
    }
    config = VisionSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=4, d_sae=6, k=2), dataset_path="photos", device="cpu"
    ).to_dict()
    picture = io.BytesIO()
    Image.new("RGB", (9, 7), (1, 2, 3)).save(picture, "PNG")
    processor = {
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 16, "width": 16},
        "do_center_crop": True,
        "resample": 3,
        "rescale_factor": 0.004,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return {
        "sae": Reader("cfg.json", json.loads((here["sae"] / "cfg.json").read_text()), read_sae),
        "weights": Reader(
            "sae_weights.safetensors",
            (here["weights"] / "sae_weights.safetensors").read_bytes(),
            read_sae,
        ),
        "results": Reader("results.json", example_results(), read_results),
        "checkpoint": Reader(
            "checkpoint.json",
            json.loads((here["checkpoint"] / "checkpoint.json").read_text()),
            verify_checkpoint,
        ),
        "cache": Reader("cache.json", index, read_cache),
        "tree": Reader(
            "t.json", json.loads(TREE.to_json()), lambda place: load_taxonomy(place / "t.json")
        ),
        "csv": Reader(
            "t.csv",
            b"parent,child\nthing,cat\nthing,dog\n",
            lambda place: load_taxonomy(place / "t.csv"),
        ),
        "study": Reader("s.yaml", study, lambda place: gather(config=place / "s.yaml").draft()),
        "config": Reader(
            "c.json", config, lambda place: VisionSAERunnerConfig.load(place / "c.json")
        ),
        "run": Reader("runner_cfg.json", config, read_run),
        "pickle": Reader("ae.pt", other.getvalue(), read_other),
        "position": Reader("activations_store_state.json", position, read_position),
        "coco": Reader("a.json", coco, read_labelled),
        "labels": Reader("a.csv", b"id,label\n1,cat\n2,dog\n", read_labelled),
        "image": Reader(
            "i.png",
            picture.getvalue(),
            lambda place: decode_raw(RawImage(0, None, str(place / "i.png"))),
        ),
        "preprocessor": Reader(
            "p.json",
            processor,
            lambda place: _preprocess(json.loads((place / "p.json").read_bytes())),
        ),
    }


def _preprocess(settings: Any) -> None:
    if isinstance(settings, dict):
        PilPreprocess.from_config(settings)(Image.new("RGB", (30, 20)))


def attempt(reader: Reader, place: Path, content: bytes) -> str:
    """Read `content` in its place: "read" or "refused"; any other error is raised."""
    (place / reader.file).write_bytes(content)
    try:
        reader.read(place)
    except TaxolensError as error:
        assert str(error), "an error without a message"
        return "refused"
    except ValueError:
        if reader.file == "p.json" and not _is_json(content):
            return "refused"
        raise
    return "read"


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def fuzz(name: str, reader: Reader, place: Path, n_examples: int) -> dict[str, int]:
    """Read `n_examples` contents; how many were read and how many refused.

    Raises:
        Exception: the first error that is none of taxolens; Hypothesis shows the smallest content.
    """
    counts = {"read": 0, "refused": 0}
    (place / reader.file).write_bytes(
        reader.document
        if isinstance(reader.document, bytes)
        else json.dumps(reader.document).encode()
    )
    reader.read(place)  # the document itself is valid

    @hypothesis.settings(
        max_examples=n_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(contents(reader.document, as_yaml=reader.file.endswith(".yaml")))
    def one(content: bytes) -> None:
        counts[attempt(reader, place, content)] += 1

    with quiet():
        one()
    return counts


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without logs and warnings, of which there is one for many of the contents."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def main(argv: list[str] | None = None) -> int:
    """Fuzz the readers and print how many contents were read and refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=10_000, help="of all readers together")
    parser.add_argument("--readers", nargs="+", metavar="NAME", help="by default all")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        every = readers(Path(folder))
        names, failed = args.readers or list(every), []
        print("| reader | read | refused | seconds |\n|---|---:|---:|---:|")
        for name in names:
            started = time.perf_counter()
            share = -(-args.examples // len(names))
            try:
                counts = fuzz(name, every[name], Path(folder) / name, share)
            except Exception:
                traceback.print_exc()
                failed.append(name)
                continue
            seconds = time.perf_counter() - started
            print(
                f"| {name} | {counts['read']:,} | {counts['refused']:,} | {seconds:.0f} |",
                flush=True,
            )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
