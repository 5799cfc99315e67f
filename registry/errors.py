"""The errors a user of taxolens can meet.

`ConfigError` means that what was asked for is wrong (the command line exits with 2);
every other `TaxolensError` means that the work failed (it exits with 1).
"""

from __future__ import annotations

from typing import Any

_NOT_SAID: Any = object()


class TaxolensError(Exception):
    """Base class of every error that taxolens raises on purpose.

    The message has one grammar: ``field: problem; given X; allowed: Y.``

    Args:
        field: the setting, file or object that is wrong; the whole message where it stands alone.
        problem: what is wrong with it.
        given: the value that was found, shown by `repr`.
        allowed: what would be right, or what to do.
    """

    def __init__(
        self,
        field: Any,
        problem: Any = None,
        *,
        given: Any = _NOT_SAID,
        allowed: Any = None,
    ) -> None:
        parts = [f"{field}" if problem is None else f"{field}: {str(problem).rstrip('.')}"]
        if given is not _NOT_SAID:
            parts.append(f"given {given!r}")
        if allowed is not None:
            parts.append(f"allowed: {str(allowed).rstrip('.')}")
        # One argument, so that an error crosses process boundaries as it is.
        super().__init__(parts[0] if problem is None else "; ".join(parts) + ".")


class ConfigError(TaxolensError, ValueError):
    """A setting is wrong. The message names the field, what was given and what is allowed."""


class UnknownNameError(ConfigError, KeyError):
    """A name is in no table. The message lists the nearest known names.

    It is a `KeyError` too, so that tables behave as mappings (`table.get(name)`).
    """

    __str__ = Exception.__str__  # KeyError would print the message in quotes


class DuplicateNameError(ConfigError):
    """Two plugins register the same name. The message names both."""


class DataError(TaxolensError):
    """The data cannot be used: empty, corrupt beyond the allowed share, NaN, labels off the tree."""


class CheckpointError(TaxolensError):
    """A checkpoint is torn, truncated, or belongs to another run."""


class CorruptImageError(DataError):
    """One image that cannot be read. The message names its index, its source and the reason."""

    def __init__(self, index: int, source: str, reason: str) -> None:
        Exception.__init__(self, index, source, reason)
        self.index = index
        self.source = source
        self.reason = reason

    def __str__(self) -> str:
        return f"image {self.index} ({self.source}) cannot be read: {self.reason}"


class DivergedError(TaxolensError):
    """Training went to NaN or infinity. The checkpoints before that are whole."""
