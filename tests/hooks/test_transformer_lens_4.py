"""Nothing of ours imports from TransformerLens what TransformerLens 4 removed."""

from __future__ import annotations

import json

import pytest
from transformer_lens_4 import DATA, imports, missing, our_imports

TRANSFORMER_LENS_4 = json.loads(DATA.read_text())


def test_transformer_lens_4_has_all_that_we_import() -> None:
    imported = our_imports()
    assert "HookPoint" in imported["transformer_lens.hook_points"]
    assert "VISION_ARCHITECTURES" in imported["transformer_lens.utilities.architectures"]
    assert missing(imported, TRANSFORMER_LENS_4["modules"]) == [], (
        f"not in TransformerLens {TRANSFORMER_LENS_4['version']}, or not yet in {DATA.name}: "
        "run tests/hooks/transformer_lens_4.py again"
    )


@pytest.mark.parametrize(
    ("source", "absent"),
    [
        ("from transformer_lens.hook_points import HookPoint", []),
        ("from transformer_lens.hook_points import HookPoint\nHookPoint.add_hook", []),
        ("from transformer_lens.hook_points import HookedRootModule", ["hook_points.HookedRootModule"]),
        ("from transformer_lens.HookedTransformer import Loss", ["HookedTransformer"]),
        ("import transformer_lens", []),
        ("import transformer_lens.utils", ["utils"]),
        ("import transformer_lens.hook_points as h\nh.HookedRootModule", ["hook_points.HookedRootModule"]),
        ("from transformer_lens.utilities import architectures as a\na.OLD", ["utilities.architectures.OLD"]),
        ("def f():\n  from transformer_lens.utilities import old", ["utilities.old"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(source: str, absent: list[str]) -> None:
    found = missing(imports(source), TRANSFORMER_LENS_4["modules"])
    assert found == [f"transformer_lens.{name}" for name in absent]
