"""A server of the WebUI for a module, with a checkpoint and a LoRA of its own, and a browser for its page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.forge.real_forge import HOW_TO_RUN
from tests.running.checkpoint import make_checkpoint, make_lora, save_lora
from tests.running.page import chromium
from tests.running.webui import WebUI

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext


@pytest.fixture(scope="session")
def forge_root() -> Path:
    root = os.environ.get("FORGE_ROOT")
    if not root:
        pytest.skip(HOW_TO_RUN)
    return Path(root).resolve()


@pytest.fixture(scope="module")
def folder(forge_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a server of this module reads and writes: in `models/` a checkpoint "small" and a LoRA "strong".

    Removed at the end: pytest would keep that of the last three runs.
    """
    folder = tmp_path_factory.mktemp("server")
    checkpoint = folder / "models/Stable-diffusion/small.safetensors"
    make_checkpoint(forge_root, checkpoint)
    save_lora(folder / "models/Lora/strong.safetensors", make_lora(checkpoint, rank=8, seed=1))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def webui(forge_root: Path, folder: Path) -> Iterator[WebUI]:
    """A Forge with the extension."""
    with WebUI(forge_root, folder / "webui", folder / "models", extension=True) as server:
        server.wait_until_ready()
        server.post("options", {"sd_model_checkpoint": "small.safetensors"})
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    with chromium(tmp_path_factory.mktemp("browser")) as context:
        yield context
