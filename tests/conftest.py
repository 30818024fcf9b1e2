"""What holds for every test."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Imported modules and collected tests live to the end: `gc.collect()`, which many tests call, need not
    look at them each time."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Each reason for which tests were skipped, once, with their number."""
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")
