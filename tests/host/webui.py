"""The host that a test runs against: the double of Forge or of Forge Neo, or a real one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.double import host_modules, load_double, put_host_modules
from tests.forge.real_forge import HOW_TO_RUN as FORGE
from tests.host.contracts import CONTRACTS, Contract
from tests.neo.real_neo import HOW_TO_RUN as NEO

KINDS = ("double", "neo double", "forge", "neo")
"""The double of Forge stands first: it is the older one, and what has no name is about it."""

HOW_TO_RUN = {
    "forge": FORGE.replace("tests/forge", "tests/host"),
    "neo": NEO.replace("tests/neo", "tests/host"),
}
OPTIONS = {
    "sd_lora": "None",
    "lora_add_hashes_to_infotext": True,
    "lora_preferred_name": "Alias from file",
    "extra_networks_default_multiplier": 1,
}
"""What the host's own LoRA extension registers."""


@dataclass(frozen=True, slots=True, eq=False)
class Host:
    """The modules that tests reach for, and the folder where LoRA files are looked for.

    double: whether it is none that anybody makes images with; contract: what is its own.
    """

    double: bool
    contract: Contract
    lora_dir: Path
    args: ModuleType
    base: ModuleType
    clip: ModuleType
    engine: ModuleType
    errors: ModuleType
    extra_networks: ModuleType
    lora: ModuleType
    main_entry: ModuleType
    memory: ModuleType
    networks: ModuleType
    processing: ModuleType
    samplers: ModuleType
    sampling: ModuleType
    sd_models: ModuleType
    shared: ModuleType
    unet: ModuleType

    @property
    def name(self) -> str:
        """Which host it is, or is the double of."""
        return self.contract.name

    @property
    def current(self) -> Any:
        """The checkpoint that is loaded."""
        return self.sd_models.model_data.get_sd_model()

    def set_option(self, key: str, value: Any) -> None:
        self.shared.opts.data[key] = value


MODULES = {
    "args": "backend.args",
    "base": "backend.patcher.base",
    "clip": "backend.patcher.clip",
    "engine": "backend.diffusion_engine.base",
    "errors": "modules.errors",
    "extra_networks": "modules.extra_networks",
    "lora": "backend.patcher.lora",
    "main_entry": "modules_forge.main_entry",
    "memory": "backend.memory_management",
    "networks": "networks",
    "processing": "modules.processing",
    "samplers": "modules.sd_samplers_kdiffusion",
    "sampling": "backend.sampling.sampling_function",
    "sd_models": "modules.sd_models",
    "shared": "modules.shared",
    "unet": "backend.patcher.unet",
}


def name_of(kind: str) -> str:
    """Which host it is, or is the double of."""
    return "neo" if "neo" in kind else "forge"


def missing(kind: str) -> str | None:
    """Why this kind cannot be run here."""
    root = None if "double" in kind else f"{kind.upper()}_ROOT"
    return HOW_TO_RUN[kind] if root and not os.environ.get(root) else None


@cache
def load_real(name: str, root: Path, data: Path) -> dict[str, ModuleType]:
    """The real host's modules, imported unless a test of its own folder has done so."""
    shared = sys.modules.get("modules.shared")
    if shared is None or root not in Path(shared.__file__ or "/").parents:
        put_host_modules({})
        if name == "forge":
            from tests.forge.real_forge import import_forge

            import_forge(root, data)
        else:
            from tests.neo.real_neo import import_neo

            import_neo(root, data)
    more = ["backend.float"] if name == "neo" else []
    for module in (*MODULES.values(), *more, "extra_networks_lora"):
        import_module(module)
    return host_modules()


@contextmanager
def running_host(kind: str, data: Path, lora_dir: Path) -> Iterator[Host]:
    """This host, as if just started, with an empty LoRA folder; of the test, nothing is left in it."""
    before = host_modules()
    name, double = name_of(kind), "double" in kind
    if double:
        modules = load_double(name)
    else:
        modules = load_real(name, Path(os.environ[f"{name.upper()}_ROOT"]).resolve(), data)
    put_host_modules(modules)
    try:
        with pytest.MonkeyPatch.context() as patch:
            found = {field: modules[module] for field, module in MODULES.items()}
            host = Host(double, CONTRACTS[name](modules), lora_dir, **found)
            _start(host, modules["extra_networks_lora"].ExtraNetworkLora(), patch)
            yield host
    finally:
        put_host_modules(before)


def _wrap_loaders(patch: pytest.MonkeyPatch) -> None:
    """As the host does when its server starts, until the test ends: one that fails renames the file."""
    import safetensors.torch
    import torch

    build_loaded = import_module("modules_forge.patch_basic").build_loaded
    for module, name in ((torch, "load"), (safetensors.torch, "load_file")):
        patch.setattr(module, name, getattr(module, name))
        build_loaded(module, name)


def _start(host: Host, extra_network: Any, patch: pytest.MonkeyPatch) -> None:
    _wrap_loaders(patch)
    if "gradio" not in sys.modules and host.double:
        patch.setitem(sys.modules, "gradio", ModuleType("gradio"))
        for component in ("Radio", "Slider"):
            patch.setattr(sys.modules["gradio"], component, SimpleNamespace, raising=False)
    opts = host.shared.opts
    patch.setitem(opts.__dict__, "data", {**opts.data, **OPTIONS})
    patch.setitem(opts.__dict__, "data_labels", dict(opts.data_labels))
    patch.setattr(host.shared.cmd_opts, "lora_dir", str(host.lora_dir))
    patch.setattr(host.sd_models, "model_data", host.sd_models.SdModelData())
    patch.setattr(host.memory, "current_loaded_models", [])
    patch.setattr(host.extra_networks, "extra_network_registry", {"lora": extra_network})
    for owner, names in (
        (host.processing.StableDiffusionProcessing, ("cached_c", "cached_uc")),
        (host.processing.StableDiffusionProcessingTxt2Img, ("cached_hr_c", "cached_hr_uc")),
    ):
        for name in names:
            patch.setattr(owner, name, [None, None, None])
    host.contract.forget_files()
    host.networks.loaded_networks.clear()
    host.networks.list_available_networks()
