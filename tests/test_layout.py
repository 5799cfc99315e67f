"""The layout: imports run one way and in no circle, parts are no exhibits, every file is packaged."""

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("registry", "hooks", "plugin")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]

# From the bottom up: a module imports its own package and what lies below. A module belongs to the
# longest of these names that it starts with.
LEVELS = (
    ("registry",),
    ("registry.taxonomies", "registry.presets"),
    ("registry.evaluators.base",),
    ("registry.evaluators.parts", "registry.architectures.parts", "registry.loaders.parts"),
    ("registry.evaluators", "registry.architectures", "registry.loaders"),
    ("hooks.images",),
    ("hooks.models",),
    ("hooks.activations",),
    ("plugin.hookspecs", "plugin.registration", "plugin.moved"),
    ("plugin.demo_assets", "plugin.reporting"),
    ("plugin.evaluation", "plugin.builtin"),
    ("plugin.training", "plugin.sae_lens_bridge", "plugin.transformer_lens_bridge"),
    ("plugin.study", "plugin.manager"),
    ("plugin.commands",),
    ("plugin.cli",),
)
Graph = Mapping[str, Iterable[str]]


def modules(root: Path) -> dict[str, Path]:
    """Dotted name, relative to the package -> file."""
    found = {}
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules that it imports, inside functions and under TYPE_CHECKING too."""
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        package = module.split(".")[: None if path.name == "__init__.py" else -1]
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = package[: len(package) - node.level + 1]
            source = ".".join([*base, *([node.module] if node.module else [])])
            for name in (alias.name for alias in node.names):
                inside = f"{source}.{name}"
                graph[module].add(inside if inside in files else source)
        graph[module].discard(module)
    return graph


def reachable(graph: Graph, start: str) -> set[str]:
    """The modules that `start` imports, directly or through others."""
    found: set[str] = set()
    waiting = list(graph.get(start, ()))
    while waiting:
        if (module := waiting.pop()) not in found:
            found.add(module)
            waiting += graph.get(module, ())
    return found


def circles(graph: Graph) -> list[list[str]]:
    """The groups of modules that import each other: strongly connected components of more than one."""
    below = {module: reachable(graph, module) for module in graph}
    groups = {
        tuple(sorted(other for other in below[module] if module in below.get(other, ())))
        for module in graph
        if module in below[module]
    }
    return [list(group) for group in sorted(groups)]


def place_of(module: str, levels: Sequence[Sequence[str]]) -> tuple[int, str]:
    """The level of a module, and the name in `levels` that it belongs to."""
    places = [
        (len(name), level, name)
        for level, names in enumerate(levels)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert places, f"{module} has no level: put it into LEVELS"
    return max(places)[1:]


def arrows_upward(graph: Graph, levels: Sequence[Sequence[str]]) -> list[str]:
    """The imports that run neither inside one name of `levels` nor down."""
    found = []
    for module, imported in graph.items():
        for other in sorted(imported):
            (level, place), (other_level, other_place) = (
                place_of(module, levels),
                place_of(other, levels),
            )
            if place != other_place and other_level >= level:
                found.append(f"{module} -> {other}")
    return found


def registered_names(builtin: ast.Module) -> set[str]:
    """What builtin.py takes from the registry: imported names, and "module:attribute" strings."""
    found: set[str] = set()
    for node in ast.walk(builtin):
        if isinstance(node, ast.ImportFrom) and "registry." in (node.module or ""):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"^\w+:(\w+)$", node.value))
    return found


def defined_names(module: ast.Module) -> set[str]:
    """The classes, functions and variables at the top of a module."""
    found: set[str] = set()
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def exhibits(module: ast.Module) -> set[str]:
    """What only an exhibit has: subclasses of Evaluator, and variables that are an Architecture."""
    found: set[str] = set()
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
            if any(isinstance(base, ast.Name) and base.id == "Evaluator" for base in bases):
                found.add(node.name)
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "Architecture":
            found |= defined_names(ast.Module([node], []))
    return found


def test_no_module_imports_itself_through_others() -> None:
    assert circles(import_graph(modules(ROOT))) == []


def test_imports_run_down_the_levels() -> None:
    assert arrows_upward(import_graph(modules(ROOT)), LEVELS) == []


def test_a_circle_and_an_arrow_upward_are_found() -> None:
    levels = (("low",), ("low.parts", "beside"), ("high",))
    graph = {"low": [], "low.parts.a": ["low"], "high.a": ["low.parts.a", "high.b"], "high.b": []}
    assert circles(graph) == [] and arrows_upward(graph, levels) == []
    graph = {**graph, "low": ["high.a"], "beside": ["low.parts.a"]}
    assert circles(graph) == [["high.a", "low", "low.parts.a"]]
    assert arrows_upward(graph, levels) == ["low -> high.a", "beside -> low.parts.a"]
    with pytest.raises(AssertionError, match="lowest has no level"):
        arrows_upward({"lowest": ["low"]}, levels)


def test_imports_of_every_kind_count(tmp_path: Path) -> None:
    package = tmp_path / "hooks" / "wing"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import one\n")
    (package / "one.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .two import Thing\n"
    )
    (package / "two.py").write_text("def late():\n    from ..wing.one import other\n")
    graph = import_graph(modules(tmp_path))
    assert graph == {
        "hooks.wing": {"hooks.wing.one"},
        "hooks.wing.one": {"hooks.wing.two"},
        "hooks.wing.two": {"hooks.wing.one"},
    }
    assert circles(graph) == [["hooks.wing.one", "hooks.wing.two"]]


def test_an_evaluator_imports_no_other_evaluator() -> None:
    graph = import_graph(modules(ROOT))
    room = "registry.evaluators"
    for module, imported in graph.items():
        if module.startswith(f"{room}.") and module.count(".") == 2 and module != f"{room}.base":
            inside = {other for other in imported if other.startswith(room)}
            shared = {o for o in inside if o == f"{room}.base" or o.startswith(f"{room}.parts")}
            assert inside - shared == set(), f"{module} imports another evaluator's file"


@pytest.mark.parametrize("folder", ["architectures", "evaluators"])
def test_parts_hold_nothing_registered_and_beside_them_lies_nothing_else(folder: str) -> None:
    registered = registered_names(ast.parse((ROOT / "plugin" / "builtin.py").read_text()))
    room = ROOT / "registry" / folder
    for path in sorted((room / "parts").rglob("*.py")):
        module = ast.parse(path.read_text())
        assert defined_names(module) & registered == set(), f"{path} holds what is registered"
        assert exhibits(module) == set(), f"{path} holds an exhibit"
    for path in sorted(room.glob("*.py")):
        if path.name not in ("__init__.py", "base.py"):
            module = ast.parse(path.read_text())
            assert defined_names(module) & registered, f"{path} holds nothing that is registered"
            assert exhibits(module) <= registered, f"{path} holds an exhibit that is not registered"


def test_what_is_registered_and_what_is_an_exhibit_is_recognised() -> None:
    builtin = ast.parse(
        "from ..registry.architectures.mp import MP\nfrom . import hookspecs\nE = {'a': 'a:Able'}"
    )
    assert registered_names(builtin) == {"MP", "Able"}
    module = ast.parse(
        "MP = Architecture('mp')\nX: int = 1\nclass Able(Evaluator[Options]): ...\n"
        "class Part(Accumulator): ...\ndef help(): ..."
    )
    assert defined_names(module) == {"MP", "X", "Able", "Part", "help"}
    assert exhibits(module) == {"MP", "Able"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_each_other_relatively(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").split(".")[0] != "taxolens", path
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "taxolens" for alias in node.names), path


def test_the_face_is_a_docstring_and_absolute_imports() -> None:
    module = ast.parse((ROOT / "__init__.py").read_text())
    assert ast.get_docstring(module)
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "__main__.py"]


def test_every_package_is_listed() -> None:
    on_disk = {
        ".".join(["taxolens", *path.parent.relative_to(ROOT).parts])
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == on_disk | {"taxolens"}


def test_every_data_file_is_packaged() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    packages = PYPROJECT["tool"]["setuptools"]["packages"]
    folders = {package: ROOT.joinpath(*package.split(".")[1:]) for package in packages}
    packaged = {
        match
        for package, globs in patterns.items()
        for glob in globs
        for match in folders[package].glob(glob)
    }
    on_disk = {
        path
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert on_disk - packaged == set(), "these files would not reach a user"


def test_version_is_told_once() -> None:
    module = ast.parse((ROOT / "__init__.py").read_text())
    versions = [
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__"
    ]
    assert versions == [PYPROJECT["project"]["version"]]
    assert f"## [{versions[0]}]" in (ROOT / "CHANGELOG.md").read_text()
