"""Hostile input: files of strangers end a command in one line of message, never in a traceback."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from results_factory import make_results
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from safetensors.torch import load_file, save_file
from taxolens.plugin.cli import main
from taxolens.plugin.evaluation.evaluate import evaluate_run
from taxolens.plugin.reporting.compare import as_csv, from_csv
from taxolens.registry.errors import ConfigError
from taxolens.registry.files import only_writer
from tiny_runs import HOOK, WORLD_CLASSES, run_settings, save_sae

Change = Callable[[Path], object]
FAST = ["--evaluators", "pair_depth", "--n_permutations", "1"]
NOT_JSON = ("[]", "null", "{", "1", "[" * 20_000, "9" * 5000, b"\xff\xfe")


@pytest.fixture(scope="module")
def sae(vit_folder: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one SAE whose metadata name everything that an evaluation needs."""
    torch.manual_seed(0)
    trained = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=24, k=4))
    torch.nn.init.normal_(trained.W_enc)
    for name, value in {
        "model_name": str(vit_folder),
        "hook_name": HOOK,
        "dataset_path": str(world),
        "split": "train",
        "tokens": "class",
        "taxonomy": str(world / "validation"),
    }.items():
        trained.cfg.metadata[name] = value
    folder = tmp_path_factory.mktemp("saes") / "sae"
    folder.mkdir()
    trained.save_inference_model(folder)
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command and gives its message, after a check that it is a single clear line."""

    def call(*args: str | Path) -> str:
        capsys.readouterr()
        code = main(list(map(str, args)))
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code in (1, 2) and len(lines) == 1, (code, err[-500:])
        assert "--debug" not in lines[0] and "Traceback" not in err, lines[0]
        assert len(lines[0]) < 2000 and "weights_only" not in lines[0]
        return lines[0]

    return call


def text(content: str | bytes, name: str = "cfg.json") -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def fifo(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def folder_named(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def fields(name: str = "cfg.json", **changes: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content.update(changes)
        (folder / name).write_text(json.dumps(content))

    return change


def metadata(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / "cfg.json").read_text())
        content["metadata"].update(changes)
        (folder / "cfg.json").write_text(json.dumps(content))

    return change


def number(tensor: str, value: float) -> Change:
    def change(folder: Path) -> None:
        weights = load_file(folder / "sae_weights.safetensors")
        weights[tensor].view(-1)[0] = value
        save_file(weights, folder / "sae_weights.safetensors")

    return change


SAES: list[tuple[Change, str]] = [
    *((text(content), r"cfg\.json: ") for content in NOT_JSON),
    (text("{}"), "^error: model_name, hook_name, tokens, dataset_path, taxonomy: not in the"),
    *((text(content, "runner_cfg.json"), r"runner_cfg\.json: ") for content in NOT_JSON),
    *(
        (kind(name), "not a regular file|holds no SAE")
        for kind in (fifo, folder_named)
        for name in ("cfg.json", "sae_weights.safetensors", "runner_cfg.json")
    ),
    (text(b"", "sae_weights.safetensors"), "the SAE cannot be loaded"),
    (text(b"x" * 99, "sae_weights.safetensors"), "the SAE cannot be loaded"),
    *(
        (number(name, float(value)), f"{name} has values that are not finite")
        for name in ("W_dec", "b_enc")
        for value in ("nan", "inf")
    ),
    *((fields(k=k), "k: not possible") for k in (0, -1, 25, "4", None, [4])),
    *((fields(d_sae=n), "cannot be loaded|not an integer") for n in (0, -1, 10**9, "x", None)),
    (fields(d_in=10**30), "more than 64 bits"),
    *((fields(dtype=value), "dtype|cannot be loaded") for value in ("float77", 1, [])),
    (fields(apply_b_dec_to_input="no"), "apply_b_dec_to_input: not possible"),
    *((fields(metadata=value), "metadata: not an object|metadata has no") for value in ([1], "x")),
    *((metadata(hook_name=value), "hook_name") for value in (1, ["x"], "x", "a\0b")),
    *((metadata(model_name=value), "model_name|File name too long") for value in (1, "x" * 300)),
    *((metadata(image_size=value), "image_size") for value in (1, 10**6, "16", -1)),
    (metadata(taxonomy="\x1b[2J"), r"\\\\x1b\[2J|\\x1b\[2J"),
]


@pytest.mark.parametrize(("change", "message"), SAES)
def test_sae_folders(
    change: Change, message: str, sae: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "sae"
    shutil.copytree(sae, folder)
    change(folder)
    found = refused("evaluate", folder, *FAST)
    assert re.search(message, found), found
    assert "\x1b" not in found


CHAIN = [[f"n{i}", f"n{i + 1}"] for i in range(100_000)]
TREES: list[tuple[str, str | bytes]] = [
    *(("t.json", content) for content in NOT_JSON),
    ("t.json", '{"format": "taxolens.taxonomy/1"}'),
    ("t.json", '{"format": "taxolens.taxonomy/1", "edges": [[1, 2]], "classes": ["a"]}'),
    ("t.json", '{"format": "taxolens.taxonomy/1", "edges": [["a"]], "classes": ["a"]}'),
    ("t.json", json.dumps([*CHAIN, *([f"n{10 * i}", name] for i, name in enumerate("abc"))])),
    ("t.json", json.dumps([*CHAIN, *([f"n{i}", f"c{i}"] for i in range(50_000))])),
    ("t.csv", "a," + "x" * 200_000),
    ("t.csv", b"a,\xe9\n"),
    ("t.csv", 'a,"b\n' * 9),
]


@pytest.mark.parametrize(("name", "content"), TREES)
def test_taxonomies(
    name: str, content: str | bytes, sae: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    text(content, name)(tmp_path)
    refused("evaluate", sae, *FAST, "--taxonomy", tmp_path / name, "--output_path", tmp_path / "o")


def test_a_loop_of_links_among_class_folders(
    sae: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "tree" / "a" / "x").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "x" / "up").symlink_to(tmp_path / "tree")
    refused(
        "evaluate", sae, *FAST, "--taxonomy", tmp_path / "tree", "--output_path", tmp_path / "o"
    )


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, kind)
    return file.getvalue()


ROWS: list[tuple[bytes | None, str | None, str]] = [
    (None, "/dev/zero", "not a regular file"),
    (None, "FIFO", "not a regular file"),
    (None, "http://127.0.0.1:1/x.png", "which only remote_images=True fetches"),
    (None, "zip://x.png::/nothing.zip", "which only remote_images=True fetches"),
    (None, "a\0b", "not a path"),
    (None, "x" * 5000, "File name too long"),
    (None, None, "neither bytes nor a path"),
    (b"", None, "empty"),
    (picture(9000, 9000), None, "exceed max_image_pixels=64000000"),
    (picture(1, 5000), None, "sides of more than 200:1"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", None, "cannot identify"),
]


@pytest.mark.parametrize(("data", "path", "message"), ROWS)
def test_a_row_of_a_dataset_is_one_corrupt_image(
    data: bytes | None, path: str | None, message: str, sae: Path, vit: Any, tmp_path: Path
) -> None:
    if path == "FIFO":
        os.mkfifo(tmp_path / "fifo")
        path = str(tmp_path / "fifo")
    images = [{"bytes": picture(20 + i, 20), "path": None} for i in range(32)]
    labels = [name.rpartition("/")[2] for name in WORLD_CLASSES] * 4
    table = {
        "image": pa.array(
            [*images, {"bytes": data, "path": path}],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        "label": pa.array([*labels, labels[0]]),
    }
    pq.write_table(pa.table(table), tmp_path / "validation.parquet")
    results = evaluate_run(
        sae,
        override_model=vit,
        dataset_path=str(tmp_path / "validation.parquet"),
        split="validation",
        evaluators="pair_depth",
        max_corrupt_share=0.1,
        n_permutations=1,
        progress=False,
        output_path=tmp_path / "out",
    )
    assert [(image.index, message in image.reason) for image in results.dataset.skipped] == [
        (32, True)
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("validation.parquet", b"x"),
        ("validation.zip", b"PK\x03\x04junk"),
        ("validation.tar", b"junk" * 200),
        ("validation.json", b"[" * 20_000),
        ("validation.csv", b"\xff\xfe,"),
        ("state.json", b"[]"),
        ("dataset_dict.json", b"null"),
        ("README.md", b"---\n{{{\n---\n"),
    ],
)
def test_datasets(
    name: str, content: bytes, sae: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / name).write_bytes(content)
    place = ("--dataset_path", tmp_path, "--output_path", tmp_path / "out")
    refused("evaluate", sae, *FAST, "--split", "validation", *place)


def test_datasets_that_are_no_files(sae: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    os.mkfifo(tmp_path / "validation.parquet")
    os.makedirs(os.fsencode(tmp_path) + b"/latin/validation/a/\xff")
    name = os.fsencode(tmp_path) + b"/latin/validation/a/\xff/1.png"
    Path(os.fsdecode(name)).write_bytes(picture(9, 9))
    for path in (
        "/dev/null",
        tmp_path / "validation.parquet",
        tmp_path,
        tmp_path / "latin",
        "a\0b",
    ):
        refused("evaluate", sae, *FAST, "--dataset_path", path, "--output_path", tmp_path / "out")


TRAIN = (
    *("--hook_names", HOOK, "--architecture", "topk", "--train_batch_size_tokens", "8"),
    *("--no_evaluate", "--dry_run", "--log_to_wandb", "false", "--device", "cpu"),
)
SIZE = ("--k", "4", "--d_sae", "24", "--training_tokens", "64")


@pytest.mark.parametrize(
    "flags",
    [
        *(("--lr", value) for value in ("nan", "inf")),
        *(("--seed", value) for value in ("1" + "0" * 26, "-1")),
        *(("--image_size", value) for value in ("1", "1000000", "0")),
        *(("--k", value) for value in ("0", "-1", "25")),
        *((name, value) for name in ("--output_path", "--checkpoint_path") for value in ("", "a\0", "x" * 300)),
        *(("--model_name", value) for value in ("", "a\0b", "x" * 300, "a\udcff")),
        *(("--dataset_path", value) for value in ("/dev/zero", "a\0b", "x" * 300)),
        *(("--hook_names", value) for value in ("{1,2}" * 25, "**." * 200 + "x", "[", "")),
        *(("--config", value) for value in ("/dev/zero", "a\0b", "x" * 300, "/")),
        ("--model_from_pretrained_kwargs", '{"family": ["x"]}'),
        ("--num_workers", "1000000"),
        ("--resume_from_checkpoint", "a\0b"),
        ("--d_sae", "1" + "0" * 20),
    ],
)  # fmt: skip
def test_flags_of_train(
    flags: tuple[str, str],
    vit_folder: Path,
    world: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    places = ("--output_path", tmp_path / "o", "--checkpoint_path", tmp_path / "c")
    given = ("--model_name", vit_folder, "--dataset_path", world, *places)
    refused("train", *TRAIN, *SIZE, *given, *flags)


@pytest.mark.parametrize("name", ["epochs", "expansion_factor"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e300"])
def test_factors_of_train(
    name: str, value: str, vit_folder: Path, world: Path, refused: Callable[..., str]
) -> None:
    left = {"epochs": "--d_sae", "expansion_factor": "--training_tokens"}[name]
    size = ("--k", "4", left, "64")
    places = ("--model_name", vit_folder, "--dataset_path", world)
    found = refused("train", *TRAIN, *size, *places, f"--{name}", value)
    assert re.search("not possible|too many", found)


STUDY = """\
model_name: {model}
dataset_path: {data}
hook_names: [blocks.0.hook_resid_post]
output_path: {out}
"""


@pytest.mark.parametrize(
    "line",
    [
        "a: &a [x, x]\nb: &b [" + "*a," * 9 + "]\nc: [" + "*b," * 20_000 + "]",
        "a: " + "[" * 5000,
        "lr: .nan",
        "seed: " + "9" * 30,
        "k: {1: 2}",
        "1: 2",
        "saes: [1]",
        "sae: 5",
        "logger: [1]",
        "evaluators: {a: 1}",
        "split: 2020-01-01",
        "model_from_pretrained_kwargs: {1: 2}",
        "epochs: 0",
        'output_path: ""',
    ],
)
def test_study_files(
    line: str, vit_folder: Path, world: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    settings = STUDY.format(model=vit_folder, data=world, out=tmp_path / "o")
    key = line.partition(":")[0]
    kept = [one for one in settings.splitlines() if not one.startswith(f"{key}:")]
    (tmp_path / "study.yaml").write_text("\n".join([*kept, line]))
    refused("train", "--config", tmp_path / "study.yaml", "--dry_run", "--no_evaluate")


@pytest.mark.parametrize(
    "change",
    [
        *(text(content, "config.json") for content in NOT_JSON),
        *(text(content, "preprocessor_config.json") for content in NOT_JSON),
        *(fifo(name) for name in ("config.json", "preprocessor_config.json", "model.safetensors")),
        *(folder_named(name) for name in ("config.json", "model.safetensors")),
        text(b"x" * 50, "model.safetensors"),
        *(
            fields("config.json", **{name: value})
            for name, value in (
                ("num_hidden_layers", 10**9),
                ("num_hidden_layers", "x"),
                ("hidden_size", 10**9),
                ("image_size", -5),
                ("patch_size", 0),
                ("num_labels", 10**10),
                ("architectures", ["BertModel"]),
                ("model_type", ["x"]),
                ("hidden_act", ["x"]),
            )
        ),
        *(
            fields("preprocessor_config.json", **{name: value})
            for name, value in (
                ("size", {"height": 10**6, "width": 10**6}),
                ("size", {"height": "x", "width": 1}),
                ("image_mean", "x"),
                ("image_std", [0, 0, 0]),
                ("image_mean", [float("nan")] * 3),
                ("rescale_factor", 0),
            )
        ),
    ],
)
def test_model_folders(
    change: Change, vit_folder: Path, sae: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(vit_folder, tmp_path / "model")
    shutil.copytree(sae, tmp_path / "sae")
    change(tmp_path / "model")
    metadata(model_name=str(tmp_path / "model"))(tmp_path / "sae")
    refused("evaluate", tmp_path / "sae", *FAST)


# Results -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with thumbnails and figures."""
    folder = tmp_path_factory.mktemp("results") / "results"
    make_results(folder, n_layers=1)
    return folder


@pytest.mark.parametrize("content", [*NOT_JSON, "{}", "[]," * 5_000_000])
def test_results_that_are_none(
    content: str | bytes, tmp_path: Path, refused: Callable[..., str]
) -> None:
    text(content, "results.json")(tmp_path)
    refused("report", tmp_path)


@pytest.mark.parametrize("kind", ["thumbnail", "figure"])
@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.jpg", "link.jpg", "a\0b"])
def test_the_report_holds_no_file_from_elsewhere(
    kind: str, name: str, results: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    (tmp_path / "secret.jpg").write_bytes(b"\xff\xd8\xffsecret")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    content = json.loads((folder / "results.json").read_text())
    entry = content["saes"][0]
    if kind == "figure":
        entry["evaluators"]["pair_depth"]["figures"]["curve"] = name
    else:
        entry["most_specific"][0]["images"][0]["thumbnail"] = name
    (folder / "results.json").write_text(json.dumps(content))
    assert "lies outside" in (found := refused("report", folder)) or "not a path" in found
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("content", NOT_JSON)
def test_figures_that_are_none(
    content: str | bytes, results: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    saved = json.loads((folder / "results.json").read_text())
    saved["saes"][0]["evaluators"]["pair_depth"]["figures"]["curve"] = "f.json"
    (folder / "results.json").write_text(json.dumps(saved))
    text(content, "f.json")(folder)
    assert "not a figure" in refused("report", folder)


# Checkpoints -------------------------------------------------------------------------------------


def signed_again(folder: Path) -> None:
    """Make the manifest valid for the files as they are."""
    content = json.loads((folder / "checkpoint.json").read_text())
    for name in content["files"]:
        data = (folder / name).read_bytes()
        content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "checkpoint.json").write_text(json.dumps(content))


def state(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        content = torch.load(folder / "trainer_state.pt", weights_only=True)
        torch.save({**content, **changes}, folder / "trainer_state.pt")

    return change


@pytest.fixture(scope="module")
def checkpoint_made(
    vit: Any, vit_folder: Path, photos: Path, images: Any, tmp_path_factory: Any
) -> Any:
    from tiny_runs import make_training

    training = make_training(vit, vit_folder, photos, images, tmp_path_factory.mktemp("training"))
    training.runner(training.single(n_checkpoints=1)).run()
    return training, next(p for p in training.checkpoints.iterdir() if p.name.isdecimal())


@pytest.mark.parametrize(
    "change",
    [
        *(
            text(content, name)
            for name in ("trainer_state.pt", "activation_scaler.json")
            for content in ("[]", "", "x" * 50)
        ),
        text("[]", "activations_store_state.json"),
        text("x" * 50, "sae_weights.safetensors"),
        state(n_training_samples=-1),
        state(optimizer=None),
        state(act_freq_scores=-1),
        state(n_frac_active_samples=float("nan")),
        text('{"scaling_factor": -1, "has_whitening": false}', "activation_scaler.json"),
        fields("activations_store_state.json", position=[-1, 0, 0]),
        fields("activations_store_state.json", position="x"),
        fields("activations_store_state.json", n_processed=-1),
        number("W_dec", float("nan")),
    ],
)
def test_damaged_content_under_a_valid_manifest(
    change: Change, checkpoint_made: Any, tmp_path: Path
) -> None:
    from taxolens.registry.errors import TaxolensError

    training, checkpoint = checkpoint_made
    folder = tmp_path / "run" / checkpoint.name
    shutil.copytree(checkpoint, folder)
    change(folder)
    signed_again(folder)
    cfg = training.single(resume_from_checkpoint=str(folder), output_path=str(tmp_path / "o"))
    with pytest.raises(TaxolensError) as caught:
        training.runner(cfg).run()
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        *(text(content, "checkpoint.json") for content in NOT_JSON),
        fields("checkpoint.json", files={"cfg.json": None}),
        fields("checkpoint.json", files={"../../../x": {"bytes": 1, "sha256": "x"}}),
        fields("checkpoint.json", files=[None]),
        fields("checkpoint.json", run=None),
        fields("checkpoint.json", n_training_samples="x"),
    ],
)
def test_manifests(change: Change, checkpoint_made: Any, tmp_path: Path) -> None:
    from taxolens.plugin.training.checkpoints import verify_checkpoint
    from taxolens.registry.errors import CheckpointError

    folder = tmp_path / "8"
    shutil.copytree(checkpoint_made[1], folder)
    change(folder)
    with pytest.raises(CheckpointError, match="damaged"):
        verify_checkpoint(folder)


# Folders, files, signals ---------------------------------------------------------------------------


def test_a_second_writer_is_refused_by_name(training: Any, sae: Path, vit: Any) -> None:
    options = {"override_model": vit, "evaluators": "pair_depth", "progress": False}
    with only_writer(training.output, "output_path"):
        with pytest.raises(ConfigError, match="output_path: another process is writing there"):
            training.runner(training.single()).run()
        with pytest.raises(ConfigError, match="output_path: another process is writing there"):
            evaluate_run(sae, output_path=training.output, **options)
    training.runner(training.single()).run()


def test_weights_have_the_permissions_of_the_umask(training: Any) -> None:
    before = os.umask(0o027)
    try:
        training.runner(training.single(n_checkpoints=1)).run()
    finally:
        os.umask(before)
    for folder in (training.output, training.checkpoints):
        for file in folder.rglob("*"):
            if file.is_file():
                assert stat.S_IMODE(file.stat().st_mode) == 0o640, file


def test_an_unfinished_checkpoint_is_removed_by_the_run_that_resumes(training: Any) -> None:
    training.runner(training.single(n_checkpoints=1)).run()
    left = training.checkpoints / "8"
    left.mkdir()
    (left / "cfg.json").write_text("{}")
    whole = next(p for p in training.checkpoints.iterdir() if (p / "checkpoint.json").exists())
    training.runner(training.single(resume_from_checkpoint=str(whole))).run()
    assert not left.exists() and whole.exists()


SIGNALLED = """
import os, signal, sys
# Under nohup, or in the background of a script, a process starts with signals ignored.
signal.signal(signal.{name}, signal.default_int_handler if "{name}" == "SIGINT" else signal.SIG_DFL)
from taxolens.plugin import cli
def run(args):
    os.kill(os.getpid(), signal.{name})
    import time
    time.sleep(30)
cli._dispatch = run
sys.exit(cli.main(["list"]))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_signals_outside_of_training_end_a_command_with_a_word(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED.format(name=name)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = {"SIGINT": "interrupted"}.get(name, name)
    assert (done.returncode, done.stderr) == (1, f"error: {said}\n")


def test_a_csv_holds_no_formula() -> None:
    table = pd.DataFrame({"=name": ["=1+1", "@x", "cat", "-5"], "f1": [-0.5, 1.0, 2.0, 1 / 3]})
    expected = "'=name,f1\n'=1+1,-0.5\n'@x,1\ncat,2\n'-5,0.333333\n"
    assert as_csv(table) == expected


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=6)


@given(
    st.lists(st.sampled_from(["None", "NA", "nan", "007", "1e5", "True", "'=x", ""]) | TEXTS),
    st.lists(st.floats(allow_nan=False, width=32)),
)
def test_tables_of_an_evaluation_are_read_as_they_were_written(names: list, values: list) -> None:
    n = min(len(names), len(values))
    table = pd.DataFrame(
        {"-node": names[:n], "latent": range(n), "f1": values[:n], "few": [math.nan] * n}
    )
    found = from_csv(io.StringIO(as_csv(table)), text=("-node",))
    assert list(found) == list(table)
    assert list(found["-node"]) == names[:n]
    assert list(found["latent"]) == list(range(n)) and found["few"].isna().all()
    assert found["f1"].tolist() == [float(f"{value:.6g}") for value in values[:n]]
    assert len(from_csv(io.StringIO(as_csv(table)), n_rows=1)) == min(n, 1)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["007", "12"], ["007", "12"]),
        (["1.50", "2"], ["1.50", "2"]),
        (["=1+1", "12"], ["=1+1", "12"]),
        (["NA", "None"], ["NA", "None"]),
        (["12", "13"], [12, 13]),
        ([True, False], [True, False]),
    ],
)
def test_what_is_no_number_of_ours_stays_text(written: list, read: list) -> None:
    found = from_csv(io.StringIO(as_csv(pd.DataFrame({"a": written}))))["a"].tolist()
    assert found == read and [type(x) for x in found] == [type(x) for x in read]


def test_only_tables_and_figures_of_earlier_results_are_removed(
    vit_folder: Path, world: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = run_settings(vit_folder, world, eval_split="validation")
    save_sae(run, "blocks.0.hook_resid_post", settings)
    (run / "runner_cfg.json").write_text(json.dumps(settings))
    small = {"progress": False, "n_permutations": 2, "n_groups": 0, "evaluators": "pair_depth"}
    evaluate_run(run, **small)
    content = json.loads((run / "results.json").read_text())
    (sae,) = content["saes"]
    found = sae["evaluators"]["pair_depth"]
    sae["fingerprint"] = "0"  # so that it is measured again, and its files are replaced
    ours = run / "tables" / "earlier.csv"
    ours.write_text("node\n")
    (run / "links").symlink_to(".")
    found["tables"] |= {
        "weights": "sae_weights.safetensors",
        "up": "tables/../cfg.json",
        "ours": "tables/earlier.csv",
    }
    found["figures"] |= {"settings": "runner_cfg.json", "link": "links/runner_cfg.json"}
    (run / "results.json").write_text(json.dumps(content))
    evaluate_run(run, **small)
    assert not ours.exists()
    for kept in ("sae_weights.safetensors", "cfg.json", "runner_cfg.json"):
        assert (run / kept).exists(), kept
