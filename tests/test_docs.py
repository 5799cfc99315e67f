"""What the pages name exists: links, paths, modules, keywords, classes, functions, commands and flags."""

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import sae_lens
import taxolens
import torch
import transformer_lens
from sae_lens.loading import pretrained_sae_loaders, pretrained_saes_directory
from taxolens.plugin.commands import COMMANDS
from taxolens.plugin.commands.shell import underscored
from taxolens.plugin.moved import new_places
from taxolens.registry.presets import load_preset
from transformer_lens import model_bridge

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
ROOMS = ("plugin", "hooks", "registry")
FOLDERS = (*ROOMS, "tests", "docs", "benchmarks", "examples")
LIBRARIES = (
    *(taxolens, sae_lens, pretrained_sae_loaders, pretrained_saes_directory),
    *(transformer_lens, model_bridge, datasets, torch, torch.cuda, builtins),
)
EXAMPLES = {"cls", "--no_such_flag", "tran"}  # they stand for any class, and for wrong usage
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.M | re.S)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def inline_code(text: str) -> list[str]:
    """The text between single backticks outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def python_blocks(text: str) -> list[ast.Module]:
    return [ast.parse(body) for kind, body in FENCE.findall(text) if kind == "python"]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def resolve(dotted: str) -> Any:
    """The object of a dotted name.

    Raises:
        AttributeError: it does not exist.
        AssertionError: a module of the name has moved.
    """
    found: Any = importlib.import_module(dotted.partition(".")[0])
    name = found.__name__
    for part in dotted.split(".")[1:]:
        name = f"{name}.{part}"
        assert not new_places(name), f"{name} has moved to {new_places(name)}"
        if inspect.ismodule(found) and not hasattr(found, part):
            try:
                found = importlib.import_module(name)
                continue
            except ModuleNotFoundError as error:
                raise AttributeError(f"{name} does not exist") from error
        found = getattr(found, part)
    return found


# Links and paths ----------------------------------------------------------------------------------


def broken_links(page: Path, text: str) -> list[str]:
    """The relative links of a page whose file or heading does not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def missing_paths(text: str) -> list[str]:
    """Paths of this repository, in backticks or in a command, that do not exist."""
    code = " ".join([*inline_code(text), *(body for _, body in FENCE.findall(text))])
    paths = re.findall(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[^\s`'\",:;)<*]*(?![^\s]*[<*])", code)
    return [path for path in paths if not (ROOT / path).exists()]


@each_page
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    assert broken_links(page, text) == [] and missing_paths(text) == []


# Python names -------------------------------------------------------------------------------------


def missing_names(text: str) -> list[str]:
    """Dotted names of this package, and names that a Python block imports from it, that do not
    exist or have moved."""
    code = inline_code(text)
    names = set(re.findall(r"(?<![/\w])taxolens(?:\.[A-Za-z_]\w*)+(?![\w./]*/)", text))
    rooms = "|".join(ROOMS)
    names |= {f"taxolens.{c}" for c in code if re.fullmatch(rf"(?:{rooms})(?:\.\w+)+", c)}
    for block in python_blocks(text):
        for node in ast.walk(block):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("taxolens"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    missing = []
    for name in sorted(names):
        try:
            resolve(name)
        except (AttributeError, AssertionError, ModuleNotFoundError) as error:
            missing.append(str(error))
    return missing


def unknown_keywords(text: str) -> list[str]:
    """Keywords that a Python block gives to a public name of taxolens and that it does not take."""
    unknown = []
    for node in (n for block in python_blocks(text) for n in ast.walk(block)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).removeprefix("taxolens.")
        if not name.isidentifier() or not hasattr(taxolens, name):
            continue
        known = {*inspect.signature(getattr(taxolens, name)).parameters}
        if name == "evaluate_run":  # it takes the fields of its settings too
            known |= {*taxolens.EvaluationSettings.__dataclass_fields__}
        if name == "read_sae":  # it takes the facts that a loader asks for
            known |= {fact for entry in taxolens.LOADERS.values() for fact in entry.asks_for}
        given = {keyword.arg for keyword in node.keywords if keyword.arg}
        unknown += [f"{name}({keyword}=)" for keyword in sorted(given - known)]
    return unknown


@cache
def definitions() -> dict[str, set[str]]:
    """Every class and function of the repository -> the names of its attributes and methods, and of
    its bases."""
    found: dict[str, set[str]] = {}
    for folder in (*ROOMS, "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    found.setdefault(node.name, set())
                elif isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, set()).update(_names_in(node))
    return found


def _names_in(cls: ast.ClassDef) -> Iterator[str]:
    for node in ast.walk(cls):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
    for base in cls.bases:
        yield "base " + ast.unparse(base).partition("[")[0].rpartition(".")[2]


def has(name: str, attribute: str) -> bool:
    """Whether the class `name` of taxolens or a library, or one of its bases, has an attribute."""
    own = definitions().get(name, set())
    if attribute in own:
        return True
    objects = [getattr(library, name, None) for library in LIBRARIES]
    if any(hasattr(o, attribute) or attribute in _fields(o) for o in objects):
        return True
    return any(has(base[5:], attribute) for base in own if base.startswith("base "))


def _fields(cls: Any) -> set[str]:
    return set(getattr(cls, "__dataclass_fields__", ()))


def undefined_code(text: str) -> list[str]:
    """Classes (`CapWords`), their attributes (`Class.name`) and calls (`name(...)`) in backticks that
    neither this repository, a library nor the page's own Python blocks define."""
    own = {
        node.name
        for block in python_blocks(text)
        for node in ast.walk(block)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    }
    undefined = []
    for code in inline_code(text):
        if (ROOT / code).is_file():
            continue
        found = re.match(r"(?:taxolens\.)?([A-Z]\w*)(?:\.(\w+))?(?=$|[(.\[])", code)
        call = re.match(r"(?:\w+\.)*([a-z_]\w*)\(", code)
        if found and found[2]:
            defined = has(found[1], found[2])
        elif found or call:
            name = found[1] if found else call[1]  # type: ignore[index]
            known = name in own | EXAMPLES or name in definitions() or name.isupper()
            defined = known or any(hasattr(library, name) for library in LIBRARIES)
        else:
            continue
        if not defined:
            undefined.append(code)
    return undefined


@each_page
def test_names_in_code_exist(page: Path) -> None:
    text = page.read_text()
    assert missing_names(text) == [] and unknown_keywords(text) == []
    assert undefined_code(text) == []


# Commands -----------------------------------------------------------------------------------------


@cache
def flags_of(command: str) -> set[str]:
    """The flags of `taxolens COMMAND`; those of `train` with every architecture of SAELens and ours."""
    module = importlib.import_module(f"taxolens.plugin.commands.{command}")
    return {"--help", "--debug", *module.parser()._option_string_actions}


@cache
def flags_of_script(path: str) -> set[str]:
    return set(re.findall(r'"(--[\w-]+)"', (ROOT / path).read_text()))


def command_lines(text: str) -> list[str]:
    """Command lines in code blocks and in backticks."""
    lines = inline_code(text)
    for _, body in FENCE.findall(text):
        lines += re.sub(r"\\\n\s*", "", body).splitlines()
    return [line.partition("  #")[0] for line in lines]


def unknown_flags(text: str) -> list[str]:
    """Commands and flags that do not exist; a flag without a command must belong to a command or to
    a script of benchmarks/."""
    unknown = []
    every = {flag for command in COMMANDS for flag in flags_of(command)} | {"--version"}
    for path in (ROOT / "benchmarks").glob("*.py"):
        every |= {*underscored(flags_of_script(str(path.relative_to(ROOT))))}
    for line in command_lines(text):
        flags = underscored(re.findall(r"(?<!\S)--[a-z][\w-]*", line))
        command = re.match(r"taxolens ([a-z]\w*)", line)
        script = re.match(r"python (benchmarks/\w+\.py)", line)
        if command and command[1] in COMMANDS:
            known = flags_of(command[1])
        elif script:
            known = {*underscored(flags_of_script(script[1]))}
        elif line.startswith(("--", "taxolens --")):
            known = every
        else:
            known = set(flags)
            if command and command[1] not in EXAMPLES:
                unknown.append(line)
        unknown += [f"{flag} in: {line}" for flag in flags if flag not in known | EXAMPLES]
    return unknown


@each_page
def test_command_lines_exist(page: Path) -> None:
    text = page.read_text()
    assert unknown_flags(text) == []
    for preset in re.findall(r"--preset ([a-z][\w-]*)", text):
        assert load_preset(preset)


def test_the_evaluators_page_opens_with_what_each_metric_tells_apart() -> None:
    text = (ROOT / "docs" / "evaluators.md").read_text(encoding="utf-8")
    before, table = text.split("<!-- photographs: glance -->\n", 1)
    assert len(before) < 1000 and "|" not in before
    head, _, *rows = table.split("<!--", 1)[0].strip().splitlines()
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    assert columns[:2] == ["metric", "draws"] and len(columns) == 10 and len(rows) > 15


def test_what_does_not_exist_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[a](#one-heading) [b](#two) [c](none.md) [d](https://e.org)\n")
    assert broken_links(page, page.read_text()) == ["#two", "none.md"]
    assert missing_paths("`registry/none.py` `registry/presets/<name>.yaml` `plugin/`") == [
        "registry/none.py"
    ]
    text = "`taxolens.hooks.model` `registry.none` `taxolens.results/1`\n"
    text += "```python\nfrom taxolens.registry.errors import ConfigError, NoError\n```\n"
    assert [line.split(" ")[0] for line in missing_names(text)] == [
        "taxolens.hooks.model",
        "taxolens.registry.errors.NoError",
        "taxolens.registry.none",
    ]
    call = "```python\ntaxolens.evaluate_run(runs, settings, seed=1, sed=1)\n```\n"
    assert unknown_keywords(call) == ["evaluate_run(sed=)"]
    code = "`Choice` `Taxonomy.lch` `Taxonomy.lhc` `run_to_hook(model)` `SAE.load_from_disk`"
    assert undefined_code(code) == ["Choice", "Taxonomy.lhc", "run_to_hook(model)"]
    lines = "`taxolens evaluate RUN --sed 1 --seed 1` `taxolens trian` `--max-images` `--max_image`"
    assert [flag.split(" ")[0] for flag in unknown_flags(lines)] == [
        "--sed",
        "taxolens",
        "--max_image",
    ]
