"""Reading of an SAE from a path, by the loader that recognises the file, or from a release."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, TaxolensError
from ...files import share
from ...table import LOADERS, Loader
from .checkpoint import Checkpoint, is_weights_name
from .hub import hub_errors

if TYPE_CHECKING:
    from sae_lens import SAE


HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Source:
    """Where an SAE is: a path with or without the name of its loader, or a release and an id."""

    path: str = ""
    loader: str | None = None
    release: str | None = None

    @classmethod
    def of(cls, text: str | Path) -> Source:
        """The source that a text names: ``PATH``, ``LOADER:PATH``, ``RELEASE:ID``, ``OWNER/NAME:ID``.

        A path that exists is a path. After a name that is a loader's and a release's, what exists
        or ends like a file is a path.
        """
        name, colon, rest = str(text).partition(":")
        if isinstance(text, Path) or not (colon and rest) or Path(text).exists():
            return cls(str(text))
        if name in LOADERS and (Path(rest).exists() or is_weights_name(rest)):
            return cls(rest, loader=name)
        if name in _directory() or HUB_NAME.fullmatch(name):
            return cls(rest, release=name)
        return cls(rest, loader=name) if name in LOADERS else cls(str(text))

    def __str__(self) -> str:
        before = self.release or self.loader
        return f"{before}:{self.path}" if before else self.path


def _directory() -> Any:
    """SAELens's table of releases, ours and those of other plugins among them."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    len(LOADERS)  # reading the table registers what is in it
    return get_pretrained_saes_directory()


def _release_converter(release: str, given: dict[str, Any]) -> Callable[..., Any] | None:
    """The converter of a release with facts of the user; None, SAELens's own, where there are none.

    Raises:
        ConfigError: facts for a release that none of `LOADERS` reads.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    lookup = _directory().get(release)
    entry = LOADERS.get(lookup.conversion_func or "") if lookup else None
    if entry is None or entry.huggingface is None:
        raise ConfigError(
            ", ".join(given), f"release {release!r} has no use for it", allowed="leave it out"
        )
    return partial(entry.huggingface, **given)


def read_sae(
    path: str | Path | Checkpoint,
    loader: str | None = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    **given: Any,
) -> SAE[Any]:
    """The SAE that another library (or SAELens) wrote, as one of SAELens's classes.

    Its ``cfg.metadata`` says what is known of it: `model_name`, `hook_name`, `tokens`, the source,
    the file's format, what was given, and notes on the conversion.

    Args:
        path: a file of weights, or the folder that holds it with its config; ``loader:path``; or
            the name of a published SAE, ``release:id``, see docs/releases.md.
        loader: a name of `LOADERS`; None finds it by the file.
        dtype: of the weights, e.g. ``"float32"``, which is also the default whatever the file has.
        given: facts that the file does not hold; `LOADERS[name].asks_for` names them.

    Raises:
        ConfigError: no loader or several recognise the file; facts are missing (all are listed) or
            contradict it; SAELens has no class that gives these latents.
        CheckpointError: the file is truncated or damaged, or its tensors do not fit each other.
    """
    from sae_lens import SAE

    return load_source(SAE, path, loader, device=device, dtype=dtype, **given).eval()


def load_source(
    cls: type[Any],
    path: str | Path | Checkpoint,
    loader: str | None = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    **given: Any,
) -> Any:
    """As `read_sae`, as an SAE of `cls`: SAELens's SAE, or TrainingSAE to train on."""
    if not isinstance(path, Checkpoint):
        source = Source.of(path)
        if source.release is not None and loader is None:
            converter_of_release = _release_converter(source.release, given)
            with hub_errors(str(source), source.release):
                return cls.from_pretrained(
                    source.release,
                    source.path,
                    device=device,
                    dtype=dtype or "float32",
                    converter=converter_of_release,
                )
        path, loader = source.path, loader or source.loader
    return cls.load_from_disk(
        Checkpoint.of(path),  # SAELens hands it on to the converter
        device=device,
        dtype=dtype,
        converter=converter(loader, **given),
    )


def save_sae(sae: SAE[Any], folder: str | Path) -> Path:
    """Write `sae` as an SAELens folder, all of it or nothing; gives the folder.

    Raises:
        ConfigError: `folder` is there already and is not empty, or is a file.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            "output", "already there", given=str(folder), allowed="a new or empty folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        written = Path(temporary) / "sae"
        sae.save_model(written)
        share(written)
        if folder.exists():
            folder.rmdir()
        os.replace(written, folder)
    return folder


def converter(loader: str | None = None, **given: Any) -> Callable[..., Any]:
    """For SAELens: ``SAE.load_from_disk(path, converter=converter("saev", k=32))``.

    Args and errors as `read_sae`.
    """

    def disk(path: str | Path, device: str = "cpu", cfg_overrides: Any = None) -> Any:
        checkpoint = Checkpoint.of(path)
        entry, _ = find_loader(checkpoint, loader)
        if entry.disk is None:
            raise ConfigError(
                "loader", "reads no local files", given=entry.name, allowed="one that does"
            )
        return entry.disk(checkpoint, device, cfg_overrides, **given)

    return disk


def find_loader(path: str | Path | Checkpoint, loader: str | None = None) -> tuple[Loader, str]:
    """The loader for a path, and by what it recognised the file.

    Raises:
        ConfigError: none or several do; the message lists what was looked for.
    """
    checkpoint = Checkpoint.of(path)
    if loader is not None:
        return LOADERS[loader], "named by the user"
    found: dict[str, str] = {}
    unreadable: TaxolensError | None = None
    for name, entry in LOADERS.items():
        try:
            reason = entry.recognises(checkpoint) if entry.recognises else None
        except TaxolensError as error:  # another loader may read what is no PyTorch file
            unreadable, reason = error, None
        except Exception:  # content that no file of that format has
            reason = None
        if reason:
            found[name] = reason
    if len(found) == 1:
        ((name, reason),) = found.items()
        return LOADERS[name], reason
    if found:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in found.items())
        raise ConfigError(
            "loader",
            "several recognise the file",
            given=str(checkpoint),
            allowed=f"--loader with one of {reasons}",
        )
    if unreadable is not None:
        raise unreadable
    looked_for = "; ".join(
        f"{name} ({entry.description})"
        for name, entry in LOADERS.items()
        if entry.recognises is not None
    )
    raise ConfigError(
        "loader",
        f"none recognises the file, {checkpoint.describe()}",
        given=str(checkpoint),
        allowed=looked_for,
    )
