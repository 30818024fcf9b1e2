"""A real Forge Neo, where NEO_ROOT says that there is one; else a skip that says how."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.neo.real_neo import HOW_TO_RUN


@pytest.fixture(scope="session")
def neo_root() -> Path:
    root = os.environ.get("NEO_ROOT")
    if not root:
        pytest.skip(HOW_TO_RUN)
    return Path(root).resolve()
