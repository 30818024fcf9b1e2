"""A real Forge Neo, where NEO_ROOT says that there is one; else a skip that says how."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.neo.real_neo import HOW_TO_RUN, Neo, import_neo

if TYPE_CHECKING:
    from lib_precision_lora.host.binding import Binding


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


@pytest.fixture
def precision_lora(neo: Neo) -> Iterator[Binding]:
    """Our binding in the running host, with its settings registered, for one test; options are put back."""
    from lib_precision_lora.host import install, installation, uninstall
    from lib_precision_lora.host.page.settings import register_settings

    register_settings()
    options = dict(neo.shared.opts.data)
    assert install(), "this Neo lacks something that the binding relies on; the log says what"
    active = installation.active()
    assert active is not None
    yield active
    uninstall()
    neo.shared.opts.data = options
