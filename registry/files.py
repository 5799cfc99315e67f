"""Atomic writes of files, and digests of their content."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def write_atomically(path: str | Path, content: str | bytes, *, sync: bool = True) -> Path:
    """Write `content` (text as UTF-8) to `path` through a temporary file beside it.

    After a kill or with a full disk, `path` has either its old content or all of the new one.
    Without `sync` this holds after a kill but not after a power failure: for many small files that
    can be written again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def file_digest(path: str | Path, *, sync: bool = False) -> str:
    """64 hex digits: the SHA-256 of a file, read a megabyte at a time.

    With `sync` its content is flushed to disk first.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
