"""`taxolens atlas`: every published SAE of a model, evaluated in one pass."""

from __future__ import annotations

from ...registry.ranks import Ranks
from . import evaluate, outcome, shell

HELP = """\
Finds the published SAEs of MODEL by name, evaluates all of them on the same images, and writes which of
them carry the tree, and where: atlas.csv, results.json and report.html. A second call goes on where the
first stopped. SAEs that cannot be evaluated are left out, with the reason."""

EXAMPLES = """\
examples:
  taxolens atlas laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K --dataset_path imagenet/
      --taxonomy imagenet --output_path atlas
  taxolens atlas facebook/dinov2-base --releases saev --list"""

OWN = ("model_name", "hook_name", "hook_head_index")  # the model is MODEL, and each SAE has its own


def parser() -> shell.Parser:
    """The command's own arguments."""
    made = shell.Parser(
        prog="taxolens atlas",
        usage="taxolens atlas MODEL --output_path FOLDER [FLAG VALUE ...]",
        description=HELP,
        epilog=EXAMPLES,
    )
    add = made.add_argument
    add("model", metavar="MODEL", help="a Hugging Face model, or a folder")
    add("--releases", nargs="+", metavar="NAME", help="of docs/releases.md; by default all")
    add(
        "--also",
        nargs="+",
        metavar="SAE",
        default=[],
        help="SAEs of this model beside, as in evaluate",
    )
    add("--list", action="store_true", help="print the names of the SAEs, download no weights")
    add("--json", action="store_true", help="places and headline numbers as JSON on stdout")
    add("--static", action="store_true", help="no interactive figures in the report (5 MB less)")
    evaluate.add_settings(made, without=OWN)
    return made


def run(args: list[str]) -> None:
    """Find, evaluate, write and show."""
    given = {
        name: value for name, value in vars(parser().parse_args(args)).items() if value is not None
    }
    as_json, static, only_list = (given.pop(name) for name in ("json", "static", "list"))
    model = given.pop("model")
    with shell.working() as print_json:
        from ..evaluation.atlas import atlas, published_saes
        from ..reporting.atlas_table import shown_atlas
        from ..reporting.report import write_report

        if only_list:
            left_out: dict[str, str] = {}
            names = published_saes(model, given.get("releases"), left_out=left_out)
            if not Ranks.here().is_first:
                return
            shell.print_notes(f"left out: {name}: {why}" for name, why in left_out.items())
            if as_json:
                print_json({"saes": names, "left_out": left_out})
        else:
            results = atlas(model, **given)
            if not Ranks.here().is_first:
                return
            report = write_report(results, interactive=not static)
            if as_json:
                print_json(outcome.as_dict(results, report))
    if only_list:
        if not as_json:
            print("\n".join(names))
        return
    if not as_json:
        outcome.show(results, report)
        shell.console().print(shown_atlas(results))
    outcome.raise_errors(results)
