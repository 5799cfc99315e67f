"""Files of published SAEs from the Hugging Face hub: one SAE and the config beside it, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ...errors import ConfigError, TaxolensError
from .checkpoint import is_weights_name, read_json
from .releases import PublishedSAE, Release

CONFIG = "config.json"
MAX_SHOWN = 8
NAMES = "a release and id of docs/releases.md or of SAELens, or OWNER/REPOSITORY:FOLDER on the hub"


def download(sae: PublishedSAE, *, force: bool = False) -> tuple[Path, str]:
    """The file of weights in the cache of huggingface_hub, with its config beside it; and the commit.

    Raises:
        ConfigError: there is no such repository, revision or file, or several files fit.
        TaxolensError: the hub cannot be reached, and the cache does not have the file.
    """
    with hub_errors(str(sae), sae.repository, sae.revision):
        names = _names(sae.repository, sae.revision)
        file = _the_file(sae, names)
        beside = [name for name in _configs_of(file) if name in names]
        *_, path = (
            hf_hub_download(sae.repository, name, revision=sae.revision, force_download=force)
            for name in (*beside, file)
        )
    snapshot = Path(path).parents[file.count("/")]
    return Path(path), snapshot.name


def published_in(release: Release) -> list[PublishedSAE]:
    """Every SAE of a release: those that are listed, and all others that the hub has.

    Raises:
        TaxolensError: the hub cannot be reached.
    """
    listed = [release.find(id) for id in release.saes]
    with hub_errors(release.name, release.repository):
        if release.owner is None:
            repositories = {"": _names(release.repository, None)}
        else:
            models = HfApi().list_models(author=release.owner, full=True)
            repositories = {
                model.id.partition("/")[2]: [s.rfilename for s in model.siblings or ()]
                for model in models
            }
    at = {(sae.repository, sae.file) for sae in listed}
    found = []
    for repository, names in sorted(repositories.items()):
        files = _weights(names, release.files)
        folders = [str(PurePosixPath(file).parent) for file in files]
        for file, folder in zip(files, folders, strict=True):
            place = folder if folders.count(folder) == 1 else file
            id = "/".join(part for part in (repository, place) if part not in ("", "."))
            sae = release.find(id)
            if (sae.repository, sae.file) not in at:
                found.append(sae)
    return listed + found


def model_of(sae: PublishedSAE) -> str | None:
    """The model of an SAE, without a download of its weights; None where that does not show it.

    It stands in the table, or in the config.json beside the weights.

    Raises:
        ConfigError: there is no such repository.
        TaxolensError: the hub cannot be reached.
    """
    if known := sae.known.get("model_name"):
        return str(known)
    place = PurePosixPath(sae.file)
    folder = place.parent if is_weights_name(place.name) else place
    with hub_errors(str(sae), sae.repository, sae.revision):
        try:
            file = hf_hub_download(sae.repository, str(folder / CONFIG), revision=sae.revision)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
    found = read_json(Path(file)).get("model_name")
    return found if isinstance(found, str) else None


def _names(repository: str, revision: str | None) -> list[str]:
    """The names of the files of a repository; without a network, of those in the cache."""
    try:
        info = HfApi().model_info(repository, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError):
        raise
    except Exception:  # no network; its exceptions differ by version of huggingface_hub
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        return [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
    return [sibling.rfilename for sibling in info.siblings or ()]


def _weights(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return sorted(
        name
        for name in names
        if is_weights_name(name)
        and any(fnmatch(name, pattern) or fnmatch(name, f"*/{pattern}") for pattern in patterns)
    )


def _the_file(sae: PublishedSAE, names: Sequence[str]) -> str:
    if sae.file in names:
        return sae.file
    files = _weights(names, sae.files)
    found = [name for name in files if not sae.file or name.startswith(f"{sae.file}/")]
    if len(found) == 1:
        return found[0]
    raise ConfigError(
        sae,
        f"{'several files' if found else 'no file'} of weights of {sae.repository} fit",
        given=sae.file,
        allowed=f"more of the path: {_some(found or files) or 'it holds none'}",
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_SHOWN]) + (", ..." if len(names) > MAX_SHOWN else "")


def _configs_of(file: str) -> list[str]:
    """The config.json in the file's folder, and in the one above a folder of checkpoints."""
    folder = PurePosixPath(file).parent
    folders = [folder, *([folder.parent] if folder.name == "checkpoints" else [])]
    return [str(place / CONFIG) for place in folders]


@contextmanager
def hub_errors(name: str, repository: str, revision: str | None = None) -> Iterator[None]:
    """Errors of huggingface_hub, and of SAELens about its releases, as ours.

    Raises:
        ConfigError: there is no such repository, revision, release or id, or it asks for consent.
        TaxolensError: the hub cannot be reached, and the cache does not have the file.
    """
    hub = f"the hub's {repository}{f' at {revision}' if revision else ''}"
    try:
        yield
    except TaxolensError:
        raise
    except GatedRepoError as error:
        raise ConfigError(
            name, f"{hub} asks for consent", allowed="agree on its page, then `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise TaxolensError(
            name, f"{hub} cannot be reached, and the cache on this machine lacks the file"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise ConfigError(
            name, f"{hub} does not exist, is private or lacks the file", allowed=NAMES
        ) from error
    except ValueError as error:  # SAELens's, about releases and ids
        raise ConfigError(name, error, allowed=NAMES) from error
    except Exception as error:
        if not isinstance(error, (HfHubHTTPError, OSError)) and not _is_of_the_network(error):
            raise
        raise TaxolensError(name, f"{hub} cannot be reached: {error}") from error


def _is_of_the_network(error: Exception) -> bool:
    """Whether it is of the HTTP client, which differs by version of huggingface_hub."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
