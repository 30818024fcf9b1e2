"""Which models are loaded, when again, and how much of them: as on the host, but nothing is swapped.

One device, as on the host without a card; a test that simulates one says so by `load_device` "cpu:0".
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

signal_empty_cache = False
current_loaded_models: list[LoadedModel] = []


def get_torch_device() -> torch.device:
    return torch.device("cpu")


def text_encoder_device() -> torch.device:
    return torch.device("cpu")


def text_encoder_offload_device() -> torch.device:
    return torch.device("cpu")


def is_device_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def get_free_memory(dev: Any = None) -> int:
    return 64 * 2**30


def get_total_memory(dev: Any = None) -> int:
    return 64 * 2**30


def minimum_inference_memory() -> int:
    return 2**30


def module_size(module: nn.Module, exclude_device: Any = None, include_device: Any = None) -> int:
    """Parameters on one device, or on all but one; all where neither is said."""
    return sum(
        value.nelement() * value.element_size()
        for value in module.parameters()
        if value.device != exclude_device and include_device in (None, value.device)
    )


def cast_to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device=device, dtype=dtype)


def soft_empty_cache(force: bool = False) -> None:
    global signal_empty_cache
    signal_empty_cache = False


class LoadedModel:
    """One patcher that stands on the device. Equal where the patcher is the same object."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = model.load_device
        self.model_accelerated = False
        self.inclusive_memory = self.exclusive_memory = 0

    def compute_inclusive_exclusive_memory(self) -> None:
        self.inclusive_memory = module_size(self.model.model, include_device=self.device)
        self.exclusive_memory = module_size(self.model.model, exclude_device=self.device)

    def model_load(self, model_gpu_memory_when_using_cpu_swap: int = -1) -> nn.Module:
        try:
            self.real_model = self.model.forge_patch_model(self.device)
            self.model.current_device = self.model.load_device
        except Exception:
            self.model.forge_unpatch_model(self.model.offload_device)
            self.model_unload()
            raise
        self.model_accelerated = model_gpu_memory_when_using_cpu_swap >= 0
        self.model.refresh_loras()
        return self.real_model

    def model_unload(self, avoid_model_moving: bool = False) -> None:
        self.model_accelerated = False
        self.model.forge_unpatch_model(None if avoid_model_moving else self.model.offload_device)

    def __eq__(self, other: Any) -> bool:
        return self.model is other.model


def unload_model_clones(model: Any) -> None:
    """Forget every other patcher of the same model; the model itself stays where it is."""
    for index in range(len(current_loaded_models) - 1, -1, -1):
        if model.is_clone(current_loaded_models[index].model):
            current_loaded_models.pop(index).model_unload(avoid_model_moving=True)


def free_memory(
    memory_required: float, device: torch.device, keep_loaded: Any = (), free_all: bool = False
) -> None:
    """Unload what nobody holds any more, then models until there is enough; with `free_all`, all."""
    for index in range(len(current_loaded_models) - 1, -1, -1):
        if sys.getrefcount(current_loaded_models[index].model) <= 2:
            current_loaded_models.pop(index).model_unload(avoid_model_moving=True)
    for index in range(len(current_loaded_models) - 1, -1, -1):
        if not free_all and get_free_memory(device) > memory_required:
            break
        loaded = current_loaded_models[index]
        if loaded.device == device and loaded not in keep_loaded:
            current_loaded_models.pop(index).model_unload()


def compute_model_gpu_memory_when_using_cpu_swap(current_free_mem: float, inference_memory: float) -> int:
    available = current_free_mem - inference_memory
    return int(max(0, available / 1.3, available - 1.25 * 2**30))


def unload_all_models() -> None:
    free_memory(1e30, get_torch_device(), free_all=True)


def load_models_gpu(models: Any, memory_required: float = 0, hard_memory_preservation: float = 0) -> None:
    to_free = max(minimum_inference_memory(), memory_required) + hard_memory_preservation
    for_inference = minimum_inference_memory() + hard_memory_preservation
    to_load, loaded_already = [], []
    for patcher in models:
        loaded = LoadedModel(patcher)
        if loaded in current_loaded_models:
            current_loaded_models.insert(0, current_loaded_models.pop(current_loaded_models.index(loaded)))
            loaded_already.append(loaded)
        else:
            to_load.append(loaded)
    if not to_load:
        for device in {loaded.device for loaded in loaded_already} - {torch.device("cpu")}:
            free_memory(to_free, device, loaded_already)
        return
    for loaded in to_load:
        unload_model_clones(loaded.model)
    for loaded in to_load:
        loaded.compute_inclusive_exclusive_memory()
        if loaded.device != torch.device("cpu"):
            needed = 1.3 * (loaded.exclusive_memory + 0.25 * loaded.inclusive_memory)
            free_memory(needed + to_free, loaded.device, loaded_already)
    for loaded in to_load:
        budget = -1
        if not is_device_cpu(loaded.device):
            free = get_free_memory(loaded.device)
            if free - loaded.exclusive_memory - for_inference < 0:
                budget = compute_model_gpu_memory_when_using_cpu_swap(free, for_inference)
                budget = loaded.inclusive_memory or budget
        loaded.model_load(budget)
        current_loaded_models.insert(0, loaded)


def load_model_gpu(model: Any) -> None:
    return load_models_gpu([model])
