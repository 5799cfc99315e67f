"""`taxolens publish`: uploads the SAEs of an evaluated run to the Hugging Face hub."""

from __future__ import annotations

from . import shell

HELP = """\
Uploads the SAEs of RUN to the repository REPO of the Hugging Face hub, in SAELens's layout, with a
model card (training, L0, the headline table with its nulls, a picture), results.json and report.html.
It needs the results of `taxolens evaluate RUN`, of the same weights."""

EXAMPLES = """\
examples:
  taxolens publish output/my_run me/dinov2-small-topk --licence mit
  taxolens publish output/my_run me/dinov2-small-topk --dry_run to_be_published"""


def parser() -> shell.Parser:
    """The command's own arguments."""
    made = shell.Parser(
        prog="taxolens publish",
        usage="taxolens publish RUN REPO [FLAG VALUE ...]",
        description=HELP,
        epilog=EXAMPLES,
    )
    add = made.add_argument
    add("run", metavar="RUN", help="a run's output_path, or an SAE folder")
    add("repository", metavar="REPO", help="OWNER/NAME; made where it is missing")
    add("--dry_run", metavar="FOLDER", help="write the files to a new folder, upload nothing")
    add("--results", metavar="PATH", help="a results.json or its folder; by default the run's")
    add("--licence", metavar="NAME", help="of the SAEs, by the hub's identifier, such as mit")
    add("--private", action="store_true", help="make a new repository private")
    add("--no_report", action="store_true", help="without report.html, which has images in it")
    add("--json", action="store_true", help="where it is, as JSON on stdout")
    return made


def run(args: list[str]) -> None:
    """Upload or write, and say where it is."""
    given = vars(parser().parse_args(args))
    as_json, without_report = given.pop("json"), given.pop("no_report")
    with shell.working() as print_json:
        from ..evaluation.publish import publish

        place = publish(
            given.pop("run"), given.pop("repository"), with_report=not without_report, **given
        )
        if as_json:
            print_json({"published": place})
    if not as_json:
        done = "written, not published" if given["dry_run"] else "published"
        shell.console().print(f"{done}: {place}", highlight=False, soft_wrap=True, markup=False)
