"""`taxolens completion`: a script that completes commands, flags and names in bash, zsh and fish."""

from __future__ import annotations

import argparse
from importlib import import_module

from ...registry.presets import PRESETS
from ..builtin import EVALUATORS, LOADERS, TAXONOMIES
from . import COMMANDS, quick_check, shell
from .list import KINDS

HELP = """\
Prints a script that completes commands, flags and names (presets, architectures, evaluators, class
trees) on the tab key. Plugins that are installed later are not in it: print it anew."""

EXAMPLES = """\
examples:
  taxolens completion bash > ~/.local/share/bash-completion/completions/taxolens
  taxolens completion fish > ~/.config/fish/completions/taxolens.fish"""

SHELLS = ("bash", "zsh", "fish")
PATHS = {
    *("config", "dataset_path", "eval_dataset_path", "model_name", "cached_activations_path"),
    *("checkpoint_path", "resume_from_checkpoint", "output_path", "runs", "results"),
    *("input", "output", "run", "dry_run"),
}


def parser() -> shell.Parser:
    """The command's own arguments."""
    made = shell.Parser(prog="taxolens completion", description=HELP, epilog=EXAMPLES)
    made.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    return made


def run(args: list[str]) -> None:
    """Print the completion script of one shell."""
    import shtab

    options = parser().parse_args(args)
    print(shtab.complete(_tree(), options.shell))


def _tree() -> argparse.ArgumentParser:
    """A parser of every command, with its flags and the values that complete them."""
    import shtab

    names = {
        "preset": PRESETS,
        "architecture": quick_check.architecture_names(),
        "evaluators": [*EVALUATORS, "all"],
        "taxonomy": list(TAXONOMIES),
        "loader": list(LOADERS),
        "kind": list(KINDS),
    }
    root = argparse.ArgumentParser(prog="taxolens")
    root.add_argument("--version", action="store_true", help="the versions of the libraries")
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = root.add_subparsers()
    for command, summary in COMMANDS.items():
        own = import_module(f"{__package__}.{command}").parser()
        made = commands.add_parser(command, parents=[own], add_help=False, help=summary)
        for action in made._actions:
            action.choices = names.get(action.dest, action.choices)
            if action.dest in PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return root
