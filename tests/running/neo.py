"""A Forge Neo server in a process of its own, with a data folder of its own, and a client for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.running.webui import SMALL_IMAGE, WebUI

FLAGS = (
    "--cpu",
    "--skip-torch-cuda-test",
    "--skip-prepare-environment",
    "--skip-python-version-check",
    "--skip-version-check",
    "--api",
    "--server-name=127.0.0.1",
)
PRESET = "sd"
"""The kind of model that is chosen: its page begins with the settings of it, not with `ui-config.json`."""


class NeoUI(WebUI):
    """As `WebUI`, for Forge Neo."""

    flags = FLAGS
    moved = ("Requested to load", "Moving model(s)")
    card = "neo_card.py"

    def first_settings(self, root: Path) -> dict[str, Any]:
        """Settings of another version of Neo are asked about, at the keyboard."""
        source = (root / "modules/launch_utils.py").read_text(encoding="utf-8")
        found = re.search(r'VERSION_UID[^=]*=\s*"([^"]+)"', source)
        page = {
            f"{PRESET}_{tab}_{name}": SMALL_IMAGE[value]
            for tab in ("t2i", "i2i")
            for name, value in (
                ("sampler", "sampler_name"),
                ("scheduler", "scheduler"),
                ("step", "steps"),
                ("cfg", "cfg_scale"),
                ("width", "width"),
                ("height", "height"),
            )
        }
        return {"forge_preset": PRESET, **page, **({} if found is None else {"VERSION_UID": found[1]})}

    def models_from(self, data: Path, models: Path) -> list[str]:
        return ["--model-ref", str(models)]

    def hires(self) -> dict[str, Any]:
        """It has no upscaler in latent space; those of images are loaded with the page."""
        names = [each["name"] for each in self.get("upscalers")]
        if not names:
            pytest.skip("this Neo has no upscaler, and hires fix fails in it without this extension, too")
        return {**super().hires(), "hr_upscaler": names[0]}

    @contextmanager
    def stored_as(self, storage: str) -> Iterator[None]:
        """The checkpoint with another "Diffusion in Low Bits", then as it is now.

        Neo reads this setting where the checkpoint changes: another is named in between, and not loaded.
        """
        before = self.settings()
        self._store(storage)
        try:
            yield
        finally:
            self._store(before["forge_unet_storage_dtype"])

    def _store(self, storage: str) -> None:
        folder = self._models / "Stable-diffusion"
        other = folder / "another-name.safetensors"
        if not other.exists():
            other.hardlink_to(folder / "small.safetensors")
        self.post("refresh-checkpoints", {})
        self.post("options", {"sd_model_checkpoint": other.name})
        self.post("options", {"forge_unet_storage_dtype": storage})
        self.post("options", {"sd_model_checkpoint": "small.safetensors"})
