"""`taxolens convert`: another library's SAE file as a folder that SAELens loads by itself."""

from __future__ import annotations

from typing import Any

from ...registry.errors import ConfigError
from ...registry.loaders.parts.facts import COMMON, FACTS
from . import shell

HELP = """\
Writes the SAE in IN (a file of another library, the folder it lies in, or a published one) to the
folder OUT as cfg.json and sae_weights.safetensors, which SAELens loads without taxolens. The format
is recognised by the file. Nothing in the file is run. What it does not hold is asked for, and never
guessed."""

EXAMPLES = """\
examples:
  taxolens convert downloads/sae.pt saes/dinov2-b14 --subtract_b_dec true --tokens patch
  taxolens convert overcomplete:state_dict.pth saes/mine --sae_class TopKSAE --k 32
      --dictionary_normalization l2 --hook_name blocks.11.hook_resid_post"""


def parser() -> shell.Parser:
    """The command's own arguments."""
    made = shell.Parser(
        prog="taxolens convert",
        usage="taxolens convert IN OUT [--FACT VALUE ...]",
        description=HELP,
        epilog=EXAMPLES,
    )
    add = made.add_argument
    add(
        "input",
        metavar="IN",
        help="a file or folder; LOADER:PATH; or RELEASE:ID of docs/releases.md",
    )
    add("output", metavar="OUT", help="a new folder")
    add(
        "--loader",
        metavar="NAME",
        help="a name of `taxolens list loaders`, where none or several fit",
    )
    add("--dtype", metavar="NAME", help="of the weights written; float32")
    add("--json", action="store_true", help="where it is, and its config, as JSON on stdout")
    for title, names in (
        ("where it was trained, and what its inputs go through", COMMON),
        ("what some files do not hold", [name for name in FACTS if name not in COMMON]),
    ):
        group = made.add_argument_group(title)
        for name in names:
            fact = FACTS[name]
            about = f"{fact.about} ({fact.allowed})".replace("%", "%%")
            group.add_argument(f"--{name}", metavar="VALUE", help=about)
    return made


def run(args: list[str]) -> None:
    """Recognise, read and write; say what was done and what is unknown."""
    options, rest = parser().parse_known_args(args)
    given = {name: value for name, value in vars(options).items() if name in FACTS}
    with shell.working() as print_json:
        from ...registry.loaders.parts.checkpoint import Checkpoint
        from ...registry.loaders.parts.read import Source, find_loader, read_sae, save_sae
        from ...registry.table import LOADERS

        known = {name for entry in LOADERS.values() for name in entry.asks_for}
        given.update(_other_facts(rest, known))
        given = {name: value for name, value in given.items() if value is not None}
        source = Source.of(options.input)
        if source.release is not None and options.loader is None:
            sae = read_sae(options.input, dtype=options.dtype, **given)
            loader, reason = source.release, "a release"
        else:
            checkpoint = Checkpoint(source.path)
            entry, reason = find_loader(checkpoint, options.loader or source.loader)
            loader = entry.name
            sae = read_sae(checkpoint, loader, dtype=options.dtype, **given)
        folder = save_sae(sae, options.output)
        cfg = sae.cfg.to_dict()
        metadata = cfg.pop("metadata")
        result = {"output": folder, "loader": loader, "recognised_by": reason}
        if options.json:
            print_json({**result, "cfg": cfg, "metadata": metadata})
    if not options.json:
        lines = [
            f"{loader} ({reason}): {metadata.get('source_format', 'SAELens')}",
            f"{cfg['architecture']}, d_in {cfg['d_in']}, d_sae {cfg['d_sae']}",
            *(f"note: {note}" for note in metadata.get("notes") or ()),
            f"written: {folder}",
        ]
        for line in lines:
            shell.console().print(line, highlight=False, soft_wrap=True, markup=False)


def _other_facts(rest: list[str], known: set[str]) -> dict[str, Any]:
    """Facts that only a third party's loader asks for: ``--name value`` or ``--name=value``."""
    found: dict[str, Any] = {}
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or name[2:] not in known or not (equals or rest):
            raise ConfigError(shell.unknown("argument", name, parser()._option_string_actions))
        found[name[2:]] = value if equals else rest.pop(0)
    return found
