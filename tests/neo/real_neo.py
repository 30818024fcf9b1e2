"""Importing a real Forge Neo into the test process, without its server and without its user's files."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

HOW_TO_RUN = (
    "needs a Forge Neo and the Python that runs it: NEO_ROOT=/path/to/sd-webui-forge-classic <its python> "
    "-m pytest tests/neo"
)


def import_neo(root: Path, data: Path) -> None:
    """Import and initialize the host as its `webui.py` does, as far as LoRAs go.

    root: the folder of `webui.py`; data: stands in for its user's settings, models and LoRAs. The command
    line and the environment are those of the host during the import only; `sys.path` keeps its folders.
    """
    paths = root, root / "modules_forge/packages", root / "extensions-builtin/sd_forge_lora"
    sys.path[:0] = [str(path) for path in paths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["webui.py", "--cpu", "--skip-torch-cuda-test", "--data-dir", str(data)])
        patch.setenv("COMMANDLINE_ARGS", "")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        import_module("modules.shared_init").initialize()
        import_module("modules.processing")  # before `networks`, which would import it in a circle
        import_module("networks")
