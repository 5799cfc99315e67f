"""Exceptions of taxolens.

`ConfigError` means invalid settings (the command line exits with 2); every other `TaxolensError`
means a failure of the run (it exits with 1).
"""

from __future__ import annotations

from typing import Any

_OMITTED: Any = object()
MAX_GIVEN = 300  # characters of an invalid value in a message


class TaxolensError(Exception):
    """Base class of every error that taxolens raises on purpose.

    The message has one form: ``field: problem; given X; allowed: Y.``

    Args:
        field: the setting, file or object that is wrong; the complete message if given alone.
        problem: what is wrong with it.
        given: the invalid value, shown by `repr`.
        allowed: the valid values, or what to do.
    """

    def __init__(
        self,
        field: Any,
        problem: Any = None,
        *,
        given: Any = _OMITTED,
        allowed: Any = None,
    ) -> None:
        parts = [f"{field}" if problem is None else f"{field}: {str(problem).rstrip('.')}"]
        if given is not _OMITTED:
            parts.append(f"given {shortened(repr(given), MAX_GIVEN)}")
        if allowed is not None:
            parts.append(f"allowed: {str(allowed).rstrip('.')}")
        # One argument, so that an error is unchanged by pickling.
        super().__init__(parts[0] if problem is None else "; ".join(parts) + ".")


def shortened(text: str, most: int) -> str:
    """`text`, without its middle where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    kept = (most - 5) // 2
    return f"{text[:kept]} ... {text[-kept:]}"


class ConfigError(TaxolensError, ValueError):
    """A setting is invalid. The message has the field, the given and the allowed values."""


class UnknownNameError(ConfigError, KeyError):
    """A name is not registered. The message lists the most similar names.

    Also a `KeyError`, so that tables are mappings (`table.get(name)`).
    """

    __str__ = Exception.__str__  # KeyError would print the message in quotes


class DuplicateNameError(ConfigError):
    """Two plugins register the same name. The message has both plugins."""


class DataError(TaxolensError):
    """Data cannot be used: empty, too many corrupt images, NaN, labels outside the tree."""


class CheckpointError(TaxolensError):
    """A checkpoint is incomplete, damaged, or from another run."""


class CorruptImageError(DataError):
    """One image cannot be read. The message has its index, its source and the reason."""

    def __init__(self, index: int, source: str, reason: str) -> None:
        Exception.__init__(self, index, source, reason)
        self.index = index
        self.source = source
        self.reason = reason

    def __str__(self) -> str:
        return f"image {self.index} ({self.source}) cannot be read: {self.reason}"


class LostRankError(TaxolensError):
    """Another process of the job has ended, or has not answered in time."""


class DivergedError(TaxolensError):
    """Training diverged to NaN or infinity. Earlier checkpoints are complete."""
