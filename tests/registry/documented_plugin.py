"""The plugin that docs/plugins.md writes: its Python blocks as one module."""

import re
import sys
import types
from functools import cache
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs" / "plugins.md"


@cache
def documented_plugin() -> types.ModuleType:
    module = types.ModuleType("documented_plugin_module")
    sys.modules[module.__name__] = module  # dataclasses and pickles look their module up
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    exec(compile("\n".join(blocks), str(DOCS), "exec"), vars(module))
    return module
