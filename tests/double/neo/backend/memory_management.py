"""Which models are loaded, and how much of each: as on the host, but every tensor stays where it is.

One device, as on the host without a card; a test that simulates one says so by `load_device` "cpu:0".
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

MIN_WEIGHT_MEMORY_RATIO = 0.0
"""Of a card that is not NVIDIA's, so much is always left to weights."""

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


def get_free_memory(dev: Any = None, torch_free_too: bool = False) -> Any:
    """Other programs hold a part of it."""
    return (48 * 2**30, 0) if torch_free_too else 48 * 2**30


def get_total_memory(dev: Any = None, torch_total_too: bool = False) -> Any:
    return (64 * 2**30, 64 * 2**30) if torch_total_too else 64 * 2**30


def extra_reserved_memory() -> float:
    return 400 * 2**20


def minimum_inference_memory() -> float:
    return 0.8 * 2**30 + extra_reserved_memory()


def module_size(module: nn.Module) -> int:
    return sum(value.nelement() * value.element_size() for value in module.state_dict().values())


def cast_to_device(tensor: Tensor, device: Any, dtype: Any, copy: bool = False) -> Tensor:
    return tensor.to(device=device, dtype=dtype, copy=copy)


def soft_empty_cache(force: bool = False) -> None:
    global signal_empty_cache
    signal_empty_cache = False


class LoadedModel:
    """One patcher whose model is on the device, held weakly; where it goes, its parent stands for it."""

    def __init__(self, model: Any) -> None:
        self._set_model(model)
        self.device = model.load_device
        self.real_model: Any = None
        self.model_finalizer: Any = None

    def _set_model(self, model: Any) -> None:
        self._model = weakref.ref(model)
        if model.parent is not None:
            self._parent_model = weakref.ref(model.parent)
            weakref.finalize(model, self._switch_parent).atexit = False

    def _switch_parent(self) -> None:
        model = self._parent_model()
        if model is not None:
            self._set_model(model)

    @property
    def model(self) -> Any:
        return self._model()

    def model_memory(self) -> int:
        return int(self.model.model_size())

    def model_offloaded_memory(self) -> int:
        return int(self.model.model_size() - self.model.loaded_size())

    def model_memory_required(self, device: Any) -> int:
        on_device = device == self.model.current_device
        return self.model_offloaded_memory() if on_device else self.model_memory()

    def model_load(self, lowvram_model_memory: float = 0, force_patch_weights: bool = False) -> nn.Module:
        """lowvram_model_memory: bytes more than the model has on the device; 0: as many as it likes."""
        self.model.partially_load(self.device, lowvram_model_memory or 1e32)
        model: nn.Module = self.model.model
        self.real_model = weakref.ref(model)
        self.model_finalizer = weakref.finalize(model, cleanup_models)
        self.model_finalizer.atexit = False
        return model

    def model_unload(self, memory_to_free: float | None = None, unpatch_weights: bool = True) -> bool:
        """False where only a part of it had to go."""
        wanted, patcher = memory_to_free, self.model
        in_part = wanted is not None and wanted < patcher.loaded_size()
        if in_part and patcher.partially_unload(patcher.offload_device, wanted) >= wanted:
            return False
        patcher.detach(unpatch_weights)
        self.model_finalizer.detach()
        self.model_finalizer = self.real_model = None
        return True

    def is_dead(self) -> bool:
        return self.real_model() is not None and self.model is None

    def __eq__(self, other: Any) -> bool:
        return self.model is other.model


def cleanup_models() -> None:
    """Forget those whose model is gone."""
    for index in range(len(current_loaded_models) - 1, -1, -1):
        if current_loaded_models[index].real_model() is None:
            current_loaded_models.pop(index)


def cleanup_models_gc(*, target: Any = ()) -> None:
    """Forget a patcher that nobody holds, where another one of its model is to be loaded."""
    for index, loaded in enumerate(current_loaded_models):
        if loaded.is_dead() and any(patcher.model is loaded.real_model() for patcher in target):
            current_loaded_models.pop(index)
            return


def free_memory(memory_required: float, device: torch.device, keep_loaded: Any = ()) -> list[LoadedModel]:
    """Take models off, in part where that is enough, until so much is free; returns those that are gone."""
    cleanup_models_gc()
    leaving = sorted(
        (-loaded.model_offloaded_memory(), loaded.model_memory(), index)
        for index, loaded in enumerate(current_loaded_models)
        if loaded.device == device and loaded not in keep_loaded and not loaded.is_dead()
    )
    gone = []
    for *_, index in leaving:
        free = get_free_memory(device)
        if free > memory_required:
            break
        if current_loaded_models[index].model_unload(memory_required - free):
            gone.append(index)
    return [current_loaded_models.pop(index) for index in sorted(gone, reverse=True)]


def load_models_gpu(
    models: Any,
    memory_required: float = 0,
    force_patch_weights: bool = False,
    minimum_memory_required: float | None = None,
    force_full_load: bool = False,
) -> None:
    """Every model is asked to be as much on the device as fits beside what is to be kept free: the second of
    the two where it is given, the first one makes other models give way."""
    cleanup_models_gc(target=models)
    least = minimum_inference_memory()
    wanted = max(least, memory_required + extra_reserved_memory())
    if minimum_memory_required is None:
        minimum_memory_required = wanted
    else:
        minimum_memory_required = max(least, minimum_memory_required + extra_reserved_memory())
    to_load = []
    for patcher in dict.fromkeys(models):
        loaded = LoadedModel(patcher)
        known = [each for each in current_loaded_models if each == loaded]
        to_load.append(known[0] if known else loaded)
    for loaded in to_load:
        for index in range(len(current_loaded_models) - 1, -1, -1):
            if loaded.model.is_clone(current_loaded_models[index].model):
                former = current_loaded_models.pop(index)
                former.model.detach(unpatch_all=False)
                former.model_finalizer.detach()
    needed: dict[Any, float] = {}
    for loaded in to_load:
        size = loaded.model_memory_required(loaded.device)
        needed[loaded.device] = needed.get(loaded.device, 0) + size
    for device, size in needed.items():
        if device != torch.device("cpu"):
            free_memory(1.1 * size + wanted, device)
    for device in needed:
        if device != torch.device("cpu") and get_free_memory(device) < minimum_memory_required:
            free_memory(minimum_memory_required, device)
    for loaded in to_load:
        budget = 0.0
        if not is_device_cpu(loaded.device) and not force_full_load:
            held = loaded.model.loaded_size()
            free = get_free_memory(loaded.device) + held
            always = min(free * MIN_WEIGHT_MEMORY_RATIO, free - minimum_inference_memory())
            budget = (max(0, free - minimum_memory_required, always) - held) or 0.1
        loaded.model_load(budget, force_patch_weights=force_patch_weights)
        current_loaded_models.insert(0, loaded)


def load_model_gpu(model: Any) -> None:
    return load_models_gpu([model])


def unload_all_models() -> None:
    free_memory(1e30, get_torch_device())
