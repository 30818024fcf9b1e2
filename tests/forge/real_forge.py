"""Importing a real Forge into the test process, without its server and without its user's files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

HOW_TO_RUN = (
    "needs a Stable Diffusion WebUI Forge and the Python that runs it: "
    "FORGE_ROOT=/path/to/stable-diffusion-webui-forge <its python> -m pytest tests/forge"
)


@dataclass(frozen=True, slots=True, eq=False)
class Forge:
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
    operations_gguf: ModuleType
    patcher: ModuleType
    processing: ModuleType
    sd_models: ModuleType
    shared: ModuleType


MODULES = {
    "clip": "backend.patcher.clip",
    "lora": "backend.patcher.lora",
    "memory_management": "backend.memory_management",
    "networks": "networks",
    "operations": "backend.operations",
    "operations_gguf": "backend.operations_gguf",
    "patcher": "backend.patcher.base",
    "processing": "modules.processing",
    "sd_models": "modules.sd_models",
    "shared": "modules.shared",
}


def import_forge(root: Path, data: Path) -> Forge:
    """Import and initialize the host as its `webui.py` does, as far as LoRAs go.

    root: the folder of `webui.py`; data: stands in for its user's settings, models and LoRAs. The command
    line and the environment are those of the host during the import only; `sys.path` keeps its folders.
    """
    paths = [root, root / "repositories/huggingface_guess", root / "packages_3rdparty"]
    sys.path[:0] = [str(path) for path in (*paths, root / "extensions-builtin/sd_forge_lora")]
    arguments = ["--always-cpu", "--skip-torch-cuda-test", "--data-dir", str(data)]
    with pytest.MonkeyPatch.context() as patch, _hosts_own_gguf(root):
        patch.setattr(sys, "argv", ["webui.py", *arguments])
        patch.setenv("COMMANDLINE_ARGS", "")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        import_module("modules.shared_init").initialize()
        import_module("modules.processing")  # before `networks`, which would import it in a circle
        modules = {field.name: import_module(MODULES[field.name]) for field in fields(Forge)[3:]}
    return Forge(root, data, Path(modules["shared"].cmd_opts.lora_dir), **modules)


@contextmanager
def _hosts_own_gguf(root: Path) -> Iterator[None]:
    """Let the host import the copy of `gguf` that it comes with, where another one is imported already."""
    foreign = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "gguf"}
    if root in Path(getattr(foreign.get("gguf"), "__file__", None) or "/").parents:
        foreign = {}
    for name in foreign:
        del sys.modules[name]
    yield
    if foreign:
        for name in [name for name in sys.modules if name.split(".")[0] == "gguf"]:
            del sys.modules[name]
        sys.modules.update(foreign)
