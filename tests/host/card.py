"""A card of any size, simulated on the CPU: the host believes in it, and every tensor stays where it is.

The card is `cpu:0`, which compares unequal to the `cpu` of its tensors. What stands on it is told by what the
host was asked to load, and by what our sessions say they have placed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import pytest
import torch
from torch import nn

from lib_precision_lora.host import install, installation, uninstall
from lib_precision_lora.host.page.settings import register_settings
from tests.host.webui import Host

DEVICE = torch.device("cpu", 0)


@dataclass(eq=False)
class Card:
    """total: bytes; others: what other programs use; inference: the host's reserve for every generation.

    requests: the `(memory_required, hard_memory_preservation)` that reached the host, by the models' class;
    freed: what it was asked to free; placements: each model that it placed, with the bytes that came to
    stand on the card; evictions: those that it took off.
    """

    total: int
    others: int = 0
    inference: int = 0
    models: weakref.WeakKeyDictionary[nn.Module, int] = field(default_factory=weakref.WeakKeyDictionary)
    requests: list[tuple[str, float, float]] = field(default_factory=list)
    freed: list[float] = field(default_factory=list)
    placements: list[tuple[str, int]] = field(default_factory=list)
    evictions: list[str] = field(default_factory=list)

    def factors(self) -> int:
        """Bytes of factors on the card."""
        active = installation.active()
        return 0 if active is None else sum(each.placed_bytes for each in active.sessions().values())

    def free(self) -> int:
        return self.total - self.others - self.factors() - sum(self.models.values())

    def on(self, model: nn.Module) -> int:
        return self.models.get(model, 0)

    def forget(self) -> None:
        """Begin a new record of what is asked and moved."""
        for record in (self.requests, self.freed, self.placements, self.evictions):
            record.clear()


def size_of(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(value.nelement() * value.element_size() for value in model.parameters())


@contextmanager
def card_with_us(host: Host, total: int, inference: int = 0) -> Iterator[Card]:
    """A simulated card, and us in its host."""
    register_settings()
    with simulated_card(host, total, inference) as card:
        assert install()
        yield card
        uninstall()


@contextmanager
def simulated_card(host: Host, total: int, inference: int = 0) -> Iterator[Card]:
    """The card in the place of the host's CPU, under everything that is installed from now on."""
    card, memory = Card(total, inference=inference), host.memory
    free_memory = memory.free_memory

    def free(memory_required: float, *args: Any, **kwargs: Any) -> Any:
        card.freed.append(memory_required)
        return free_memory(memory_required, *args, **kwargs)

    def get_free_memory(dev: Any = None, torch_free_too: bool = False) -> Any:
        return (card.free(), 0) if torch_free_too else card.free()

    with pytest.MonkeyPatch.context() as patch:
        for name, replacement in {
            "free_memory": free,
            "get_torch_device": lambda: DEVICE,
            "text_encoder_device": lambda: DEVICE,
            "is_device_cpu": lambda device: device.type == "cpu" and device.index is None,
            "get_total_memory": lambda *_, **__: card.total,
            "get_free_memory": get_free_memory,
            "minimum_inference_memory": lambda: card.inference,
        }.items():
            patch.setattr(memory, name, wraps(getattr(memory, name))(replacement))
        (_forge_card if host.name == "forge" else _neo_card)(host, card, patch)
        if not host.double:
            patch.setattr(memory, "vram_state", memory.VRAMState.NORMAL_VRAM)
            patch.setattr(memory, "lowvram_available", True)
        yield card


def _names(models: Any) -> str:
    return "+".join(type(patcher.model).__name__ for patcher in models)


def _forge_card(host: Host, card: Card, patch: pytest.MonkeyPatch) -> None:
    """Forge places a model as a whole, or with so many bytes."""
    memory = host.memory
    load_models, module_size = memory.load_models_gpu, memory.module_size
    load, unload = memory.LoadedModel.model_load, memory.LoadedModel.model_unload

    def load_models_gpu(models: Any, memory_required: float = 0, hard_memory_preservation: float = 0) -> None:
        card.requests.append((_names(models), memory_required, hard_memory_preservation))
        load_models(models, memory_required, hard_memory_preservation)

    def model_load(loaded: Any, model_gpu_memory_when_using_cpu_swap: int = -1) -> nn.Module:
        model, budget = loaded.model.model, model_gpu_memory_when_using_cpu_swap
        size = size_of(model)
        card.models[model] = size if budget < 0 else min(budget, size)
        card.placements.append((type(model).__name__, card.models[model]))
        return load(loaded, budget)

    def model_unload(loaded: Any, avoid_model_moving: bool = False) -> None:
        model = loaded.model.model
        if not avoid_model_moving:
            card.models.pop(model, None)
            card.evictions.append(type(model).__name__)
        unload(loaded, avoid_model_moving)

    def size_on(
        module: nn.Module, exclude_device: Any = None, include_device: Any = None, **more: Any
    ) -> Any:
        if include_device == DEVICE:
            return card.on(module)
        if exclude_device == DEVICE:
            return size_of(module) - card.on(module)
        return module_size(module, exclude_device, include_device, **more)

    patch.setattr(memory, "load_models_gpu", wraps(load_models)(load_models_gpu))
    patch.setattr(memory, "module_size", wraps(module_size)(size_on))
    patch.setattr(memory.LoadedModel, "model_load", wraps(load)(model_load))
    patch.setattr(memory.LoadedModel, "model_unload", wraps(unload)(model_unload))


def _neo_card(host: Host, card: Card, patch: pytest.MonkeyPatch) -> None:
    """Neo places and takes off layer by layer, and counts what is there. It is an NVIDIA card, and nothing is
    reserved beside `inference`. What is to be kept free is a part of what Neo is asked for."""
    memory, patcher_class = host.memory, host.base.ModelPatcher
    load_models = memory.load_models_gpu
    load, unpatch, unload = patcher_class.load, patcher_class.unpatch_model, patcher_class.partially_unload

    def load_models_gpu(models: Any, memory_required: float = 0, *args: Any, **kwargs: Any) -> None:
        kept = max(0.0, memory_required - card.inference)
        card.requests.append((_names(models), memory_required, kept))
        load_models(models, memory_required, *args, **kwargs)

    def counted(patcher: Any) -> None:
        model = patcher.model
        card.models[model] = model.model_loaded_weight_memory if model.device == DEVICE else 0

    def place(patcher: Any, *args: Any, **kwargs: Any) -> None:
        load(patcher, *args, **kwargs)
        counted(patcher)
        card.placements.append((type(patcher.model).__name__, card.on(patcher.model)))

    def leave(patcher: Any, *args: Any, **kwargs: Any) -> None:
        before = card.on(patcher.model)
        unpatch(patcher, *args, **kwargs)
        counted(patcher)
        if before and not card.on(patcher.model):
            card.evictions.append(type(patcher.model).__name__)

    def give_way(patcher: Any, *args: Any, **kwargs: Any) -> Any:
        freed = unload(patcher, *args, **kwargs)
        counted(patcher)
        return freed

    patch.setattr(memory, "load_models_gpu", wraps(load_models)(load_models_gpu))
    patch.setattr(memory, "extra_reserved_memory", lambda: 0)
    patch.setattr(memory, "MIN_WEIGHT_MEMORY_RATIO", 0.0)
    patch.setattr(patcher_class, "load", wraps(load)(place))
    patch.setattr(patcher_class, "unpatch_model", wraps(unpatch)(leave))
    patch.setattr(patcher_class, "partially_unload", wraps(unload)(give_way))
