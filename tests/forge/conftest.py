"""A real Forge in the test process, where FORGE_ROOT says that there is one; else a skip that says how."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.forge.real_forge import HOW_TO_RUN, Forge, import_forge

if TYPE_CHECKING:
    from lib_precision_lora.host.binding import Binding


@pytest.fixture(scope="session")
def forge_root() -> Path:
    root = os.environ.get("FORGE_ROOT")
    if not root:
        pytest.skip(HOW_TO_RUN)
    return Path(root).resolve()


@pytest.fixture(scope="session")
def forge(forge_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """The host, imported once for the session."""
    path = list(sys.path)
    yield import_forge(forge_root, tmp_path_factory.mktemp("forge-data"))
    sys.path[:] = path


@pytest.fixture
def precision_lora(forge: Forge) -> Iterator[Binding]:
    """Our binding in the running host, with its settings registered, for one test; options are put back."""
    from lib_precision_lora.host import install, installation, uninstall
    from lib_precision_lora.host.page.settings import register_settings

    register_settings()
    options = dict(forge.shared.opts.data)
    assert install(), "this Forge lacks something that the binding relies on; the log says what"
    active = installation.active()
    assert active is not None
    yield active
    uninstall()
    forge.shared.opts.data = options


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """These tensors are small: waking a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
