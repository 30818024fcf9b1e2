"""Which models are loaded, and when one is loaded again. One device, as on the host without a card."""

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


def module_size(module: nn.Module) -> int:
    return sum(value.nelement() * value.element_size() for value in module.parameters())


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

    def model_load(self, model_gpu_memory_when_using_cpu_swap: int = -1) -> nn.Module:
        try:
            self.real_model = self.model.forge_patch_model(self.device)
            self.model.current_device = self.model.load_device
        except Exception:
            self.model.forge_unpatch_model(self.model.offload_device)
            self.model_unload()
            raise
        self.model.refresh_loras()
        return self.real_model

    def model_unload(self, avoid_model_moving: bool = False) -> None:
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
    """Unload what nobody holds any more; with `free_all`, everything that is not kept."""
    for index in range(len(current_loaded_models) - 1, -1, -1):
        if sys.getrefcount(current_loaded_models[index].model) <= 2:
            current_loaded_models.pop(index).model_unload(avoid_model_moving=True)
    if free_all:
        for index in range(len(current_loaded_models) - 1, -1, -1):
            if current_loaded_models[index].device == device:
                loaded = current_loaded_models[index]
                if loaded not in keep_loaded:
                    current_loaded_models.pop(index).model_unload()


def unload_all_models() -> None:
    free_memory(1e30, get_torch_device(), free_all=True)


def load_models_gpu(models: Any, memory_required: float = 0, hard_memory_preservation: float = 0) -> None:
    to_load = []
    for patcher in models:
        loaded = LoadedModel(patcher)
        if loaded in current_loaded_models:
            current_loaded_models.insert(0, current_loaded_models.pop(current_loaded_models.index(loaded)))
        else:
            to_load.append(loaded)
    for loaded in to_load:
        unload_model_clones(loaded.model)
    for loaded in to_load:
        loaded.model_load()
        current_loaded_models.insert(0, loaded)


def load_model_gpu(model: Any) -> None:
    return load_models_gpu([model])
