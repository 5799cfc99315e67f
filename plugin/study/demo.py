"""The demo: a small training and evaluation on the images and the model inside the package."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..reporting.results import Results
from .job import Job
from .settings import Settings, gather

PRESET = "demo"
ENVIRONMENT = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


class Demo(NamedTuple):
    """The results of the demo, its files, and its duration."""

    results: Results
    report: Path
    wandb_folder: Path
    seconds: float


def run_demo(output_path: str | Path, *, progress: bool = True, **settings: object) -> Demo:
    """Train class-token SAEs at every block in one pass, measure them, write report and W&B run.

    Needs no network and no account: the W&B run is offline, under ``<output_path>/wandb``.

    Args:
        output_path: the folder of all files.
        progress: show progress bars.
        **settings: changes to the preset `demo`, by the names of `taxolens train`.
    """
    started = time.perf_counter()
    folder = Path(output_path)
    places: Settings = {
        "output_path": str(folder),
        "overwrite_output": True,
        "cached_activations_path": str(folder / "training_activations"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    # Activations that an earlier version of the package cached would be refused.
    shutil.rmtree(places["cached_activations_path"], ignore_errors=True)
    with _environment(ENVIRONMENT | {"WANDB_DIR": str(folder)}):
        job = Job(gather(preset=PRESET, flags={**places, **settings}))
        job.train()
        results, report = job.evaluate(progress=progress)
    return Demo(results, report, folder / "wandb", time.perf_counter() - started)


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Set environment variables meanwhile."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
