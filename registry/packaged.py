"""The demo's model, pictures and tree, which lie inside the package, by their names in settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# setuptools installs packages unzipped, and the libraries read files.
FOLDER = Path(__file__).parents[1] / "plugin" / "demo_assets"
PACKAGED = {
    "demo:model": FOLDER / "model",
    "demo:pictures": FOLDER / "pictures",
    "demo:tree": FOLDER / "taxonomy.json",
}


def packaged(name: Any) -> Any:
    """The path of what a name stands for that is in `PACKAGED`, as text; anything else as it is."""
    return str(PACKAGED[name]) if isinstance(name, str) and name in PACKAGED else name
