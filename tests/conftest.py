"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs scripts in processes that start within a second: see `Forks.run`."""
    server = Forks()
    yield server
    server.close()
