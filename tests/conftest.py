"""What holds for every test."""

from __future__ import annotations

import gc

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Imported modules and collected tests live to the end: `gc.collect()`, which many tests call, need not
    look at them each time."""
    gc.collect()
    gc.freeze()
