"""Archives: zip files as the folders that they hold, and what a tar file holds."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from uuid import uuid4

from datasets import config

from ...registry.errors import ConfigError, DataError
from ...registry.hashing import fingerprint
from .folders import Contents, contents_of


def unpacked(file: Path) -> Path:
    """The folder, in the cache of `datasets`, into which a zip file is unpacked once.

    Raises:
        DataError: it is damaged, or there is no room for it.
    """
    found = file.stat()
    facts = [str(file.resolve()), str(found.st_size), str(found.st_mtime_ns)]
    cache = Path(config.HF_DATASETS_CACHE) / "downloads" / "extracted"
    target = cache / f"taxolens-{fingerprint(facts)}"
    if target.is_dir():
        return target
    partial = cache / f"{target.name}-{uuid4().hex}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(file) as archive:
            needed = sum(member.file_size for member in archive.infolist())
            free = shutil.disk_usage(cache).free
            if needed > free:
                problem = f"{needed:,} bytes unpacked, {free:,} free in {cache}"
                raise DataError("dataset_path", problem, given=str(file))
            partial.mkdir()  # with the permissions of the umask
            archive.extractall(partial)
        os.rename(partial, target)
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:
        if target.is_dir():  # another process was first
            return target
        raise DataError("dataset_path", f"cannot be unpacked: {error}", given=str(file)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def with_zips(contents: Contents) -> Contents:
    """The contents, or, of a folder with zip files and no images, those of the zip files as folders.

    Raises:
        ConfigError: two of them are one folder by their names.
        DataError: as `unpacked`.
    """
    zips = [
        (folder, name)
        for folder, names in contents.files.items()
        for name in names
        if name.lower().endswith(".zip")
    ]
    if contents.images or not zips:
        return contents
    images: dict[str, list[str]] = {}
    files = dict(contents.files)
    for folder, name in zips:
        inside = contents_of(unpacked(contents.root / folder / name))
        stem = Path(name).stem
        if {path.partition("/")[0] for path in inside.images} == {stem}:
            inside = inside.below(stem)
        base = Path(folder, stem).as_posix()
        for inner, names in inside.files.items():
            place = Path(base, inner).as_posix()
            paths = [str(inside.root / inner / each) for each in names]
            files[place] = [*files.get(place, ()), *paths]
        for inner, names in inside.images.items():
            if (place := Path(base, inner).as_posix()) in images:
                problem = f"what {name} holds is in {place}, as what another zip file holds"
                allowed = "zip files of different names in each folder"
                given = str(contents.root / folder)
                raise ConfigError("dataset_path", problem, given=given, allowed=allowed)
            images[place] = [str(inside.root / inner / each) for each in names]
    return Contents(contents.root, images, files)


def refuse_tar_of_tars(file: Path) -> None:
    """Check that a tar file holds files, not one archive for each class as ImageNet's does.

    Raises:
        ConfigError: it holds archives; the message says how they are unpacked.
    """
    try:
        with tarfile.open(file) as archive:
            first = next((member.name for member in archive if member.isfile()), "")
    except (OSError, tarfile.TarError):
        return
    if first.endswith(".tar"):
        raise ConfigError(
            "dataset_path",
            f"an archive of archives ({first}, ...)",
            given=str(file),
            allowed="a folder into which each of them was unpacked, as a class folder of its name",
        )
