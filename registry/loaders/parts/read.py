"""Reading of an SAE from a path, by the loader that recognises the file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, TaxolensError
from ...files import share
from ...table import LOADERS, Loader
from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from sae_lens import SAE


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
        path: a file of weights, or the folder that holds it with its config.
        loader: a name of `LOADERS`; None finds it by the file.
        dtype: of the weights, e.g. ``"float32"``, which is also the default whatever the file has.
        given: facts that the file does not hold; `LOADERS[name].asks_for` names them.

    Raises:
        ConfigError: no loader or several recognise the file; facts are missing (all are listed) or
            contradict it; SAELens has no class that gives these latents.
        CheckpointError: the file is truncated or damaged, or its tensors do not fit each other.
    """
    from sae_lens import SAE

    sae = SAE.load_from_disk(
        Checkpoint.of(path),  # type: ignore[arg-type]  # SAELens hands it on to the converter
        device=device,
        dtype=dtype,
        converter=converter(loader, **given),
    )
    return sae.eval()


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


def split_loader(text: str) -> tuple[str | None, str]:
    """``"saev:runs/sae.pt"`` -> ``("saev", "runs/sae.pt")``; without a loader's name (None, text)."""
    name, colon, path = text.partition(":")
    return (name, path) if colon and name in LOADERS else (None, text)
