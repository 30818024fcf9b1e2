"""What holds for every test."""

from __future__ import annotations

import gc

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Imported modules and collected tests live to the end: `gc.collect()`, which many tests call, need not
    look at them each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes: one of them has the page, its server and its browser."""
    for item in items:
        if "tests/page/" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("page"))
