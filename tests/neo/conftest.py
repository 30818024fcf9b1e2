"""A real Forge Neo, where NEO_ROOT says that there is one; else a skip that says how."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forge.checkpoint import make_checkpoint, make_lora, save_lora
from tests.neo.webui import HOW_TO_RUN, NeoUI


@pytest.fixture(scope="session")
def neo_root() -> Path:
    root = os.environ.get("NEO_ROOT")
    if not root:
        pytest.skip(HOW_TO_RUN)
    return Path(root).resolve()


@pytest.fixture(scope="module")
def folder(neo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a server of this module reads and writes: in `models/` a checkpoint "small" and a LoRA "strong".

    Removed at the end: pytest would keep that of the last three runs.
    """
    folder = tmp_path_factory.mktemp("server")
    checkpoint = folder / "models/Stable-diffusion/small.safetensors"
    make_checkpoint(neo_root, checkpoint)
    save_lora(folder / "models/Lora/strong.safetensors", make_lora(checkpoint, rank=8, seed=1))
    save_lora(folder / "models/Lora/other.safetensors", make_lora(checkpoint, rank=4, seed=2))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def webui(neo_root: Path, folder: Path) -> Iterator[NeoUI]:
    """A Neo with the extension."""
    with NeoUI(neo_root, folder / "webui", folder / "models", extension=True) as server:
        server.wait_until_ready()
        server.post("options", {"sd_model_checkpoint": "small.safetensors"})
        yield server
