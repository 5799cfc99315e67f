"""Writes the tables of docs/releases.md from registry/loaders/releases.yaml.

    python docs/formats/write_releases.py

Run it after a change of the table; a test compares both.
"""

from __future__ import annotations

from pathlib import Path

from taxolens.registry.loaders.parts.releases import PublishedSAE, Release, releases

PAGE = Path(__file__).parents[1] / "releases.md"
BEGIN, END = "<!-- releases -->\n", "<!-- end of releases -->\n"
COLUMNS = ("name", "repository", "model", "hook point", "tokens", "m", "L0", "licence", "beside")
OWN_COLUMNS = ("model_name", "hook_name", "tokens")


def page_of(page: str) -> str:
    """The text of releases.md with its tables made anew."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    sections = [_section(release) for release in releases().values()]
    return before + BEGIN + "\n" + "\n".join(sections) + "\n" + END + after


def _section(release: Release) -> str:
    saes = [release.find(id) for id in release.saes]
    any_id = "REPOSITORY" if release.owner else "PATH"
    rows = [*map(_row, saes), _row(_any(release, any_id))]
    head = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    sources = _sources(saes)
    return "\n".join(
        [f"### {release.name}", "", " ".join(release.note.split()), "", *head, *rows, "", *sources]
    )


def _any(release: Release, any_id: str) -> PublishedSAE:
    """The row of the SAEs that are not listed: what is known of each of them."""
    found = release.find(any_id)
    hook = {"hook_name": release.hook_name} if release.hook_name else {}
    return PublishedSAE(**{**vars(found), "known": {**hook, **found.known}})


def _row(sae: PublishedSAE) -> str:
    place = f"https://huggingface.co/{sae.repository}"
    link = f"`{sae.repository}`" if "REPOSITORY" in place else f"[{sae.repository}]({place})"
    cells = (
        f"`{sae}`",
        link + (f" at `{sae.revision}`" if sae.revision else ""),
        *(_shown(sae.known.get(name)) for name in OWN_COLUMNS),
        *(_shown(sae.shown.get(name)) for name in ("d_sae", "l0")),
        sae.licence or "–",
        "; ".join(_beside(sae)) or "–",
    )
    return f"| {' | '.join(cells)} |"


def _beside(sae: PublishedSAE) -> list[str]:
    """What is known beside the file, and what a user has to give."""
    known = [f"`{n}` {value}" for n, value in sae.known.items() if n not in OWN_COLUMNS]
    return known + [f"asked for: `--{name}`, {where}" for name, where in sae.asks_for.items()]


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f"`{value}`"
    return "–" if value is None else f"{value:,}"


def _sources(saes: list[PublishedSAE]) -> list[str]:
    """Where the facts of the rows stand; rows with the same sources share a line."""
    alike: dict[str, list[str]] = {}
    for sae in saes:
        by_place: dict[str, list[str]] = {}
        for name, where in sae.sources.items():
            by_place.setdefault(where, []).append(f"`{name}`")
        listed = "; ".join(f"{', '.join(names)}: {where}" for where, names in by_place.items())
        if listed:
            alike.setdefault(listed, []).append(f"`{sae}`")
    return [f"Sources of {_named(names)}: {listed}.\n" for listed, names in alike.items()]


def _named(names: list[str]) -> str:
    if len(names) <= 3:
        return ", ".join(names)
    return f"{len(names)} names from {names[0]} to {names[-1]}"


if __name__ == "__main__":
    PAGE.write_text(page_of(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
