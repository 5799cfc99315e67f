"""The tables of docs/performance.md are those that the scripts write from the stored results."""

from __future__ import annotations

from importlib import import_module

import pytest
import timing

SCRIPTS = ("autocast", "feeding", "freed_memory", "peers", "plan", "sharing", "start")


@pytest.mark.parametrize("name", [*SCRIPTS, "peers_gpu"])
def test_a_table_is_that_of_the_stored_results(name: str) -> None:
    script = import_module(name.removesuffix("_gpu"))
    written = script.shown(timing.stored(name))
    block = timing.PAGE.read_text().partition(f"<!-- {name} -->\n\n")[2]
    assert block.partition(f"\n\n<!-- /{name} -->")[0] == written
