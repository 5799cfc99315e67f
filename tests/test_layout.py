"""The house: imports run one way, every package is listed, nothing stray lies at the root."""

import ast
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"plugin": 2, "hooks": 1, "registry": 0}
PLUGIN_ROOMS = {"study": 3, "training": 2, "evaluation": 1, "reporting": 0}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    """Absolute names of what `path` imports, at any depth of the file."""
    package = ("taxolens", *path.relative_to(ROOT).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found.add(".".join([*base, *([node.module] if node.module else [])]))
            if node.module is None:
                found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    own_level = ROOMS[path.relative_to(ROOT).parts[0]]
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "taxolens" and len(parts) > 1:
            assert parts[1] in ROOMS, f"{path} imports {module}, which is in no room"
            assert ROOMS[parts[1]] <= own_level, f"{path} imports {module}: against the direction"


@pytest.mark.parametrize("room", PLUGIN_ROOMS)
def test_rooms_of_the_plugin_import_one_way_too(room: str) -> None:
    for path in sorted((ROOT / "plugin" / room).rglob("*.py")):
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[:2] == ["taxolens", "plugin"] and len(parts) > 2:
                assert parts[2] in {*PLUGIN_ROOMS, "demo_assets"}, f"{path} imports {module}"
                level = PLUGIN_ROOMS.get(parts[2], 0)
                assert level <= PLUGIN_ROOMS[room], f"{path} imports {module}"


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
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


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
