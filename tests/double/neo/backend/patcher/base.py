"""A patcher: one model, what is patched on it, and how much of it stands on the device."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from backend import memory_management, utils
from backend.float import stochastic_rounding
from backend.patcher.lora import merge_lora_to_weight, string_to_seed
from torch import Tensor, nn


class OnTheFly:
    """Merges a parameter's patches in every forward, in a layer's `weight_function` or `bias_function`."""

    def __init__(self, key: str, patches: Any) -> None:
        self.key, self.patches = key, patches

    def __call__(self, weight: Tensor) -> Tensor:
        return merge_lora_to_weight(self.patches[self.key], weight, self.key, computation_dtype=weight.dtype)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A parameter's value before it was merged."""

    weight: Tensor


@dataclass(frozen=True, slots=True)
class Leaf:
    """A module with parameters of its own alone. transient: bytes that a forward needs where it is not on the
    device; casts: whether it can compute from there."""

    transient: int
    size: int
    name: str
    module: nn.Module
    parameters: tuple[str, ...]
    casts: bool

    def named(self) -> Iterator[tuple[str, str]]:
        """Each parameter, and its name in the model."""
        for parameter in self.parameters:
            yield parameter, f"{self.name}.{parameter}"


class ModelPatcher:
    """Clones share the model, and what tells how it stands."""

    def __init__(
        self,
        model: nn.Module,
        load_device: Any,
        offload_device: Any,
        size: int = 0,
        *,
        current_device: Any = None,
    ) -> None:
        self.model: Any = model
        self.size = size
        self.model.device = current_device
        self.patches: dict[str, list[Any]] = {}
        self.backup: dict[str, _Kept] = {}
        self.object_patches: dict[str, Any] = {}
        self.object_patches_backup: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.load_device, self.offload_device = load_device, offload_device
        self.patches_uuid = uuid.uuid4()
        self.parent: ModelPatcher | None = None
        for name, value in (
            ("model_loaded_weight_memory", 0),
            ("model_lowvram", False),
            ("current_weight_patches_uuid", None),
            ("model_offload_buffer_memory", 0),
        ):
            if not hasattr(model, name):
                setattr(model, name, value)

    def clone(self) -> ModelPatcher:
        other = type(self)(
            self.model,
            self.load_device,
            self.offload_device,
            self.model_size(),
            current_device=self.current_device,
        )
        other.patches = {key: list(patches) for key, patches in self.patches.items()}
        other.patches_uuid = self.patches_uuid
        other.object_patches = self.object_patches.copy()
        other.model_options = copy.deepcopy(self.model_options)
        other.parent = self
        other.backup, other.object_patches_backup = self.backup, self.object_patches_backup
        return other

    @property
    def current_device(self) -> Any:
        return self.model.device

    def is_clone(self, other: Any) -> bool:
        return self.model is getattr(other, "model", None)

    def add_patches(
        self,
        patches: Any,
        strength_patch: float = 1.0,
        strength_model: float = 1.0,
        *,
        filename: str | None = None,
        online_mode: bool | None = None,
    ) -> list[Any]:
        """Those whose parameter the model has; they add to the former ones, of the same file, too."""
        present = self.model.state_dict()
        taken = []
        for target, value in patches.items():
            name, offset, function = ((target,) if isinstance(target, str) else (*target,)) + (None,) * (
                2 if isinstance(target, str) else 3 - len(target)
            )
            if name in present:
                taken.append(target)
                entry = (strength_patch, value, strength_model, offset, function, online_mode)
                self.patches.setdefault(name, []).append(entry)
        self.patches_uuid = uuid.uuid4()
        return taken

    def has_online_lora(self) -> bool:
        return any(self._online(key) for key in self.patches)

    def _online(self, key: str) -> bool:
        return any(patch[-1] for patch in self.patches.get(key, ()))

    def model_size(self) -> int:
        self.size = self.size or memory_management.module_size(self.model)
        return self.size

    def loaded_size(self) -> int:
        return int(self.model.model_loaded_weight_memory)

    def memory_required(self, input_shape: Any) -> float:
        return float(self.model.memory_required(input_shape=input_shape))

    def patch_weight_to_device(self, key: str, device_to: Any = None) -> None:
        """Merge, and keep the former parameter; nothing where there is nothing to merge."""
        if key not in self.patches:
            return
        weight = utils.get_attr(self.model, key)
        self.backup.setdefault(key, _Kept(weight.to(device=self.offload_device)))
        merged = merge_lora_to_weight(
            self.patches[key], weight.to(device=device_to, dtype=torch.float32, copy=True), key
        )
        utils.set_attr(self.model, key, stochastic_rounding(merged, weight.dtype, string_to_seed(key)))

    def _leaves(self) -> list[Leaf]:
        """Those that a device takes or leaves as a whole."""
        leaves = []
        for name, module in self.model.named_modules():
            own = tuple(parameter for parameter, _ in module.named_parameters(recurse=False))
            if not own or len(own) < sum(1 for _ in module.parameters()):
                continue
            casts = hasattr(module, "parameters_manual_cast")
            size = transient = memory_management.module_size(module)
            for parameter in own if casts else ():
                if f"{name}.{parameter}" in self.patches:
                    transient += 8 * getattr(module, parameter).nelement()
            leaves.append(Leaf(transient, size, name, module, own, casts))
        return leaves

    def _on_the_fly(self, leaf: Leaf) -> None:
        """Compute from where the weights are, with what is patched on them."""
        for parameter, key in leaf.named():
            if key in self.patches:
                setattr(leaf.module, f"{parameter}_function", [OnTheFly(key, self.patches)])
        if leaf.casts:
            leaf.module.prev_parameters_manual_cast = leaf.module.parameters_manual_cast
            leaf.module.parameters_manual_cast = True

    def load(self, device_to: Any = None, lowvram_model_memory: float = 0, full_load: bool = False) -> None:
        """Bring the largest leaves to the device, merged, as many as fit; all with `full_load`."""
        loaded, buffer, away, here = 0, 0, 0, []
        for leaf in sorted(self._leaves(), key=lambda leaf: (leaf.transient, leaf.size), reverse=True):
            needed = max(buffer, leaf.transient)
            if full_load or loaded + leaf.size + needed < lowvram_model_memory:
                if leaf.casts:
                    wipe(leaf.module)
                loaded += leaf.size
                here.append(leaf)
                continue
            buffer = needed
            if leaf.casts:
                away += 1
                if not hasattr(leaf.module, "prev_parameters_manual_cast"):
                    self._on_the_fly(leaf)
        for leaf in here:
            if getattr(leaf.module, "forge_patched_weights", False):
                continue
            if any(self._online(key) for _, key in leaf.named()):
                self._on_the_fly(leaf)
            else:
                for _, key in leaf.named():
                    self.patch_weight_to_device(key, device_to)
            leaf.module.forge_patched_weights = True
            leaf.module.to(device_to)
        self.model.model_lowvram = away > 0
        if full_load:
            self.model.to(device_to)
            loaded = self.model_size()
        self.model.device = device_to
        self.model.model_loaded_weight_memory = loaded
        self.model.model_offload_buffer_memory = buffer
        self.model.current_weight_patches_uuid = self.patches_uuid

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        """Put the former parameters back, and bring the model to a device."""
        if unpatch_weights:
            if self.model.model_lowvram:
                for module in self.model.modules():
                    wipe(module)
                self.model.model_lowvram = False
            for key, kept in self.backup.items():
                utils.set_attr(self.model, key, kept.weight)
            self.backup.clear()
            self.model.current_weight_patches_uuid = None
            if device_to is not None:
                self.model.to(device_to)
                self.model.device = device_to
            self.model.model_loaded_weight_memory = self.model.model_offload_buffer_memory = 0
            for module in self.model.modules():
                vars(module).pop("forge_patched_weights", None)
        for name, item in self.object_patches_backup.items():
            utils.set_attr_raw(self.model, name, item)
        self.object_patches_backup.clear()

    def partially_unload(self, device_to: Any, memory_to_free: float = 0) -> int:
        """Take the smallest leaves off the device until so much is free; their patches then go on the fly."""
        freed, buffer = 0, self.model.model_offload_buffer_memory
        for leaf in sorted(self._leaves(), key=lambda leaf: (leaf.transient, leaf.size)):
            if memory_to_free + buffer - self.model.model_offload_buffer_memory < freed:
                break
            if not getattr(leaf.module, "forge_patched_weights", False):
                continue
            merged = [key for _, key in leaf.named() if key in self.backup]
            if merged and not leaf.casts:
                continue
            for key in merged:
                utils.set_attr(self.model, key, self.backup.pop(key).weight)
            leaf.module.to(device_to)
            if leaf.casts:
                self._on_the_fly(leaf)
            leaf.module.forge_patched_weights = False
            freed += leaf.size
            buffer = max(buffer, leaf.transient)
        self.model.model_lowvram = True
        self.model.model_loaded_weight_memory -= freed
        self.model.model_offload_buffer_memory = buffer
        return freed

    def partially_load(self, device_to: Any, extra_memory: float = 0) -> int:
        """Let the model have so much more of the device, or less; with other patches than before, all of it
        leaves first."""
        placed = self.model.current_weight_patches_uuid
        anew = placed is not None and placed != self.patches_uuid
        used = self.loaded_size()
        self.unpatch_model(self.offload_device, unpatch_weights=anew)
        if anew:
            extra_memory += used
        for name, item in self.object_patches.items():
            self.object_patches_backup.setdefault(name, utils.get_attr(self.model, name))
            utils.set_attr_raw(self.model, name, item)
        if extra_memory < 0 and not anew:
            self.partially_unload(self.offload_device, -extra_memory)
            return 0
        if not self.model.model_lowvram and self.loaded_size() > 0:
            return 0
        used = self.loaded_size()
        try:
            self.load(device_to, used + extra_memory, full_load=used + extra_memory > self.model_size())
        except Exception:
            self.detach()
            raise
        return self.loaded_size() - used

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        if unpatch_all:
            self.unpatch_model(self.offload_device)
        return self.model


def wipe(module: nn.Module) -> None:
    """It computes from the device again, and merges nothing."""
    if hasattr(module, "prev_parameters_manual_cast"):
        module.parameters_manual_cast = module.prev_parameters_manual_cast
        del module.prev_parameters_manual_cast
    for name in ("weight_function", "bias_function"):
        if hasattr(module, name):
            setattr(module, name, [])
