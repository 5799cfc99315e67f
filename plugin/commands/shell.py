"""Shared parts of the commands: a parser that raises instead of exiting, and the output streams."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape

from ...registry.errors import ConfigError
from ...registry.machine import without_collection
from ...registry.names import ON_COMMAND_LINE, did_you_mean, nearest
from ...registry.ranks import Ranks

# rich assumes 80 columns where stdout is not a terminal, which would wrap the tables.
PIPE_WIDTH = 120


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` that raises `ConfigError` and accepts no abbreviated flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, message, allowed=f"see `{self.prog} --help`")

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            raise ConfigError(unknown("argument", rest[0], self._option_string_actions))
        return parsed


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of 100 columns, with the description as written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def underscored(args: Iterable[str]) -> list[str]:
    """`args` with underscores in their flags, as SAELens spells them: `--no_evaluate`.

    A value that begins with `~/` is expanded, which shells do not do in `--flag=~/path`.
    """
    result = []
    for arg in args:
        head, value = "", arg
        if arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            head = "--" + flag[2:].replace("-", "_") + equals
        result.append(head + (os.path.expanduser(value) if value.startswith("~/") else value))
    return result


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name, with the nearest known names, or all where they are few."""
    names = sorted(known)
    bare = {text.lstrip("-"): text for text in names}  # the dashes would count as similar
    near = did_you_mean(bare[n] for n in nearest(name.partition("=")[0].lstrip("-"), bare))
    allowed = f"; allowed: {', '.join(names) if len(names) <= 12 else 'see --help'}"
    return (
        f"{kind}: not known{f' ({near})' if near else ''}; given {name!r}{'' if near else allowed}."
    )


def console() -> Console:
    """The console of stdout, for results."""
    return _console(sys.stdout)


def print_error(message: str) -> None:
    """Print one line on stderr, its first word red on a terminal."""
    if (bars := _bars()) is not None:
        for bar in list(getattr(bars, "_instances", ())):  # an error has left them open
            bar.close()
    _console(sys.stderr).print(
        f"[bold red]error:[/] {_of_rank()}{escape(printable(message))}",
        highlight=False,
        soft_wrap=True,
    )


def printable(text: str) -> str:
    """`text` without what a terminal would obey or cannot show: file names may have any character."""
    unsafe = ("Cc", "Cf", "Cs")  # control, format (which may turn the direction), lone surrogates
    return "".join(
        ascii(c)[1:-1] if unicodedata.category(c) in unsafe and c not in "\n\t" else c for c in text
    )


def print_notes(lines: Iterable[str]) -> None:
    """Print progress notes on stderr."""
    for line in lines:
        _console(sys.stderr).print(
            escape(printable(line)), highlight=False, soft_wrap=True, style="dim"
        )


@contextlib.contextmanager
def working() -> Iterator[Callable[[Any], None]]:
    """Send prints and logs to stderr meanwhile; yields a function that prints JSON on stdout.

    Messages meanwhile name settings as flags.
    Of the processes of a job the first alone prints, logs and shows progress. The others log errors.
    """
    real = sys.stdout
    ranks = Ranks.here()

    def print_json(value: Any) -> None:
        json.dump(jsonable(value), real, indent=2)
        real.write("\n")
        real.flush()

    handler = _BesideBars(sys.stderr)
    handler.setFormatter(
        _Printable("%(message)s" if ranks.is_first else f"{_of_rank()}%(message)s")
    )
    handler.setLevel(logging.INFO if ranks.is_first else logging.ERROR)
    loggers = [logging.getLogger(name) for name in ("taxolens", "sae_lens")]
    levels = [logger.level for logger in loggers]
    outside = ON_COMMAND_LINE.set(True)
    try:
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        with contextlib.ExitStack() as stack:
            prints: Any = sys.stderr
            if not ranks.is_first:
                prints = stack.enter_context(open(os.devnull, "w"))
                os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which is later
            stack.enter_context(contextlib.redirect_stdout(prints))
            yield print_json
    finally:
        ON_COMMAND_LINE.reset(outside)
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import large libraries meanwhile: sooner, and on a terminal with a word on what the wait is for."""
    if sys.stderr.isatty() and "sae_lens" not in sys.modules:
        print_notes(["loading torch, SAELens and TransformerLens"])
    with without_collection():
        yield


@contextlib.contextmanager
def continued_by(how: str) -> Iterator[None]:
    """Add to the message of an interruption meanwhile how the work goes on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{str(stop) or 'interrupted'}; {how}") from None


def _of_rank() -> str:
    """What begins a line of one of several processes."""
    with contextlib.suppress(ConfigError):  # which is the error that is printed
        ranks = Ranks.here()
        return f"rank {ranks.rank}: " if ranks.size > 1 else ""
    return ""


class _BesideBars(logging.StreamHandler):
    """A handler whose lines are not appended to that of a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with (
            contextlib.nullcontext()
            if (bars := _bars()) is None
            else bars.external_write_mode(self.stream)
        ):
            super().emit(record)


def _bars() -> Any:
    """The class of progress bars, where it is loaded."""
    return getattr(sys.modules.get("tqdm"), "tqdm", None)


class _Printable(logging.Formatter):
    """A formatter whose text is safe on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def jsonable(value: Any) -> Any:
    """`value` as JSON types: NaN and infinities as null, objects of other types as text."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def _console(stream: Any) -> Console:
    if stream.isatty():
        return Console(file=stream)
    return Console(file=stream, width=PIPE_WIDTH)
