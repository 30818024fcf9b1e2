"""A Forge Neo server in a process of its own, with a data folder of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.forge.webui import WebUI

FLAGS = (
    "--cpu",
    "--skip-torch-cuda-test",
    "--skip-prepare-environment",
    "--skip-python-version-check",
    "--skip-version-check",
    "--api",
    "--server-name=127.0.0.1",
)


class NeoUI(WebUI):
    """As `WebUI`, for Forge Neo."""

    flags = FLAGS

    def first_settings(self, root: Path) -> dict[str, Any]:
        """Settings of another version of Neo are asked about, at the keyboard."""
        source = (root / "modules/launch_utils.py").read_text(encoding="utf-8")
        found = re.search(r'VERSION_UID[^=]*=\s*"([^"]+)"', source)
        return {} if found is None else {"VERSION_UID": found[1]}

    def models_from(self, data: Path, models: Path) -> list[str]:
        return ["--model-ref", str(models)]
