"""Importing a real Forge Neo into the test process, without its server and without its user's files."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

HOW_TO_RUN = (
    "needs a Forge Neo and the Python that runs it: NEO_ROOT=/path/to/sd-webui-forge-classic <its python> "
    "-m pytest tests/neo"
)


@dataclass(frozen=True, slots=True, eq=False)
class Neo:
    """The modules of the host that tests reach for, on the CPU, with an empty data folder.

    data: that folder; lora_dir: where its `networks` looks for LoRA files.
    """

    root: Path
    data: Path
    lora_dir: Path
    clip: ModuleType
    lora: ModuleType
    memory_management: ModuleType
    networks: ModuleType
    operations: ModuleType
    patcher: ModuleType
    sd_models: ModuleType
    shared: ModuleType


MODULES = {
    "clip": "backend.patcher.clip",
    "lora": "backend.patcher.lora",
    "memory_management": "backend.memory_management",
    "networks": "networks",
    "operations": "backend.operations",
    "patcher": "backend.patcher.base",
    "sd_models": "modules.sd_models",
    "shared": "modules.shared",
}


def import_neo(root: Path, data: Path) -> Neo:
    """Import and initialize the host as its `webui.py` does, as far as LoRAs go.

    root: the folder of `webui.py`; data: stands in for its user's settings, models and LoRAs. The command
    line and the environment are those of the host during the import only; `sys.path` keeps its folders.
    """
    paths = (root, root / "modules_forge/packages", root / "extensions-builtin/sd_forge_lora")
    sys.path[:0] = [str(path) for path in paths]
    arguments = ["--cpu", "--skip-torch-cuda-test", "--skip-python-version-check", "--data-dir", str(data)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["webui.py", *arguments])
        patch.setenv("COMMANDLINE_ARGS", "")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        import_module("modules_forge.initialization").initialize_forge()
        import_module("modules.shared_init").initialize()
        import_module("modules.processing")  # before `networks`, which would import it in a circle
        modules = {field.name: import_module(MODULES[field.name]) for field in fields(Neo)[3:]}
    return Neo(root, data, Path(modules["shared"].cmd_opts.lora_dir), **modules)
