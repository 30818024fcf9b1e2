"""lllyasviel's Forge: LoRAs lie in `lora_patches` of a patcher, and `LoraLoader.refresh` merges them.

LoraLoader.refresh        attach branches instead of merging, for every patcher of a model
load_models_gpu           plan the memory and tell the host first; attach where it believes nothing changed
LoadedModel.model_load    where layers are placed one by one, let the host find its own parameters there
LoadedModel.model_unload  take the factors off the device with the model
has_online_lora           no: it would add factors to what we have planned, and cast ours in place
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lib_precision_lora.host.forge.patchers import KeptPatchers
from lib_precision_lora.host.interface import Follower, Host, LoadRequest
from lib_precision_lora.host.loras.division import HostPatches
from lib_precision_lora.host.loras.kept import Kept
from lib_precision_lora.host.replacement import Replacement


class ForgeHost(Host):
    name = "Forge"
    gives_way = False
    applies_once = True

    def __init__(self) -> None:
        from backend import memory_management
        from backend.patcher import base, lora
        from modules import sd_samplers_kdiffusion, sd_samplers_timesteps

        self.memory, self.lora, self._base = memory_management, lora, base
        self.samplers = (sd_samplers_kdiffusion, sd_samplers_timesteps)
        self._host_refresh = lora.LoraLoader.refresh

    def patches(self, patcher: Any) -> HostPatches:
        patches: HostPatches = patcher.lora_patches
        return patches

    def takes_loras(self, patcher: Any) -> bool:
        return hasattr(patcher, "lora_patches")

    def follow(self, patcher: Any) -> None:
        patcher.refresh_loras()

    def keep(self, engine: Any) -> Kept:
        return KeptPatchers(engine)

    def use(self, engine: Any, kept: Kept | None) -> None:
        original = engine.forge_objects_original
        engine.forge_objects.unet = original.unet if kept is None else kept.unet
        engine.forge_objects.clip = original.clip if kept is None else kept.clip
        engine.forge_objects_after_applying_lora = engine.forge_objects.shallow_copy()

    def forget(self, model: nn.Module) -> None:
        """By itself it would skip identifiers that it has merged in part, and a patcher that is loaded."""
        self._host_refresh(model.lora_loader, {}, force_refresh=True)
        for loaded in list(self.memory.current_loaded_models):
            if loaded.model.model is model:
                self.memory.unload_model_clones(loaded.model)

    def put_aside(self, model: nn.Module, name: str) -> Tensor | None:
        loader = getattr(model, "lora_loader", None)
        backup: Mapping[str, Tensor] = getattr(loader, "backup", {})
        return backup.get(name)

    def parse(self, state_dict: Mapping[str, Tensor], names: Mapping[str, Any]) -> Any:
        return self.lora.load_lora(dict(state_dict), names)

    def leaves_to_host(self, engine: Any) -> str | None:
        return None

    def size(self, model: nn.Module, device: Any = None) -> int:
        if device is None:
            return int(self.memory.module_size(model))
        return int(self.memory.module_size(model, include_device=device))

    def beside(self, required: float) -> float:
        return float(max(self.memory.minimum_inference_memory(), required))

    def replacements(self, follower: Follower) -> list[Replacement]:
        loaded = self.memory.LoadedModel

        def make_refresh(host_refresh: Callable[..., None]) -> Callable[..., None]:
            def refresh(
                lora_loader: Any,
                lora_patches: Any,
                offload_device: torch.device = torch.device("cpu"),  # noqa: B008  as the host's own
                force_refresh: bool = False,
            ) -> None:
                def merge(patches: HostPatches) -> None:
                    self._host_refresh(lora_loader, patches, offload_device, True)

                model = lora_loader.model
                if isinstance(model, nn.Module) and follower.enabled:
                    follower.bring(model, lora_patches, merge)
                    return
                if isinstance(model, nn.Module) and follower.stand_back_from(model):
                    force_refresh = True
                host_refresh(lora_loader, lora_patches, offload_device, force_refresh)

            return refresh

        def make_load_models(host_load: Callable[..., None]) -> Callable[..., None]:
            def load_models_gpu(
                models: Any, memory_required: float = 0, hard_memory_preservation: float = 0
            ) -> None:
                request = LoadRequest(models, memory_required, hard_memory_preservation)
                follower.load(request, lambda required, kept: host_load(models, required, kept))

            return load_models_gpu

        def make_has_online_lora(host_has: Callable[..., bool]) -> Callable[..., bool]:
            """What goes the host's own way it merges in its forwards, from wherever the factors are."""

            def has_online_lora(patcher: Any) -> bool:
                return False if follower.enabled else host_has(patcher)

            return has_online_lora

        def make_model_load(host_load: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
            def model_load(loaded: Any, model_gpu_memory_when_using_cpu_swap: int = -1) -> nn.Module:
                if model_gpu_memory_when_using_cpu_swap >= 0:
                    follower.unmerge(getattr(loaded.model, "model", None))
                return host_load(loaded, model_gpu_memory_when_using_cpu_swap)

            return model_load

        def make_model_unload(host_unload: Callable[..., None]) -> Callable[..., None]:
            def model_unload(loaded: Any, avoid_model_moving: bool = False) -> None:
                if not avoid_model_moving:
                    follower.release(getattr(loaded.model, "model", None))
                host_unload(loaded, avoid_model_moving)

            return model_unload

        return [
            Replacement(self.lora.LoraLoader, "refresh", make_refresh),
            Replacement(self.memory, "load_models_gpu", make_load_models),
            Replacement(self._base.ModelPatcher, "has_online_lora", make_has_online_lora),
            Replacement(loaded, "model_load", make_model_load),
            Replacement(loaded, "model_unload", make_model_unload),
        ]
