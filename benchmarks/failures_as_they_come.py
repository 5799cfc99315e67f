"""A pytest plugin that prints each failure at once, so that a time limit loses none.

It is loaded with `-p failures_as_they_come`, where this folder is on the path of imports.
"""

from __future__ import annotations

from typing import Any

import pytest


class Failures:
    """Writes the failures of a run to its terminal."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a test that failed, with its error."""
        self._write(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write a file that cannot be imported, with its error."""
        self._write(report)

    def _write(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(f"FAILED {report.nodeid} ({report.when})\n{report.longreprtext}")


def pytest_configure(config: pytest.Config) -> None:
    """Take part, but not in a process of pytest-xdist, which reports to the first one."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(config))
