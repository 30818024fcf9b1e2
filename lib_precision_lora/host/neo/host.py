"""Haoming02's Forge Neo: ComfyUI's patcher under Forge's page.

load_models_gpu           plan the memory and tell the host first; attach after it has placed its models
LoadedModel.model_load    where layers are placed one by one, or other patches are merged, let the host find
                          its own parameters there
LoadedModel.model_unload  take the factors off the device with the model, once all of it leaves

Patches that other extensions put on Neo's patchers go Neo's way, beside ours on the same layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lib_precision_lora.host.interface import Follower, Host, LoadRequest
from lib_precision_lora.host.loras.division import HostPatches
from lib_precision_lora.host.loras.kept import Kept
from lib_precision_lora.host.neo.patches import KeptPatches
from lib_precision_lora.host.replacement import Replacement


class NeoHost(Host):
    name = "Forge Neo"
    gives_way = True
    applies_once = False

    def __init__(self) -> None:
        from backend import memory_management
        from backend.args import dynamic_args
        from backend.patcher import lora
        from modules import sd_samplers_common, sd_samplers_kdiffusion, sd_samplers_timesteps

        self.memory, self.lora, self._dynamic_args = memory_management, lora, dynamic_args
        self.samplers = (sd_samplers_common, sd_samplers_kdiffusion, sd_samplers_timesteps)
        self._patches: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()
        self._follower: Follower | None = None

    def patches(self, patcher: Any) -> HostPatches:
        own: HostPatches | None = getattr(patcher, "lora_patches", None)
        return self._patches.get(patcher.model, {}) if own is None else own

    def takes_loras(self, patcher: Any) -> bool:
        return hasattr(patcher, "patches_uuid") and patcher.model in self._patches

    def follow(self, patcher: Any) -> None:
        if self._follower is not None and self._follower.enabled:
            self._follower.bring(patcher.model, self.patches(patcher), _merge)
        elif self._follower is not None:
            self._follower.stand_back_from(patcher.model)

    def keep(self, engine: Any) -> Kept:
        return KeptPatches(engine)

    def use(self, engine: Any, kept: Kept | None) -> None:
        """The engine keeps its own patchers, and what other extensions have put on them."""
        original = engine.forge_objects_original
        engine.forge_objects.unet, engine.forge_objects.clip = original.unet, original.clip
        engine.forge_objects_after_applying_lora = engine.forge_objects.shallow_copy()
        if isinstance(kept, KeptPatches):
            self._patches.update({each.model: each.lora_patches for each in kept.each()})
            return
        for patcher in (original.unet, *([] if original.clip is None else [original.clip.patcher])):
            if patcher.model in self._patches:
                self._patches[patcher.model] = {}

    def forget(self, model: nn.Module) -> None:
        """Its weights were never ours to restore."""
        self._patches.pop(model, None)

    def put_aside(self, model: nn.Module, name: str) -> Tensor | None:
        """A model may be given by a proxy, which is equal to it and not the same."""
        for loaded in self.memory.current_loaded_models:
            patcher = loaded.model
            backup = getattr(patcher, "backup", {})
            if name in backup and patcher.model == model:
                weight: Tensor = backup[name].weight
                return weight
        return None

    def parse(self, state_dict: Mapping[str, Tensor], names: Mapping[str, Any]) -> Any:
        """Nothing: what we do not read could only be merged, which is what this extension is there to
        avoid."""
        return {}, dict(state_dict)

    def leaves_to_host(self, engine: Any) -> str | None:
        if getattr(self._dynamic_args, "nunchaku", False):
            return "the model is of Nunchaku (SVDQuant), which applies LoRAs by itself"
        return None

    def quantized_product(self, module: nn.Module) -> bool | None:
        """`MixedPrecisionOps.Linear` does so while nothing changes its weight on the way."""
        full_precision = getattr(module, "_full_precision_mm", None)
        if full_precision is None or getattr(module, "layout_type", None) is None:
            return None
        changed = getattr(module, "weight_function", ()) or getattr(module, "bias_function", ())
        return not (full_precision or changed or getattr(module, "forge_force_cast_weights", False))

    def size(self, model: nn.Module, device: Any = None) -> int:
        if device is None:
            return int(self.memory.module_size(model))
        present = getattr(model, "device", None)
        return int(getattr(model, "model_loaded_weight_memory", 0)) if present == device else 0

    def beside(self, required: float) -> float:
        reserved = self.memory.extra_reserved_memory()
        return float(max(self.memory.minimum_inference_memory(), required + reserved))

    def _with(self, kept: float, required: float) -> float:
        """What Neo is to be asked for, so that it keeps so much more free than for `required` alone: it takes
        the larger one of that and the least for any image, and would count ours as a part of the least."""
        total = self.memory.get_total_memory(self.memory.get_torch_device())
        reserved = self.memory.extra_reserved_memory()
        if kept:
            required = self.beside(required) - reserved + kept
        return min(max(0.0, float(total) - reserved), required)

    def replacements(self, follower: Follower) -> list[Replacement]:
        self._follower = follower
        loaded = self.memory.LoadedModel

        def make_load_models(host_load: Callable[..., None]) -> Callable[..., None]:
            def load_models_gpu(
                models: Any,
                memory_required: float = 0,
                force_patch_weights: bool = False,
                minimum_memory_required: float | None = None,
                *args: Any,
                **kwargs: Any,
            ) -> None:
                def place(required: float, kept: float) -> None:
                    """What is to be kept free counts in both: one makes other models give way, the other
                    these ones, layer by layer. With Neo's own reserve on top it is no more than the card."""
                    least = minimum_memory_required
                    least = None if least is None else self._with(kept, least)
                    required = self._with(kept, required)
                    host_load(models, required, force_patch_weights, least, *args, **kwargs)

                follower.load(LoadRequest(models, memory_required), place)

            return load_models_gpu

        def make_model_load(host_load: Callable[..., Any]) -> Callable[..., Any]:
            def model_load(loaded: Any, lowvram_model_memory: float = 0, *args: Any, **kwargs: Any) -> Any:
                model = getattr(loaded.model, "model", None)
                if isinstance(model, nn.Module):
                    held = getattr(model, "model_loaded_weight_memory", 0)
                    in_part = lowvram_model_memory and held + lowvram_model_memory <= loaded.model_memory()
                    if in_part or _patched_anew(loaded.model, model):
                        follower.unmerge(model)
                return host_load(loaded, lowvram_model_memory, *args, **kwargs)

            return model_load

        def make_model_unload(host_unload: Callable[..., Any]) -> Callable[..., Any]:
            def model_unload(loaded: Any, *args: Any, **kwargs: Any) -> Any:
                model = getattr(loaded.model, "model", None)
                unmerged = follower.unmerge(model)
                gone = host_unload(loaded, *args, **kwargs)
                if gone is not False:
                    follower.release(model)
                elif unmerged:  # a part of it has left, and an image may be in the making
                    self.follow(loaded.model)
                return gone

            return model_unload

        return [
            Replacement(self.memory, "load_models_gpu", make_load_models),
            Replacement(loaded, "model_load", make_model_load),
            Replacement(loaded, "model_unload", make_model_unload),
        ]


def _patched_anew(patcher: Any, model: nn.Module) -> bool:
    """Whether Neo is about to put back what it has merged, and to merge other patches: it would keep what
    stands there as its own."""
    placed = getattr(model, "current_weight_patches_uuid", None)
    return bool(getattr(patcher, "patches_uuid", None) != placed)


def _merge(patches: HostPatches) -> None:
    """Neo merges nothing of ours."""
    if patches:
        names = sorted({name for entries in patches.values() for name in entries})
        raise ValueError(f"layer {names[0]} is stored in a way that this extension cannot read")
