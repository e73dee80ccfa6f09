"""A pytest plugin: every test's outcome is a line of JSON the moment it is known, and $SHARD runs a part of the tests.

$OUTCOMES names the file. A run that is cut off leaves what it found: names of failed tests and their last lines.
$SHARD is "i/n": every n-th test, from the i-th.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LAST = 12  # lines of a failure that are kept


class Recorder:
    """Appends outcomes to a file."""

    def __init__(self, path: Path):
        self.path = path
        self.broken: set[str] = set()  # files: every worker of xdist reports them

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record the call, and a setup or teardown that didn't pass."""
        if report.when != "call" and report.outcome == "passed":
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.outcome == "failed":
            line |= {"when": report.when, "last": report.longreprtext.splitlines()[-LAST:]}
        self._append(line)

    def pytest_collectreport(self, report: Any) -> None:
        """Record a file that can't be imported."""
        if report.failed and report.nodeid not in self.broken:
            self.broken.add(report.nodeid)
            self._append({"test": report.nodeid, "outcome": "failed", "last": report.longreprtext.splitlines()[-LAST:]})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config: Any) -> None:
    """Record in the process that hears of all tests: under xdist its workers report to it."""
    if os.environ.get("OUTCOMES") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(os.environ["OUTCOMES"])))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the shard's tests."""
    if os.environ.get("SHARD"):
        i, n = map(int, os.environ["SHARD"].split("/"))
        config.hook.pytest_deselected(items=[item for at, item in enumerate(items) if at % n != i - 1])
        items[:] = items[i - 1 :: n]
