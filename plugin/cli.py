"""The command line: `taxolens COMMAND ...`; the commands are those of `plugin/commands`.

This module and the command modules import no large library at the top, so that `--help`,
`--version` and wrong usage need no wait. Exit codes: 0 done, 1 failed or interrupted, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from ..registry.errors import ConfigError, TaxolensError, shortened
from ..registry.machine import keep_freed_memory, share_cores
from .commands import COMMANDS, shell

DONE, FAILED, WRONG_USAGE = 0, 1, 2
DEBUG_VARIABLE = "TAXOLENS_DEBUG"
MAX_MESSAGE = 1500  # characters

HELP = f"""\
usage: taxolens [--version] [--debug] COMMAND ...

Trains sparse autoencoders on the activations of vision models, with SAELens, and measures how their
latents represent a class hierarchy.

commands:
{chr(10).join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())}

options:
  -h, --help   this help; `taxolens COMMAND --help` explains a command
  --version    the versions of taxolens and of the libraries it is built on
  --debug      show the traceback of an error (also: {DEBUG_VARIABLE}=1)

examples:
  taxolens demo
  taxolens train --preset laptop --dataset_path photos/ --taxonomy tree.csv --holdout 0.2

Exit codes: 0 done, 1 failed or interrupted, 2 wrong usage. With --json the result goes to stdout
as JSON and everything else to stderr."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; no error of a command escapes."""
    args = shell.underscored(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    args = [arg for arg in args if arg != "--debug"]
    share_cores()
    keep_freed_memory()
    try:
        with _signals():
            return _dispatch(args)
    except SystemExit as stop:  # argparse leaves this way after --help
        return stop.code if isinstance(stop.code, int) else DONE
    except BrokenPipeError:  # the reader of our output closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt as stop:
        shell.print_error(str(stop) or "interrupted")
        return FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        shell.print_error(shortened(_in_one_line(error, debug), MAX_MESSAGE))
        return WRONG_USAGE if isinstance(error, ConfigError) else FAILED


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return DONE
    if args[0] == "--version":
        print(versions())
        return DONE
    if args[0] not in COMMANDS:
        raise ConfigError(shell.unknown("command", args[0], COMMANDS))
    command = importlib.import_module(f"taxolens.plugin.commands.{args[0]}")
    command.run(args[1:])
    return DONE


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Meanwhile SIGTERM and SIGHUP unwind the command, as Ctrl-C does; ignored ones stay ignored."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) == signal.SIG_DFL:
                previous[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def versions() -> str:
    """Versions of taxolens and of the three libraries that a bug report should name, in one line."""
    others = ", ".join(
        f"{name} {version(name)}" for name in ("sae-lens", "transformer-lens", "torch")
    )
    return f"taxolens {version('taxolens')} ({others})"


def _in_one_line(error: Exception, debug: bool) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, TaxolensError):
        return message
    if isinstance(error, OSError) and error.strerror:
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(named) or 'a file'}: {error.strerror}."
    if isinstance(error, MemoryError):
        return f"memory: there is not enough ({message or 'an allocation failed'})."
    message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return message if debug else f"{message} (run again with --debug for the traceback)"


if __name__ == "__main__":
    sys.exit(main())
