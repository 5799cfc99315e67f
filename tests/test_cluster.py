"""The batch scripts of examples/cluster: their command lines train, and a signal requeues the job."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

CLUSTER = Path(__file__).resolve().parent.parent / "examples" / "cluster"
SBATCH = sorted(path.name for path in CLUSTER.glob("*.sbatch"))
# srun without Slurm: options end where the command begins. It passes TERM on, as Slurm's does.
SRUN = '#!/usr/bin/env bash\nexec "$@"\n'
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$SLURM_CALLS"
if [[ "$1" == show ]]; then echo localhost; fi
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script, with stand-ins for Slurm's commands."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "CLUSTER_SCRIPTS": str(CLUSTER),
        "SLURM_CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_ARRAY_TASK_ID": "2",
        "OMP_NUM_THREADS": "1",
        "RANKS": "1",
        "PORT": "0",  # any that is free
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny vision transformer, and pictures of two classes."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    transformers.Dinov2Model(config).save_pretrained(folder / "model")
    size = {"height": 16, "width": 16}
    transformers.BitImageProcessorPil(size=size, crop_size=size).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for index in range(16):
        path = folder / "pictures" / f"class_{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return folder


def flags(inputs: Path, output: Path) -> list[str]:
    return [
        *("--model_name", str(inputs / "model"), "--dataset_path", str(inputs / "pictures")),
        *("--hook_names", "blocks.0.hook_resid_post", "--architecture", "topk", "--k", "2"),
        *("--d_sae", "32", "--epochs", "1", "--train_batch_size_tokens", "8", "--no_evaluate"),
        *("--output_path", str(output), "--checkpoint_path", f"{output}-checkpoints"),
        *("--use_cached_activations", "true", "--cached_activations_path", f"{output}-cache"),
        *("--log_to_wandb", "false", "--device", "cpu"),
    ]


@pytest.mark.parametrize("script", SBATCH)
def test_the_command_line_of_a_batch_script_trains(
    script: str, environment: dict[str, str], inputs: Path, tmp_path: Path
) -> None:
    given = flags(inputs, tmp_path / "two words")
    if script == "array.sbatch":
        studies = tmp_path / "studies.txt"
        studies.write_text("--help\n" + " ".join(f"'{flag}'" for flag in given) + "\n--help\n")
        given = [str(studies)]
    done = subprocess.run(
        ["bash", str(CLUSTER / script), *given], env=environment, cwd=tmp_path, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two words" / "sae_weights.safetensors").exists()


# Stands for Python: a run that writes its arguments, and ends with status 1 after TERM.
RUN = """#!/usr/bin/env bash
echo "$@" > arguments
trap 'touch ended; exit 1' TERM
touch started
while true; do sleep 0.05; done
"""


@pytest.mark.parametrize("script", SBATCH)
def test_a_signal_ends_the_run_and_requeues_the_job(
    script: str, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "bin" / "run").write_text(RUN)
    (tmp_path / "bin" / "run").chmod(0o755)
    (tmp_path / "studies.txt").write_text("--seed 1\n--seed 2\n")
    environment["PYTHON"] = "run"
    given = ["studies.txt"] if script == "array.sbatch" else ["--seed", "2"]
    job = subprocess.Popen(["bash", str(CLUSTER / script), *given], env=environment, cwd=tmp_path)
    wait_for(tmp_path / "started", job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait() == 0
    assert (tmp_path / "ended").exists()
    assert "requeue 77" in (tmp_path / "calls").read_text().splitlines()
    arguments = (tmp_path / "arguments").read_text().strip()
    assert arguments.endswith("-m taxolens train --seed 2 --resume_from_checkpoint auto")


@pytest.mark.parametrize("script", SBATCH)
def test_a_run_that_fails_fails_the_job(
    script: str, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "studies.txt").write_text("--seed 1\n--seed 2\n")
    environment["PYTHON"] = "false"
    done = subprocess.run(
        ["bash", str(CLUSTER / script), "studies.txt"], env=environment, cwd=tmp_path
    )
    assert done.returncode == 1
    calls = tmp_path / "calls"
    assert not calls.exists() or "requeue" not in calls.read_text()


def wait_for(path: Path, job: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        assert job.poll() is None
        time.sleep(0.05)


def test_submitit_gets_the_runs_and_queues_them_again(monkeypatch, tmp_path: Path) -> None:
    seen: dict[str, object] = {}

    class Executor:
        def __init__(self, folder: str) -> None:
            seen["folder"] = folder

        def update_parameters(self, **parameters: object) -> None:
            seen.update(parameters)

        def map_array(self, run: object, runs: list[list[str]]) -> list[object]:
            seen["run"], seen["runs"] = run, runs
            return [types.SimpleNamespace(job_id=f"5_{index}") for index in range(len(runs))]

    package, helpers = types.ModuleType("submitit"), types.ModuleType("submitit.helpers")
    package.AutoExecutor = Executor  # type: ignore[attr-defined]
    helpers.DelayedSubmission = lambda *call: call  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "submitit", package)
    monkeypatch.setitem(sys.modules, "submitit.helpers", helpers)
    spec = importlib.util.spec_from_file_location("submit", CLUSTER / "submit.py")
    assert spec is not None and spec.loader is not None
    submit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(submit)

    submit.main(["--studies", str(CLUSTER / "studies.txt")])
    assert seen["runs"][1][:4] == ["--preset", "dinov2-base-imagenet", "--seed", "1"]  # type: ignore[index]
    assert len(seen["runs"]) == 3  # type: ignore[arg-type]
    assert seen["gpus_per_node"] == 1

    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str]) -> None:
            started.append(command)
            self.status = 0

        def wait(self) -> int:
            return self.status

        def terminate(self) -> None:
            self.status = 1

    monkeypatch.setattr(submit.subprocess, "Popen", Process)
    train = submit.Train()
    assert train(["--seed", "3"]) == "--seed 3"
    command = [sys.executable, "-m", "taxolens", "train", "--seed", "3"]
    assert started == [[*command, "--resume_from_checkpoint", "auto"]]
    again, given = train.checkpoint(["--seed", "3"])
    assert isinstance(again, submit.Train) and given == ["--seed", "3"]
    assert train.process.status == 1
