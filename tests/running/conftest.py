"""A server of the WebUI for a module, with a checkpoint and a LoRA of its own, and a browser for its page.

The WebUI is the one whose folder is given, Forge or Forge Neo; it runs in the Python that runs the tests.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.running.checkpoint import make_checkpoint, make_lora, save_lora
from tests.running.neo import NeoUI
from tests.running.page import chromium
from tests.running.webui import WebUI

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

HOSTS = {"FORGE_ROOT": WebUI, "NEO_ROOT": NeoUI}
HOW_TO_RUN = (
    "needs a WebUI and the Python that runs it: FORGE_ROOT=/path/to/stable-diffusion-webui-forge, or "
    "NEO_ROOT=/path/to/sd-webui-forge-classic, <its python> -m pytest tests/running"
)


@pytest.fixture(scope="session")
def host() -> tuple[type[WebUI], Path]:
    """What starts a server of the host that is given, and the host's folder."""
    given = [(kind, Path(os.environ[name]).resolve()) for name, kind in HOSTS.items() if os.environ.get(name)]
    if not given:
        pytest.skip(HOW_TO_RUN)
    assert len(given) == 1, "two WebUIs need two Pythons: give the folder of one"
    return given[0]


@pytest.fixture(scope="session")
def host_root(host: tuple[type[WebUI], Path]) -> Path:
    """The host's folder."""
    return host[1]


@pytest.fixture(scope="session")
def start(host: tuple[type[WebUI], Path]) -> Callable[..., WebUI]:
    """Starts a server of the host; takes what `WebUI` takes after its root."""
    return partial(*host)


@pytest.fixture(scope="module")
def folder(host_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a server of this module reads and writes: in `models/` a checkpoint "small" and a LoRA "strong".

    Removed at the end: pytest would keep that of the last three runs.
    """
    folder = tmp_path_factory.mktemp("server")
    checkpoint = folder / "models/Stable-diffusion/small.safetensors"
    make_checkpoint(host_root, checkpoint)
    save_lora(folder / "models/Lora/strong.safetensors", make_lora(checkpoint, rank=8, seed=1))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def webui(start: Callable[..., WebUI], folder: Path) -> Iterator[WebUI]:
    """The host with the extension."""
    with start(folder / "webui", folder / "models", extension=True) as server:
        server.wait_until_ready()
        server.post("options", {"sd_model_checkpoint": "small.safetensors"})
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    with chromium(tmp_path_factory.mktemp("browser")) as context:
        yield context
