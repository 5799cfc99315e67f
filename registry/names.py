"""Names in messages: suggestions for unknown ones, and settings as the user writes them."""

from __future__ import annotations

import contextlib
import difflib
import os
import shlex
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from itertools import islice

MAX_NAMES, MAX_LENGTH = 10_000, 200  # that are compared: each takes up to the square of its length

ON_COMMAND_LINE: ContextVar[bool] = ContextVar("on_command_line", default=False)
"""Whether settings are flags; in Python they are fields and arguments."""


def as_setting(name: str, value: object) -> str:
    """A setting as the user writes it: ``--device cpu``, or ``device="cpu"`` in Python."""
    if ON_COMMAND_LINE.get():
        return f"--{name} {shlex.quote(str(value))}"
    return f'{name}="{value}"'


def nearest(name: object, known: Iterable[str], *, cutoff: float = 0.5) -> list[str]:
    """At most three of `known`, the most similar to `name` first.

    Args:
        cutoff: least similarity, from 0 to 1 (`difflib.SequenceMatcher.ratio`).
    """
    short = [text for text in islice(known, MAX_NAMES) if len(text) <= MAX_LENGTH]
    return difflib.get_close_matches(str(name)[:MAX_LENGTH], short, n=3, cutoff=cutoff)


def did_you_mean(names: Iterable[str]) -> str:
    """The hint "did you mean 'a' or 'b'?"; "" where there are no names."""
    shown = " or ".join(map(repr, names))
    return f"did you mean {shown}?" if shown else ""


def near_paths(
    path: str | os.PathLike[str], fits: Callable[[str], bool] = lambda path: True
) -> str:
    """`did_you_mean` in brackets, of the entries beside a path that is not there; "" without any.

    Args:
        path: the path that is not there.
        fits: whether an entry, given by its path, can be meant.
    """
    folder, name = os.path.split(os.path.normpath(path))
    names: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        entries = (n for n in os.listdir(folder or ".") if fits(os.path.join(folder, n)))
        names = [os.path.join(folder, near) for near in nearest(name, entries)]
    return f" ({did_you_mean(names)})" if names else ""


def unknown_name_message(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown `name`, with similar names and up to 40 of all names."""
    names = sorted(known)
    near = did_you_mean(nearest(name, names))
    shown = [text[:MAX_LENGTH] for text in names[:40]]
    shown += [f"and {len(names) - 40} more"] if len(names) > 40 else []
    return (
        f"{kind}: not known{f' ({near})' if near else ''}; given {str(name)[:MAX_LENGTH]!r}; "
        f"allowed: {', '.join(shown) or 'none'}."
    )
