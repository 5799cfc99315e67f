"""Logging of results to Weights & Biases, under the keys that docs/wandb.md defines.

An error of W&B does not end a run: where it cannot be reached, or refuses the key, logging goes on
offline, with a warning that shows how to sync it later.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plotly.io
import wandb

from ...registry.errors import ConfigError
from ...registry.nulls import DECISIVE
from .compare import from_csv
from .report import read_figure
from .results import NO_NULL, RESULTS_FILENAME, MetricResult, NullResult, Results, SAEResult
from .series import Series, all_series, positions

logger = logging.getLogger(__name__)

WANDB_MODES = ("online", "offline", "disabled")
ROOM = 1 << 16  # bytes that a disk has left, where it is not full
MAX_TABLE_ROWS = 1000  # the complete tables are in the artifact


def ensure_wandb(mode: str | None = None, *, init_timeout: float = 30.0, **init: Any) -> str:
    """Start the W&B run, offline or disabled where it cannot start; return the mode in effect.

    Called before SAELens's own `wandb.init`, which then finds this run instead of starting one.
    After a failure `WANDB_MODE` is set for the process, so that later calls do not wait for W&B.

    Args:
        mode: "online", "offline" or "disabled"; None uses W&B's own settings.
        init_timeout: seconds to wait for W&B.
        **init: arguments of `wandb.init`: project, entity, name, id, config, dir, group, ...

    Raises:
        ConfigError: another mode.
    """
    if mode is not None and mode not in WANDB_MODES:
        raise ConfigError("wandb mode", "not known", given=mode, allowed=", ".join(WANDB_MODES))
    if wandb.run is not None:
        return _mode_of(wandb.run)
    if mode is None:
        mode = os.environ.get("WANDB_MODE")
    place = Path(init.get("dir") or os.environ.get("WANDB_DIR") or ".")
    if not os.access(place, os.W_OK):
        if place.exists():
            init["dir"] = tempfile.gettempdir()  # as W&B would, with two warnings of its own
            logger.warning("W&B cannot write into %s; it uses %s.", place, init["dir"])
    elif _is_full(place):
        logger.warning("W&B is off: the disk of %s is full.", place.absolute())
        mode = "disabled"
    reasons: list[str] = []
    attempts = list(dict.fromkeys((mode, "offline", "disabled")))
    for attempt in attempts:
        _set_mode(attempt)
        try:
            settings = wandb.Settings(init_timeout=init_timeout, quiet=True)
            settings.silent = settings.silent or bool(reasons)  # the warning below has it all
            run = wandb.init(settings=settings, **init)
            _log_without_failing()
        except Exception as error:  # W&B's errors have no common base
            reasons.append(_first_line(error))
            if attempt == attempts[-1]:
                raise
            continue
        failed = f"W&B could not start ({'; '.join(reasons)}); " if reasons else "W&B "
        if _mode_of(run) == "offline" and mode != "offline":
            folder = Path(run.dir).parent
            logger.warning("%slogs offline; upload it later with: wandb sync %s", failed, folder)
        elif reasons:
            logger.warning("%sgoing on %s.", failed, _mode_of(run))
        return _mode_of(run)
    raise AssertionError("unreachable: the last attempt returns or raises")


_paused: tuple[Any, str] | None = None  # W&B's run of an interrupted training, and its checkpoints


@contextmanager
def of_one_training(
    checkpoints: str | None, *, resumes: bool, interrupted: type[BaseException]
) -> Iterator[None]:
    """Within, the W&B run that begins is that of one training, which SAELens ends with it.

    After an error it is ended here, as failed: the next training of the process would log into it. It stays
    open where the caller has begun it, and where the training can be resumed, for the training that does;
    any other one ends it first.

    Args:
        checkpoints: the folder of the training's checkpoints; None where it has none.
        resumes: whether it goes on from one of them.
        interrupted: the error of a training that can be resumed.
    """
    global _paused
    paused, _paused = _paused, None
    active = wandb.run
    if paused is not None and active is paused[0]:
        if not (resumes and paused[1] == checkpoints):
            _end_as_failed()
        active = None  # begun by a training
    try:
        yield
    except BaseException as error:
        if active is None and wandb.run is not None:
            if isinstance(error, interrupted) and checkpoints is not None:
                _paused = wandb.run, checkpoints
            else:
                _end_as_failed()
        raise


def _end_as_failed() -> None:
    with suppress(Exception):  # of W&B: it must not replace the error of the training
        wandb.finish(exit_code=1)


@contextmanager
def no_second_run() -> Iterator[None]:
    """Within, SAELens's `wandb.init` finds the active run without messages and an empty folder."""
    run = wandb.run
    if run is None or run.disabled:
        yield
        return
    own = Path(run.dir).parent
    before = set(own.parent.glob("*run-*"))
    settings = wandb.setup().settings
    silent, settings.silent = settings.silent, True
    try:
        yield
    finally:
        settings.silent = silent
        if _is_full(own):
            logger.warning("the disk of %s is full: this W&B log is not complete.", own)
        for other in set(own.parent.glob("*run-*")) - before:
            if not any(other.glob("*.wandb")):
                shutil.rmtree(other, ignore_errors=True)
        latest = own.parent / "latest-run"
        if latest.is_symlink() and not latest.exists():
            latest.unlink()
            latest.symlink_to(own.name, target_is_directory=True)


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < ROOM
    except OSError:
        return False


def _log_without_failing() -> None:
    """Let W&B's own log files drop what cannot be written.

    Else each of its messages on a full disk is a traceback, and `wandb.finish` raises.
    """
    for handler in logging.getLogger("wandb").handlers:
        if isinstance(handler, logging.FileHandler) and not isinstance(handler.stream, _Dropping):
            handler.setStream(_Dropping(handler.stream))  # type: ignore[arg-type]  # as good as a file


class _Dropping:
    """A text file; what cannot be written is dropped."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


def _set_mode(mode: str | None) -> None:
    """Set the mode for this process; None uses W&B's settings.

    W&B reads its environment at first use, and `wandb.init` asks for a key even where a run is
    active. `teardown` drops what it has read, so that SAELens's `wandb.init` does not fail.
    """
    if mode is not None:
        os.environ["WANDB_MODE"] = mode
    if wandb.setup().settings.mode != (mode or "online"):
        wandb.teardown()


def _mode_of(run: Any) -> str:
    return "disabled" if run.disabled else run.settings.mode


def log_results(
    results: Results,
    *,
    mode: str | None = None,
    report: str | Path | None = None,
    saes: Mapping[str, str | Path] | None = None,
    **init: Any,
) -> str | None:
    """Log `results` into the active W&B run, or into a new one, which is finished afterwards.

    Call it when everything is saved: errors of W&B give a warning.

    Args:
        results: the results.
        mode: see `ensure_wandb`.
        report: report.html, for the artifact of results.json.
        saes: SAE id -> folder, to be logged as artifacts of type "model".
        **init: arguments of `wandb.init` for a new run.

    Returns:
        the folder of the W&B run; None where W&B is disabled or failed.

    Raises:
        ConfigError: another mode.
    """
    started = wandb.run is None
    try:
        if started:
            ensure_wandb(mode, job_type="evaluate", config=_config(results), **init)
        run = wandb.run
        assert run is not None
        if run.disabled:
            return None
        if not started:
            run.config.update({"evaluation": _config(results)}, allow_val_change=True)
        run.define_metric("layers/*", step_metric="layers/layer")
        run.log(flat_metrics(results))
        for series, prefix in prefixed_series(results):
            if prefix:
                run.define_metric(f"{prefix}layers/*", step_metric=f"{prefix}layers/layer")
            for row in layer_rows(series):
                run.log({f"{prefix}{key}": value for key, value in row.items()})
        run.log(dict(_charts(results)) | dict(_tables(results)) | dict(_figures(results)))
        for artifact in _artifacts(results, report, saes or {}):
            run.log_artifact(artifact)
        return str(Path(run.dir).parent)
    except Exception as error:
        if isinstance(error, ConfigError):
            raise
        logger.warning(
            "W&B logging failed (%s); the results are safe in %s",
            _first_line(error),
            results.folder or RESULTS_FILENAME,
        )
        return None
    finally:
        if started and wandb.run is not None:
            with suppress(OSError):  # a full disk, of which the warning is above
                wandb.finish()


def flat_metrics(results: Results) -> dict[str, float]:
    """``[<sae>/]eval/<evaluator>/<metric>`` and, per null, ``…/<metric>/<null>`` -> number; L0."""
    flat: dict[str, float] = {}
    for sae in results.saes:
        prefix = f"{sae.id}/" if len(results.saes) > 1 else ""
        of = {"l0": sae.l0, "l0_token": sae.l0_token}
        flat |= {f"{prefix}eval/{name}": l0 for name, l0 in of.items() if math.isfinite(l0)}
    for sae, evaluator, metric, number in results.rows():
        prefix = f"{sae.id}/" if len(results.saes) > 1 else ""
        key = f"{prefix}eval/{evaluator}/{metric}"
        flat |= metric_items(key, number) | certainty_items(key, number)
    return flat


def metric_items(key: str, number: MetricResult) -> dict[str, float]:
    """A number and its nulls as W&B scalars, without undefined ones."""
    items = {key: number.value} | {f"{key}/{n}": null.mean for n, null in number.nulls.items()}
    return {name: value for name, value in items.items() if math.isfinite(value)}


def certainty_items(key: str, number: MetricResult) -> dict[str, float]:
    """The interval, p, q, draws, support and `judged` of a number as W&B scalars, without undefined ones.

    `judged` is 0 where a value is computed from too few things or draws, NaN where it has no null.
    """
    permuted = number.nulls.get(DECISIVE, NullResult())
    items = {
        "low": number.low,
        "high": number.high,
        "p": permuted.p,
        "q": permuted.q,
        "draws": permuted.n or math.nan,
        "support": math.nan if number.support is None else number.support,
        "judged": math.nan if number.undecided == NO_NULL else float(not number.not_judged),
    }
    return {f"{key}/{name}": float(v) for name, v in items.items() if math.isfinite(v)}


def layer_rows(series: Series) -> Iterator[dict[str, float]]:
    """One row per layer: ``layers/layer``, ``layers/<evaluator>/<metric>`` and its nulls."""
    for sae, (position, _) in zip(series, positions(series), strict=True):
        row: dict[str, float] = {"layers/layer": position}
        for evaluator, result in sae.evaluators.items():
            for metric, number in result.metrics.items():
                row |= metric_items(f"layers/{evaluator}/{metric}", number)
        yield row


def prefixed_series(results: Results) -> list[tuple[Series, str]]:
    """The curves over layers, each with the prefix of its keys: its label, with N for each * of it.

    W&B takes a * only at the end of what it is told about keys.
    """
    found = [series for series in all_series(results) if len(series) > 1]
    several = len(found) > 1
    return [(one, f"{one.label.replace('*', 'N')}/" if several else "") for one in found]


def _charts(results: Results) -> Iterator[tuple[str, Any]]:
    """One chart over layers per metric, of the value and its nulls."""
    for series, prefix in prefixed_series(results):
        rows = list(layer_rows(series))
        for evaluator, metric in results.metric_names():
            key = f"layers/{evaluator}/{metric}"
            lines = [k for k in dict.fromkeys(k for row in rows for k in row) if is_below(k, key)]
            if lines:
                yield (
                    f"{prefix}charts/{evaluator}/{metric}",
                    wandb.plot.line_series(
                        xs=[row["layers/layer"] for row in rows],
                        ys=[[row.get(line, math.nan) for row in rows] for line in lines],
                        keys=[line.removeprefix(key).strip("/") or "value" for line in lines],
                        title=f"{evaluator} / {results.label(evaluator, metric)}",
                        xname="layer",
                    ),
                )


def is_below(name: str, key: str) -> bool:
    """Whether `name` is the key of a metric or of one of its nulls."""
    return name == key or name.startswith(f"{key}/")


def _tables(results: Results) -> Iterator[tuple[str, Any]]:
    frame = results.frame()
    frame["layer"] = frame["layer"].astype(float)
    yield "tables/summary", wandb.Table(dataframe=frame)
    for sae, evaluator, name, file in _files(results, "tables"):
        prefix = f"{sae.id}/" if len(results.saes) > 1 else ""
        table = from_csv(file, n_rows=MAX_TABLE_ROWS)
        yield f"{prefix}tables/{evaluator}/{name}", wandb.Table(dataframe=table)


def _figures(results: Results) -> Iterator[tuple[str, Any]]:
    for sae, evaluator, name, file in _files(results, "figures"):
        prefix = f"{sae.id}/" if len(results.saes) > 1 else ""
        figure = plotly.io.from_json(json.dumps(read_figure(file)))
        yield f"{prefix}figures/{evaluator}/{name}", wandb.Plotly(figure)


def _files(results: Results, kind: str) -> Iterator[tuple[SAEResult, str, str, Path]]:
    if results.folder is None:
        return
    for sae in results.saes:
        for evaluator, result in sae.evaluators.items():
            for name, file in getattr(result, kind).items():
                if (path := results.file(file)) is not None:
                    yield sae, evaluator, name, path


def _artifacts(
    results: Results, report: str | Path | None, saes: Mapping[str, str | Path]
) -> Iterator[Any]:
    if results.folder is not None:
        artifact = wandb.Artifact("taxolens-results", type="evaluation")
        artifact.add_file(str(results.folder / RESULTS_FILENAME))
        if report is not None:
            artifact.add_file(str(report), name="report.html")
        for kind in ("tables", "figures"):
            if (results.folder / kind).is_dir():
                artifact.add_dir(str(results.folder / kind), name=kind)
        yield artifact
    for name, folder in saes.items():
        artifact = wandb.Artifact(_artifact_name(name), type="model")
        for file in sorted(Path(folder).iterdir()):
            if file.suffix in (".json", ".safetensors"):
                artifact.add_file(str(file))
        yield artifact


def _artifact_name(name: str) -> str:
    # W&B allows alphanumerics, dashes, underscores and dots only.
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _config(results: Results) -> dict[str, Any]:
    permuted = results.permuted_classes
    return {
        "settings": results.settings,
        "provenance": results.provenance,
        "dataset": {
            "path": results.dataset.path,
            "split": results.dataset.split,
            "n_images": results.dataset.n_images,
            "fingerprint": results.dataset.fingerprint,
        },
        "taxonomy": results.taxonomy.name,
        "permuted_classes": permuted and asdict(permuted),
        "architectures": {sae.id: sae.trained_as for sae in results.saes},
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
