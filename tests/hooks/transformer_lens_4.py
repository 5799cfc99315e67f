"""What we import from TransformerLens, and what TransformerLens 4 has of it.

`python tests/hooks/transformer_lens_4.py [WHEEL]` writes transformer_lens_4.json beside this file:
the public names in every module that we import from. Without WHEEL, pip downloads the newest 4.x.
The wheel is read, not installed or imported: SAELens needs TransformerLens below 4.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).with_suffix(".json")
PACKAGE = "transformer_lens"
Imports = dict[str, set[str]]  # module -> names imported from it


def our_imports() -> Imports:
    """What the three rooms import from TransformerLens."""
    found: Imports = {}
    for room in ("plugin", "hooks", "registry"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for module, names in imports(path.read_text()).items():
                found.setdefault(module, set()).update(names)
    return found


def imports(source: str) -> Imports:
    """What `source` imports from TransformerLens.

    An attribute of an imported name counts as a name in it: `from a import b`, then `b.c`, gives
    {"a": {"b"}, "a.b": {"c"}}, since `b` may be a module.
    """
    tree, found, bound = ast.parse(source), {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module.split(".")[0] == PACKAGE:
                names = {alias.name for alias in node.names}
                found.setdefault(node.module, set()).update(names)
                bound |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    found.setdefault(alias.name, set())
                    bound[alias.asname or PACKAGE] = alias.name if alias.asname else PACKAGE
    for node in ast.walk(tree):
        owner = bound.get(getattr(getattr(node, "value", None), "id", ""))
        if isinstance(node, ast.Attribute) and owner:
            found.setdefault(owner, set()).add(node.attr)
    return found


def missing(imported: Imports, modules: dict[str, list[str]]) -> list[str]:
    """What of `imported` is not in `modules`, as dotted names."""
    absent = []
    for module, names in imported.items():
        parent, _, last = module.rpartition(".")
        if module in modules:
            absent += [f"{module}.{name}" for name in names if name not in modules[module]]
        elif not names and any(known.startswith(f"{module}.") for known in modules):
            continue  # a package
        elif last not in modules.get(parent, ()):  # else a class, and `names` its attributes
            absent.append(module)
    return sorted(absent)


def public_names(body: list[ast.stmt]) -> Iterator[str]:
    """The public names that a module's statements bind, those of other packages left out."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found = [node.name]
        elif isinstance(node, ast.ImportFrom):
            own = node.level or (node.module or "").split(".")[0] == PACKAGE
            found = [alias.asname or alias.name for alias in node.names if own]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [target.id for target in targets if isinstance(target, ast.Name)]
        else:  # if, try, with
            found = []
            for part in ("body", "orelse", "handlers", "finalbody"):
                found += public_names(getattr(node, part, []))
        yield from (name for name in found if not name.startswith("_"))


def read_wheel(wheel: Path) -> dict[str, object]:
    """The version and, of every module that we import from, its public names and submodules."""
    with zipfile.ZipFile(wheel) as archive:
        sources = {
            ".".join(PurePosixPath(name).with_suffix("").parts).removesuffix(".__init__"): name
            for name in archive.namelist()
            if name.endswith(".py")
        }
        modules: dict[str, list[str]] = {}
        for module in sorted(our_imports()):
            if module in sources:
                tree = ast.parse(archive.read(sources[module]))
                inside = {s.rpartition(".")[2] for s in sources if s.rpartition(".")[0] == module}
                modules[module] = sorted({*public_names(tree.body), *inside})
    return {"version": wheel.name.split("-")[1], "modules": modules}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(sys.argv[1]) if len(sys.argv) > 1 else None
        if wheel is None:
            download = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder]
            subprocess.run([*download, "transformer-lens>=4,<5"], check=True)
            (wheel,) = Path(folder).glob("*.whl")
        DATA.write_text(json.dumps(read_wheel(wheel), indent=1) + "\n")
    print(f"wrote {DATA}")


if __name__ == "__main__":
    main()
