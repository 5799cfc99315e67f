"""The conformance run: a small fixed part of it, and the table of the docs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conformance import PAGE, STORED, quiet, run, table, write

# class -> (family, tokens at 64 x 64 and at 128 x 192 pixels where it takes both, verdict); patches
# are of 16 pixels, those of DINOv2 of 14
BRIDGED = {
    "ViTModel": ("vit", [17, 97], "passes"),
    "DeiTModel": ("vit", [18, 98], "passes"),
    "Dinov2Model": ("dinov2", [17, 118], "passes"),
    "Dinov2WithRegistersModel": ("dinov2_with_registers", [21, 101], "passes"),
    "DINOv3ViTModel": ("dinov3", [17, 97], "passes"),
    "CLIPVisionModel": ("clip", [17, 97], "passes"),
    "SiglipVisionModel": ("siglip", [16, 96], "passes"),
    "ViTMAEModel": ("vit_mae", [17, 97], "passes"),
    "BeitModel": ("beit", [17, 97], "passes"),
    "IJepaModel": ("ijepa", [16, 96], "passes"),
    "Aimv2VisionModel": ("aimv2", [16], "passes"),  # one size alone
}
WRAPPED = {
    "ConvNextV2Model": ("wrapped", None, "passes"),  # channels first, with norms channels last
    "SwinModel": ("wrapped", None, "passes"),  # (B, T, d) and windows
    "SamVisionModel": ("wrapped", [16], "passes"),  # (B, H, W, d), one size alone
    "VitDetModel": ("wrapped", [16, 96], "passes"),  # (B, d, H, W) outside of the blocks
    "ViTMSNModel": ("wrapped", [17, 97], "passes"),  # a class token
    "CvtModel": ("wrapped", None, "passes"),  # a class token in the last stage alone
    "YolosModel": ("wrapped", None, "passes"),  # detection tokens after the patches
    "HieraModel": ("wrapped", None, "passes"),  # mask units
    "PixtralVisionModel": ("wrapped", [16, 96], "passes"),  # all images in one row
    "TimesformerModel": ("wrapped", [], "refused"),  # videos
}


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    with quiet():
        found = run("|".join([*BRIDGED, *WRAPPED]))
    return {row["model"]: row for row in found}


@pytest.mark.parametrize("name", [*BRIDGED, *WRAPPED])
def test_it_passes_or_is_refused_in_one_sentence(name: str, rows: Any) -> None:
    family, tokens, verdict = {**BRIDGED, **WRAPPED}[name]
    row = rows[name]
    assert (row["family"], row["verdict"]) == (family, verdict), row
    assert tokens is None or row["tokens"] == tokens
    if name in BRIDGED:
        found, of = row["hidden_states"]
        assert found == of > 1
    if verdict == "refused":
        assert "it cannot be run on images" in row["reason"] and row["reason"].endswith(".")
    if name == "PixtralVisionModel":
        assert "refused: it gives 1 rows for 2 images" in row["reason"]


def test_the_table_is_that_of_the_stored_rows() -> None:
    page, stored = PAGE.read_text(), json.loads(STORED.read_text())
    assert table(stored) in page
    assert write(page, stored) == page


def test_nothing_stored_is_at_fault() -> None:
    models = json.loads(STORED.read_text())["models"]
    assert {row["verdict"] for row in models} <= {"passes", "refused", "not built"}
    names = {row["model"] for row in models}
    assert {*BRIDGED, *WRAPPED} <= names and len(names) == len(models) > 250
