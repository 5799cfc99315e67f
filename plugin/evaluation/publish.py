"""Publishing of the SAEs of a run on the Hugging Face hub: SAELens's layout, with a card and results."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from safetensors import SafetensorError, safe_open

from ...registry.errors import CheckpointError, ConfigError
from ...registry.files import (
    UnreadableError,
    inside,
    is_path,
    open_regular,
    reason,
    write_atomically,
)
from ...registry.heads import head_name
from ...registry.loaders.parts.hub import hub_errors
from ...registry.loaders.parts.read import HUB_NAME
from ..reporting.headlines import headlines, with_q
from ..reporting.model_card import model_card
from ..reporting.report import REPORT_FILENAME, Report, write_report
from ..reporting.results import RESULTS_FILENAME, Results, SAEResult
from .held_out import knows_training
from .sae_folders import SAEFolder, find_saes

CARD = "README.md"
PICTURE = "metric.svg"
WEIGHTS = (SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME)
PATH = re.compile(  # absolute, in a sentence: in quotes, or of two parts or more; none of an address
    r"""(?<=')~?/[^'\n]+(?=')|(?<![\w.:/~-])(?:~?(?:/[^/\s'",;:()<>]+){2,}|[A-Za-z]:[\\/][^\s'",;:()<>]+)"""
)
FILES = {
    "results.json": "every number with its nulls",
    REPORT_FILENAME: "the report, one file that opens without a network",
}


def publish(
    run: str | Path,
    repository: str,
    *,
    results: str | Path | None = None,
    dry_run: str | Path | None = None,
    private: bool = False,
    licence: str | None = None,
    with_report: bool = True,
) -> str:
    """Upload the SAEs of an evaluated run in one commit, or write the same to a folder.

    A repository that exists gets the files in addition; those of the same names are replaced. Paths of
    this machine are replaced by their last part.

    Args:
        run: a run folder or an SAE folder.
        repository: ``owner/name`` on the Hugging Face hub; it is made where it is missing.
        results: a results.json, or its folder; by default that of the run.
        dry_run: a new folder to write to, in place of the upload.
        private: whether a new repository is private.
        licence: of the SAEs, by the hub's identifier, e.g. ``"mit"``.
        with_report: whether the report is among the files. It holds small copies of images.

    Returns:
        the address of the commit, or the folder.

    Raises:
        ConfigError: no such run or repository, a checkpoint, numbers of other weights, a folder that
            is not empty, or a file that is a link to one outside of the run.
        CheckpointError: `sparsity.safetensors` is no such file.
        DataError: no results.
        TaxolensError: the hub cannot be reached.
    """
    if not HUB_NAME.fullmatch(repository):
        raise ConfigError("repository", "no name", given=repository, allowed="OWNER/NAME")
    if dry_run is not None:
        folder = Path(dry_run)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                "dry_run", "already there", given=str(folder), allowed="a new or empty folder"
            )
    saes = find_saes(run)
    place = Path(run if results is None else results).expanduser()
    _check_own(Path(run).expanduser(), (RUNNER_CFG_FILENAME,))
    _check_own(place if place.is_dir() else place.parent, (RESULTS_FILENAME,))
    for sae in saes:
        _check_own(sae.path, (SAE_CFG_FILENAME, *WEIGHTS))
    found = _results_of(saes, Results.load(run if results is None else results))
    settings = {"licence": licence, "with_report": with_report}
    if dry_run is not None:
        return str(_write(Path(dry_run), saes, found, repository, **settings))
    with tempfile.TemporaryDirectory() as temporary:
        folder = _write(Path(temporary), saes, found, repository, **settings)
        with hub_errors("repository", repository):
            api = HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=f"{len(saes)} SAEs with taxolens",
            )
    return str(commit.commit_url)


def _results_of(saes: Sequence[SAEFolder], results: Results) -> Results:
    """The results of these SAEs alone, under the ids that they have in the repository."""
    digests = {sae.id: sae.weights_digest() for sae in saes}
    by_weights: dict[tuple[str, str], SAEResult] = {
        (result.weights, result.place): result for result in results.saes if result.weights
    }
    places = {sae.id: head_name(sae.hook_name, sae.head) for sae in saes}
    missing = [sae.id for sae in saes if (digests[sae.id], places[sae.id]) not in by_weights]
    if missing or not results.complete:
        raise ConfigError(
            "results",
            f"they have no numbers of {', '.join(missing)} with these weights"
            if missing
            else "the evaluation is not complete",
            given=str(results.folder),
            allowed="what `taxolens evaluate` writes for them",
        )
    own = []
    for sae in saes:
        result = by_weights[digests[sae.id], places[sae.id]]
        names = {"id": sae.id, "run": sae.run, "name": sae.name}
        evaluators = {
            name: replace(found, error=_public(found.error), notes=_public(found.notes))
            for name, found in result.evaluators.items()
        }
        model_name = public_name(result.model_name)
        own.append(replace(result, **names, model_name=model_name, evaluators=evaluators))
    return with_q(
        replace(
            results,
            saes=own,
            settings={**_public(results.settings), "runs": {sae.run: sae.run for sae in saes}},
            dataset=replace(
                results.dataset,
                path=public_name(results.dataset.path),
                skipped=[
                    replace(skipped, reason=_public(skipped.reason))
                    for skipped in results.dataset.skipped
                ],
                training_known=all(map(knows_training, saes)),
            ),
            taxonomy=replace(results.taxonomy, name=public_name(results.taxonomy.name)),
        )
    )


def _write(
    folder: Path,
    saes: Sequence[SAEFolder],
    results: Results,
    repository: str,
    *,
    licence: str | None,
    with_report: bool,
) -> Path:
    for sae in saes:
        _write_sae(sae, folder / sae.id)
    results.save(folder)
    files = dict(FILES)
    if with_report:
        write_report(results, folder / REPORT_FILENAME, interactive=False)
    else:
        del files[REPORT_FILENAME]
    shown = headlines(results)
    if not shown:
        raise ConfigError(
            "results", "no evaluator gave a number", allowed="evaluators with numbers"
        )
    write_atomically(folder / PICTURE, Report(results).figure(shown[0]))
    trained = {sae.id: _public({**sae.settings, **(sae.cfg.get("metadata") or {})}) for sae in saes}
    card = model_card(
        results,
        repository,
        trained,
        picture=PICTURE,
        files=files,
        base_models=_on_the_hub(sae.model_name for sae in saes),
        datasets=_on_the_hub(sae.setting("dataset_path") for sae in saes),
        licence=licence,
    )
    write_atomically(folder / CARD, card)
    return folder


def _write_sae(sae: SAEFolder, folder: Path) -> None:
    if (sae.path / TRAINER_STATE_FILENAME).exists():
        raise ConfigError(
            "run", f"{sae.path} is a checkpoint", allowed="the output of a run that has ended"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in WEIGHTS:
        if (sae.path / name).exists():
            _copy_tensors(sae.path / name, folder / name)
    cfg = _public(sae.cfg)
    cfg |= {"metadata": cfg.get("metadata") or {}, "device": "cpu"}
    write_atomically(folder / SAE_CFG_FILENAME, json.dumps(cfg, indent=1))
    if sae.settings:
        settings = {name: value for name, value in sae.settings.items() if name != "logger"}
        write_atomically(folder / RUNNER_CFG_FILENAME, json.dumps(_public(settings), indent=1))


def _check_own(folder: Path, names: Sequence[str]) -> None:
    """Check that files whose content is published are the folder's own: a link may name any file.

    Raises:
        ConfigError: one of them lies outside of the folder.
    """
    for name in names:
        try:
            inside(folder, name)
        except UnreadableError as error:
            allowed = "a copy of the file in its place"
            raise ConfigError("run", f"{folder}: {error}", allowed=allowed) from None


def _copy_tensors(file: Path, copy: Path) -> None:
    """Copy a file of tensors. Raises CheckpointError where it is another file."""
    try:
        with (
            open_regular(file) as source,
            safe_open(file, framework="pt"),
            open(copy, "wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (OSError, UnreadableError, SafetensorError) as error:
        raise CheckpointError(file, f"not a file of tensors: {reason(error)}") from None


def _public(value: Any) -> Any:
    """`value` with the paths of this machine, in containers and in sentences, as their last parts."""
    if isinstance(value, Mapping):
        return {name: _public(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(item) for item in value]
    found = public_name(value)
    if not isinstance(found, str) or found != value:
        return found
    head, colon, tail = value.partition(": ")
    if colon and is_path(head) and Path(head).is_absolute():  # FILE: what is wrong with it
        return f"{public_name(head)}: {_public(tail)}"
    return PATH.sub(lambda match: re.split(r"[/\\]", match[0])[-1], value)


def public_name(value: Any) -> Any:
    """A path of this machine as its last part; anything else as it is."""
    if not isinstance(value, str) or not is_path(value):
        return value
    place = Path(os.path.expanduser(value))
    is_one = os.path.exists(place) or (place.is_absolute() and ": " not in value)
    return (place.name or value) if is_one else value


def _on_the_hub(names: Any) -> list[str]:
    """Those that can be names on the hub, each once."""
    named = (n for n in dict.fromkeys(names) if isinstance(n, str) and public_name(n) == n)
    return [name for name in named if HUB_NAME.fullmatch(name)]
