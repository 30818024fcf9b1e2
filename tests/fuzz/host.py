"""The double of the WebUI, with us in it and LoRAs in its folder, as the tests of `tests/host` have it."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

import lib_precision_lora.report.demo.quiet_bitsandbytes  # noqa: F401  before tests import it
from lib_precision_lora.host import install, uninstall
from lib_precision_lora.host.page.settings import register_settings
from tests.containers.hostile import RUNNING
from tests.host.lora_files import make_lora
from tests.host.webui import Host, running_host

FILES = ("cats", "dogs", "half", "torn", "nan", "code", "cats, big", "512x512")
"""What is in the folder; of them apply `cats`, `dogs` and those with odd names."""

LOGGER = logging.getLogger("lib_precision_lora")


@contextmanager
def webui(folder: Path) -> Iterator[Host]:
    """Its folder for LoRAs is `folder / "Lora"`."""
    loras = folder / "Lora"
    loras.mkdir()
    with running_host("double", folder / "data", loras) as host:
        register_settings()
        assert install()
        try:
            for name in ("cats", "dogs", "cats, big", "512x512"):
                make_lora(name).write(host)
            whole = (loras / "cats.safetensors").read_bytes()
            (loras / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
            up = torch.full((8, 2), torch.nan)
            safetensors.torch.save_file({"lora_unet_low.lora_up.weight": up}, loras / "nan.safetensors")
            half = {"lora_unet_low\n\x1b[31m.lora_up.weight": torch.ones(8, 2)}
            safetensors.torch.save_file(half, loras / "half.safetensors")
            RUNNING["a command"][0](loras / "code.pt")
            host.networks.list_available_networks()
            yield host
        finally:
            uninstall()


@contextmanager
def log() -> Iterator[io.StringIO]:
    """What a console would show of our log."""
    from lib_precision_lora.host.logs import set_up_logging

    stream, stdout = io.StringIO(), sys.stdout
    before = LOGGER.handlers[:], LOGGER.filters[:], LOGGER.level, LOGGER.propagate
    LOGGER.handlers[:], LOGGER.filters[:] = [], []
    sys.stdout = stream
    try:
        set_up_logging()
        yield stream
    finally:
        sys.stdout = stdout
        LOGGER.handlers[:], LOGGER.filters[:], LOGGER.level, LOGGER.propagate = before


@contextmanager
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch
