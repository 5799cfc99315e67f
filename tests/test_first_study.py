"""docs/first-study.md: from photos in a folder and a tree in a table to a report, block by block."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from taxolens.hooks.images.dataset import load_images
from taxolens.plugin import cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "first-study.md"
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)


def test_every_block_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, PAGE.name, "exec"), scope)
        else:
            program, *words = shlex.split(text.replace("\\\n", " "))
            assert program == "taxolens"
            assert cli.main(words) in (0, None)
    photos = load_images("photos")
    assert len(photos) == 360 and len(photos.class_names) == 12
    assert len(scope["held_out"]) == 72

    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert results["complete"] and len(results["saes"]) == 2
    assert results["dataset"]["fingerprint"] == scope["held_out"].fingerprint
    assert results["dataset"]["n_images"] == 72 and results["dataset"]["n_present"] == 12
    for sae in results["saes"]:
        assert {"reconstruction", "taxonomic_autocorrelation", "pair_depth"} <= set(
            sae["evaluators"]
        )
        assert not any(found["error"] for found in sae["evaluators"].values())
    page = (tmp_path / "study" / "report.html").read_text()
    assert "12 classes" in page and "72 images" in page

    # The last block: the SAE keeps most predictions, the error term all, and the latent moves some.
    assert scope["changed"] < 0.5
    assert scope["torch"].allclose(scope["same"], scope["clean"], atol=1e-3)
    assert 0 < int((scope["moved"] > 1e-4).sum()) < 72
    printed = capsys.readouterr().out
    assert "the SAE changes the predicted class of" in printed and "moves the logits of" in printed
