"""All that a decoding worker needs; imported once, by the server that forks the workers, and nowhere else.

SAELens and TransformerLens are not part of it. A dataset's rows are read with `datasets`.
"""

from __future__ import annotations

import sys
from types import TracebackType

import datasets  # noqa: F401

from . import loader, preprocess  # noqa: F401


def _unless_given_up(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an error, but for that of a worker which the program did not wait for when it ended.

    What the worker is sent is then cut off, or names semaphores that are removed.
    """
    last = trace
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = "" if last is None else last.tb_frame.f_code.co_name
    if isinstance(error, (EOFError, FileNotFoundError)) and where in ("_main", "__setstate__"):
        return
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _unless_given_up
