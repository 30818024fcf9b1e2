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
    load_models, free_memory = memory.load_models_gpu, memory.free_memory
    module_size = memory.module_size
    load, unload = memory.LoadedModel.model_load, memory.LoadedModel.model_unload

    def load_models_gpu(models: Any, memory_required: float = 0, hard_memory_preservation: float = 0) -> None:
        names = "+".join(type(patcher.model).__name__ for patcher in models)
        card.requests.append((names, memory_required, hard_memory_preservation))
        load_models(models, memory_required, hard_memory_preservation)

    def free(memory_required: float, *args: Any, **kwargs: Any) -> None:
        card.freed.append(memory_required)
        free_memory(memory_required, *args, **kwargs)

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

    def get_free_memory(dev: Any = None, torch_free_too: bool = False) -> Any:
        return (card.free(), 0) if torch_free_too else card.free()

    with pytest.MonkeyPatch.context() as patch:
        for name, replacement in {
            "load_models_gpu": load_models_gpu,
            "free_memory": free,
            "module_size": size_on,
            "get_torch_device": lambda: DEVICE,
            "text_encoder_device": lambda: DEVICE,
            "is_device_cpu": lambda device: device.type == "cpu" and device.index is None,
            "get_total_memory": lambda *_, **__: card.total,
            "get_free_memory": get_free_memory,
            "minimum_inference_memory": lambda: card.inference,
        }.items():
            patch.setattr(memory, name, wraps(getattr(memory, name))(replacement))
        patch.setattr(memory.LoadedModel, "model_load", wraps(load)(model_load))
        patch.setattr(memory.LoadedModel, "model_unload", wraps(unload)(model_unload))
        if not host.double:
            patch.setattr(memory, "vram_state", memory.VRAMState.NORMAL_VRAM)
            patch.setattr(memory, "lowvram_available", True)
        yield card
