"""The benchmark on photographs, on the demo's pictures."""

import json
import sys
from pathlib import Path

import photographs
import pytest
import torch
from photographs import NAMES, matched_cosine, stability

ASSETS = Path(__file__).resolve().parents[2] / "plugin" / "demo_assets"


def test_the_same_dictionary_in_another_order_is_stable():
    torch.manual_seed(0)
    rows = torch.randn(30, 8)
    order = torch.randperm(30)
    assert matched_cosine(rows, 3 * rows[order]) == pytest.approx(1, abs=1e-6)
    assert matched_cosine(rows, rows[order[:10]]) == pytest.approx(1, abs=1e-6)


def test_random_dictionaries_are_as_stable_as_their_null():
    torch.manual_seed(1)
    numbers = stability(torch.randn(200, 16), torch.randn(200, 16))
    assert numbers["stability"] == pytest.approx(numbers["stability_null"], abs=0.02)
    assert 0.3 < numbers["stability_null"] < 0.9


def test_a_run_in_miniature(monkeypatch, tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    command = ["photographs.py", "--model", str(ASSETS / "model")]
    command += ["--dataset", str(ASSETS / "pictures"), "--taxonomy", str(ASSETS / "taxonomy.json")]
    command += ["--tokens", "class", "--class-hook", "blocks.2.hook_resid_post"]
    command += ["--class-images", "64", "128", "--d-sae", "64", "--l0", "4", "--steps", "20"]
    command += ["--batch", "32", "--permutations", "1", "--probed-nodes", "4"]
    command += ["--architectures", "topk", "neurons", "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", [*command, "--results", str(file)])
    photographs.main()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["architecture"], row["seed"]) for row in rows] == [
        ("topk", 0),
        ("neurons", 0),
        ("topk", 1),
    ]
    assert rows[0]["l0"] == pytest.approx(4, abs=0.1)
    assert 0 < rows[0]["r2"] < 1
    assert 0 <= rows[0]["coverage"] <= 1
    assert rows[2]["stability"] > rows[2]["stability_null"]
    assert "| `topk` | 2 |" in capsys.readouterr().out
    photographs.main()
    assert len(file.read_text().splitlines()) == 3
    assert "topk" in NAMES

    monkeypatch.setattr(sys, "argv", [*command, "--lr", "0.01", "--results", str(file)])
    photographs.main()  # another rate is another result
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["lr"], row["seed"]) for row in rows if row["architecture"] == "topk"] == [
        (0.001, 0), (0.001, 1), (0.01, 0), (0.01, 1)]  # fmt: skip
    assert rows[3]["r2"] > rows[0]["r2"]
    assert "class tokens, lr 0.01" in capsys.readouterr().out
