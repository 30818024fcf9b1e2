"""Forge: which of its functions are swapped, and for what.

LoraLoader.refresh      attach branches instead of merging, for every patcher of a model
load_models_gpu         do so too where the host believes that nothing has changed
networks.load_networks  read files, report what cannot be applied, keep one patcher per checkpoint
cached_params           text conditioning is cached by our settings and file versions as well
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lib_precision_lora.branch import PatchError
from lib_precision_lora.host.contract import Requirement
from lib_precision_lora.host.files import LoraFiles
from lib_precision_lora.host.hosted import HostedSession
from lib_precision_lora.host.loading import NetworkLoader
from lib_precision_lora.host.notices import Notices
from lib_precision_lora.host.record import Record
from lib_precision_lora.host.replacement import Replacement
from lib_precision_lora.host.report import FileReport
from lib_precision_lora.host.settings import Settings, read_settings
from lib_precision_lora.ui.choices import OURS

logger = logging.getLogger("lib_precision_lora")

WEBUI = "WebUI"
"""Who applies LoRAs while we are switched off."""

REQUIREMENTS = (
    Requirement(
        "backend.patcher.lora",
        "LoraLoader.refresh",
        ("self", "lora_patches", "offload_device", "force_refresh"),
    ),
    Requirement("backend.patcher.lora", "load_lora", ("lora", "to_load")),
    Requirement("backend.patcher.lora", "model_lora_keys_unet", ("model", "key_map")),
    Requirement("backend.patcher.lora", "model_lora_keys_clip", ("model", "key_map")),
    Requirement(
        "backend.patcher.base",
        "ModelPatcher.add_patches",
        ("self", "filename", "patches", "strength_patch", "strength_model", "online_mode"),
    ),
    Requirement("backend.patcher.base", "ModelPatcher.clone", ("self",)),
    Requirement("backend.patcher.base", "ModelPatcher.refresh_loras", ("self",)),
    Requirement(
        "backend.memory_management",
        "load_models_gpu",
        ("models", "memory_required", "hard_memory_preservation"),
    ),
    Requirement("backend.memory_management", "unload_model_clones", ("model",)),
    Requirement("backend.memory_management", "current_loaded_models"),
    Requirement("backend.utils", "load_torch_file", ("ckpt", "safe_load")),
    Requirement("networks", "load_networks", ("names", "te_multipliers", "unet_multipliers", "dyn_dims")),
    Requirement("networks", "load_network", ("name", "network_on_disk")),
    Requirement("networks", "update_available_networks_by_names", ("names",)),
    Requirement("networks", "list_available_networks"),
    Requirement("networks", "available_networks"),
    Requirement("networks", "available_network_aliases"),
    Requirement("networks", "forbidden_network_aliases"),
    Requirement("networks", "loaded_networks"),
    Requirement("modules.sd_models", "model_data.get_sd_model"),
    Requirement(
        "modules.processing",
        "StableDiffusionProcessing.cached_params",
        ("self", "required_prompts", "steps", "extra_network_data", "hires_steps", "use_old_scheduling"),
    ),
    Requirement("modules.shared", "opts"),
)


class ForgeBinding:
    """All that is swapped while the extension is loaded; switched off, it passes everything through."""

    def __init__(self) -> None:
        import networks
        from backend import memory_management, utils
        from backend.patcher import lora
        from modules import processing, sd_models, shared

        self._shared = shared
        self._memory_management = memory_management
        self._host_refresh = lora.LoraLoader.refresh
        self._failures = 0  # conditioning that was computed with one before it is not used after it
        self.notices = Notices(
            lambda: getattr(sd_models.model_data.get_sd_model(), "extra_generation_params", None)
        )
        self._sessions: weakref.WeakKeyDictionary[nn.Module, HostedSession] = weakref.WeakKeyDictionary()
        files = LoraFiles(lambda path: utils.load_torch_file(path, safe_load=True))
        self.record = Record()
        self.loader = NetworkLoader(files, self.notices, self.record)
        self._replacements = [
            Replacement(lora.LoraLoader, "refresh", self._make_refresh),
            Replacement(memory_management, "load_models_gpu", self._make_load_models),
            Replacement(networks, "load_networks", self._make_load_networks),
            Replacement(processing.StableDiffusionProcessing, "cached_params", self._make_cached_params),
        ]

    def settings(self) -> Settings:
        return read_settings(self._shared.opts)

    def sessions(self) -> Mapping[nn.Module, HostedSession]:
        """The models on which something was attached, with their sessions."""
        return self._sessions

    def stand_back(self) -> None:
        """Take everything off, and have the host build its own patches at its next chance.

        By itself it would skip identifiers that it has merged in part, and a patcher that is loaded.
        """
        for model in list(self._sessions):
            self._sessions.pop(model).clear()
            self._host_refresh(model.lora_loader, {}, force_refresh=True)
            for loaded in list(self._memory_management.current_loaded_models):
                if loaded.model.model is model:
                    self._memory_management.unload_model_clones(loaded.model)
        self.loader.stand_back()

    def uninstall(self) -> None:
        """Leave the host as it was found."""
        self.stand_back()
        for replacement in reversed(self._replacements):
            replacement.undo()

    def _follows(self, patcher: Any) -> bool:
        """Whether a placed model may have to change: it takes LoRAs, and ours are on, or still attached."""
        model = getattr(patcher, "model", None)
        if not hasattr(patcher, "lora_patches") or not isinstance(model, nn.Module):
            return False
        return self.settings().enabled or model in self._sessions

    def _make_refresh(self, host_refresh: Callable[..., None]) -> Callable[..., None]:
        def refresh(
            lora_loader: Any,
            lora_patches: Any,
            offload_device: torch.device = torch.device("cpu"),  # noqa: B008  as the host's own
            force_refresh: bool = False,
        ) -> None:
            settings = self.settings()
            model = lora_loader.model
            session = self._sessions.get(model) if isinstance(model, nn.Module) else None
            if not settings.enabled or not isinstance(model, nn.Module):
                if session is not None:
                    session.clear()
                    del self._sessions[model]
                    force_refresh = True
                host_refresh(lora_loader, lora_patches, offload_device, force_refresh)
                return
            if session is None:
                session = self._sessions[model] = HostedSession(model)

            def merge(host_patches: Any) -> None:
                host_refresh(lora_loader, host_patches, offload_device, True)

            started = time.perf_counter()
            try:
                problems = session.follow(model, lora_patches, settings.arithmetic, merge)
            except Exception as error:  # out of here, it would leave the host's list of loaded models wrong
                logger.exception("following the WebUI's LoRAs failed")
                session.clear()
                reason = f"attaching failed ({type(error).__name__}: {error})"
                problems = [PatchError(f"all of them: {reason}; please report it with the console's log")]
            record = self.record.present
            record.followed(type(model).__name__, time.perf_counter() - started, session.host_layers)
            for problem in problems:
                self._failures += 1
                record.problem(problem.source, f"A LoRA was left out: {problem}")
                self.notices.problem(problem.source or "all", f"A LoRA was left out: {problem}")

        return refresh

    def _make_load_models(self, host_load: Callable[..., None]) -> Callable[..., None]:
        def load_models_gpu(models: Any, *args: Any, **kwargs: Any) -> None:
            host_load(models, *args, **kwargs)
            for patcher in models:
                if self._follows(patcher):
                    patcher.refresh_loras()
            if self.settings().on_failure == "stop":
                self.notices.stop_if_any()

        return load_models_gpu

    def _make_load_networks(self, host_load: Callable[..., None]) -> Callable[..., None]:
        def load_networks(
            names: Any, te_multipliers: Any = None, unet_multipliers: Any = None, dyn_dims: Any = None
        ) -> None:
            self.notices.begin()
            for session in self._sessions.values():
                session.try_again()
            settings = self.settings()
            if settings.enabled:
                self.record.begin(OURS, settings.arithmetic.compute)
                self.loader.load(names, te_multipliers, unet_multipliers, settings.detailed_log)
            else:
                self.stand_back()
                present = self.record.begin(WEBUI, "")
                for file in zip(names, unet_multipliers or (), te_multipliers or (), strict=False):
                    present.add(FileReport(*file))
                try:
                    host_load(names, te_multipliers, unet_multipliers, dyn_dims)
                except Exception as error:
                    present.problem(None, f"the WebUI's own loading failed ({type(error).__name__}: {error})")
                    raise

        return load_networks

    def _make_cached_params(self, host_params: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        def cached_params(processing: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            settings = self.settings()
            if settings.enabled and settings.on_failure == "stop":
                self.notices.stop_if_any()
            versions = self.loader.versions if settings.enabled else ()
            ours = (settings.arithmetic, versions, self._failures) if versions else ()
            return (*host_params(processing, *args, **kwargs), ours)

        return cached_params
