"""`benchmarks/peers.py`: interpreters that are given."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import peers
import pytest


def test_a_given_interpreter_is_used_and_nothing_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(peers.subprocess, "run", offline)
    given = dict([peers.interpreter(f"saev={sys.executable}")])
    pythons, left_out = peers.environments(["ours", "overcomplete", "saev"], tmp_path, given)
    assert pythons == {"ours": sys.executable, "saev": sys.executable}
    assert left_out == {"overcomplete": "cannot be installed here: no network"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["saev", "saev=", "saev=/no/such/python", f"ours={sys.executable}"]
)
def test_what_is_no_way_or_no_interpreter_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^given {text}; allowed: WAY=PATH"):
        peers.interpreter(text)
