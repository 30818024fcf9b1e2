"""What holds for every test.

`WRONG_BITSANDBYTES=1 make test` runs them with a bitsandbytes that decodes 4-bit weights as wrongly as its
kernel for some CPUs does, on any CPU (`tests.storage.four_bit`).
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("WRONG_BITSANDBYTES"):
        from tests.storage.four_bit import install_wrong_bitsandbytes

        install_wrong_bitsandbytes()


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
