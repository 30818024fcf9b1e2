"""A real Forge Neo, where NEO_ROOT says that there is one; else a skip that says how."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.neo.real_neo import Neo, import_neo
from tests.neo.webui import HOW_TO_RUN


@pytest.fixture(scope="session")
def neo_root() -> Path:
    root = os.environ.get("NEO_ROOT")
    if not root:
        pytest.skip(HOW_TO_RUN)
    return Path(root).resolve()


@pytest.fixture(scope="session")
def neo(neo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neo]:
    """The host, imported once for the session."""
    path = list(sys.path)
    yield import_neo(neo_root, tmp_path_factory.mktemp("neo-data"))
    sys.path[:] = path
