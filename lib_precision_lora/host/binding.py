"""Forge: which of its functions are swapped, and for what.

LoraLoader.refresh        attach branches instead of merging, for every patcher of a model
load_models_gpu           plan the memory and tell the host first; attach where it believes nothing changed
free_memory               no request above the card's size
LoadedModel.model_load    where layers are placed one by one, let the host find its own parameters there
LoadedModel.model_unload  take the factors off the device with the model
sampling_prepare          how large the image is, for the plan
has_online_lora           no: it would add factors to what we have planned, and cast ours in place
networks.load_networks    read files, report what cannot be applied, keep one patcher per checkpoint
ExtraNetworkLora.activate where the WebUI would stumble over one LoRA of the prompt, leave out that one
get_state_dict_after_quant, save_unet, save_checkpoint     `saving.py`
cached_params             text conditioning is cached by our settings and file versions as well

What one generation does differently, and what is swapped for it: `generation_overrides.py`.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lib_precision_lora.branch import PatchError
from lib_precision_lora.branch.session.undo import run_all
from lib_precision_lora.host.generation.generation_overrides import GenerationOverrides
from lib_precision_lora.host.generation.notices import Notices
from lib_precision_lora.host.generation.progress import NoJob, Progress
from lib_precision_lora.host.generation.record import Record
from lib_precision_lora.host.generation.report import FileReport
from lib_precision_lora.host.loras.attempts import Attempts
from lib_precision_lora.host.loras.division import only, source_of, strengths_of
from lib_precision_lora.host.loras.failures import ForwardFailures
from lib_precision_lora.host.loras.files import LoraFiles
from lib_precision_lora.host.loras.hosted import AttachInterrupted, HostedSession, StillMerged
from lib_precision_lora.host.loras.loading import NetworkLoader
from lib_precision_lora.host.loras.strengths import name_in, reportable, unreadable
from lib_precision_lora.host.page.settings import Arithmetic, Settings, read_settings
from lib_precision_lora.host.replacement import Replacement
from lib_precision_lora.host.reservation.budgeting import Budgeting
from lib_precision_lora.host.reservation.memory import MemoryPlanner, MemoryReport
from lib_precision_lora.host.reservation.planning import Planning
from lib_precision_lora.host.reservation.prospect import Prospect, foresee
from lib_precision_lora.host.saving import Saving
from lib_precision_lora.memory.meter import PeakMeter
from lib_precision_lora.ui.choices import OURS

logger = logging.getLogger("lib_precision_lora")

WEBUI = "WebUI"
"""Who applies LoRAs while we are switched off."""


class ForgeBinding:
    """All that is swapped while the extension is loaded; switched off, it passes everything through."""

    def __init__(self) -> None:
        import extra_networks_lora
        import networks
        from backend import memory_management, utils
        from backend.diffusion_engine.base import ForgeDiffusionEngine
        from backend.patcher import base, lora
        from modules import processing, sd_models, sd_samplers_kdiffusion, sd_samplers_timesteps, shared

        self._shared, self._sd_models = shared, sd_models
        self._memory_management = memory_management
        self._host_refresh = lora.LoraLoader.refresh
        self._incomplete = 0  # conditioning that was computed before a text encoder lacked something
        self.progress = Progress(lambda: shared.state)
        self.notices = Notices(
            lambda: getattr(sd_models.model_data.get_sd_model(), "extra_generation_params", None)
        )
        self.record = Record()
        self._attempts = Attempts(self._tell)
        self._sessions: weakref.WeakKeyDictionary[nn.Module, HostedSession] = weakref.WeakKeyDictionary()
        budgeting = Budgeting(memory_management, self._sessions, self._session, self.settings)
        self._planning = Planning(
            budgeting,
            lambda: [
                each for each in patchers_of(sd_models.model_data.get_sd_model()) if self._follows(each)
            ],
        )
        self.memory = MemoryPlanner(
            memory_management, budgeting, self._planning, self._session, self._left_out, self.progress.stage
        )
        self._failures = ForwardFailures(
            self._sessions,
            lambda: memory_management.current_loaded_models,
            self.memory,
            self._left_out,
            self._stop_if_set,
        )
        files = LoraFiles(limit=lambda: self.settings().cache_bytes, stage=self.progress.stage)
        self.loader = NetworkLoader(files, self.notices, self.record, self.progress)
        saving = Saving(self._sessions, Progress(NoJob).stage, self._prompted)
        self._replacements = [
            Replacement(lora.LoraLoader, "refresh", self._make_refresh),
            Replacement(memory_management, "load_models_gpu", self._make_load_models),
            Replacement(memory_management, "free_memory", self.memory.guard),
            Replacement(sd_samplers_kdiffusion, "sampling_prepare", self._make_sampling_prepare),
            Replacement(sd_samplers_timesteps, "sampling_prepare", self._make_sampling_prepare),
            Replacement(base.ModelPatcher, "has_online_lora", self._make_has_online_lora),
            Replacement(memory_management.LoadedModel, "model_load", self._make_model_load),
            Replacement(memory_management.LoadedModel, "model_unload", self._make_model_unload),
            Replacement(networks, "load_networks", self._make_load_networks),
            Replacement(extra_networks_lora.ExtraNetworkLora, "activate", self._make_activate),
            Replacement(processing.StableDiffusionProcessing, "cached_params", self._make_cached_params),
            *saving.replacements(utils, ForgeDiffusionEngine),
        ]
        self.overrides = GenerationOverrides(
            lambda: read_settings(shared.opts), self.progress, generation_is_over
        )

    def settings(self) -> Settings:
        """The user's, with what the generation that runs overrides."""
        return self.overrides.overlaid(read_settings(self._shared.opts))

    def _engine(self) -> Any:
        from modules import sd_models

        return sd_models.model_data.get_sd_model()

    def sessions(self) -> Mapping[nn.Module, HostedSession]:
        """The models on which something was attached, with their sessions."""
        return self._sessions

    @property
    def memory_report(self) -> MemoryReport | None:
        """LoRA factors on the device: as planned, and as they stand there now."""
        from modules import sd_models

        engine = sd_models.model_data.get_sd_model()
        return self.memory.report([patcher.model for patcher in patchers_of(engine)])

    def peak_meter(self) -> PeakMeter:
        """Measures the card's largest use from here on. Its statistics are reset, unless the host measures by
        itself at this moment (as for the page), or a generation that surrounds this one is measured."""
        monitor = getattr(self._shared, "mem_mon", None)
        measured = monitor is not None and monitor.run_flag is not None and monitor.run_flag.is_set()
        return PeakMeter(
            self._memory_management.get_torch_device(), reset=not (measured or self.overrides.running)
        )

    def plan_for(self, loras: Sequence[tuple[str, float]], positions: int | None) -> Prospect:
        """What the memory plan of these LoRAs on the checkpoint that is loaded would be (`prospect.foresee`).

        To be called while no generation runs.
        """
        settings = self.settings()
        asides: dict[nn.Module, HostedSession] = {}

        def aside(model: nn.Module) -> HostedSession:
            if model not in asides:
                session = self._sessions.get(model) or HostedSession(model)
                asides[model] = session.aside(model, settings.arithmetic.stock_dora_norm)
            return asides[model]

        planning = Planning(Budgeting(self._memory_management, self._sessions, aside, self.settings))
        return foresee(self.loader, planning, loras, settings.text_encoders, positions)

    def stand_back(self) -> None:
        """Take everything off, and have the host build its own patches at its next chance.

        By itself it would skip identifiers that it has merged in part, and a patcher that is loaded.
        """
        for model in list(self._sessions):
            self._sessions.pop(model).clear()
            self.memory.forget(model)
            self._host_refresh(model.lora_loader, {}, force_refresh=True)
            for loaded in list(self._memory_management.current_loaded_models):
                if loaded.model.model is model:
                    self._memory_management.unload_model_clones(loaded.model)
        self.loader.stand_back()

    def uninstall(self) -> None:
        """Leave the host as it was found."""
        self.overrides.uninstall()
        self.stand_back()
        for replacement in reversed(self._replacements):
            replacement.undo()

    def _prompted(self) -> bool:
        """Whether the last prompt had LoRAs that are ours to apply."""
        return self.settings().enabled and any(self.loader.versions)

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
            try:
                problems = self._follow(lora_loader, lora_patches, settings.arithmetic, offload_device)
            except Exception as error:  # out of here, it would leave the host's list of loaded models wrong
                logger.exception("following the WebUI's LoRAs failed")
                reason = f"attaching failed ({type(error).__name__}: {error})"
                problems = [PatchError(f"all of them: {reason}; please report it with the console's log")]
                self._without_loras(lora_loader, offload_device)
            if problems and not hasattr(model, "diffusion_model"):
                self._incomplete += 1
            self._attempts.made(model, problems)

        return refresh

    def _follow(
        self, lora_loader: Any, lora_patches: Any, arithmetic: Arithmetic, offload_device: torch.device
    ) -> Sequence[PatchError]:
        """Bring a model to these patches, but for files that have no room, or have failed in another model
        of the checkpoint; the reason for each that fails here."""
        model = lora_loader.model
        session = self._session(model)
        left_out = self.memory.left_out(model)
        if left_out and not hasattr(model, "diffusion_model"):
            self._incomplete += 1
        models = [patcher.model for patcher in patchers_of(self._engine())]
        if any(each is model for each in models):
            left_out |= self._failures.elsewhere(model, models)
        fitting = {source_of(key) for key in lora_patches} - left_out

        def merge(host_patches: Any) -> None:
            self._host_refresh(lora_loader, host_patches, offload_device, True)

        started = time.perf_counter()
        patches = only(lora_patches, fitting)
        with self.progress.stage("attaching LoRAs") as tick:
            problems = session.follow(model, patches, arithmetic, merge, tick)
        if any(each is model for each in models):
            self._followed(model, patches, problems, time.perf_counter() - started)
        return problems

    def _followed(
        self, model: nn.Module, patches: Any, problems: Sequence[PatchError], seconds: float
    ) -> None:
        """Into the report: what stands on one of the checkpoint's models now."""
        left_out = {problem.source for problem in problems if not isinstance(problem, StillMerged)}
        self.record.present.followed(
            type(model).__name__,
            not hasattr(model, "diffusion_model"),
            seconds,
            self._session(model).host_layers,
            strengths_of(patches, left_out),
        )

    def _tell(self, model: nn.Module, problems: Sequence[PatchError]) -> None:
        """What was left out of a model that is loaded."""
        for problem in problems:
            if isinstance(problem, StillMerged):
                self.notices.problem("what the WebUI has merged", f"A former LoRA is active: {problem}")
            else:
                failed = not isinstance(problem, AttachInterrupted)
                said = f"A LoRA was left out: {problem}{self._acted_already(model, problem.source)}"
                self._left_out(problem.source, said, failed)

    def _acted_already(self, model: nn.Module, source: str | None) -> str:
        """What is to be added where the diffusion model lacks a file, and the text encoders had it."""
        if not hasattr(model, "diffusion_model"):
            return ""
        others = [self._sessions.get(patcher.model) for patcher in patchers_of(self._engine())]
        there = any(
            source in each.sources for each in others if each not in (None, self._sessions.get(model))
        )
        return "; its part for the text encoders has acted on the prompt" if there else ""

    def _without_loras(self, lora_loader: Any, offload_device: torch.device) -> None:
        """Leave a model without any LoRA, as far as that can be done."""
        session = self._sessions.get(lora_loader.model)
        take_out = partial(self._host_refresh, lora_loader, {}, offload_device, True)
        try:
            run_all([take_out] if session is None else [session.clear, take_out])
        except Exception:
            logger.exception("taking LoRAs off failed, too; load the checkpoint anew")

    def _left_out(self, source: str | None, message: str, failed: bool = True) -> None:
        """Tell page, log and report; source: the file as the host's patchers know it, None: all; failed:
        False where the user wanted it so."""
        self.record.present.problem(source, message)
        self.notices.problem(source or "all", message, failed)

    def _session(self, model: nn.Module) -> HostedSession:
        if model not in self._sessions:
            self._sessions[model] = HostedSession(model)
            self._failures.watch(model, self._sessions[model])
        return self._sessions[model]

    def _make_load_models(self, host_load: Callable[..., None]) -> Callable[..., None]:
        def load_models_gpu(
            models: Any, memory_required: float = 0, hard_memory_preservation: float = 0
        ) -> None:
            device = self._memory_management.get_torch_device()
            required = self.memory.at_most_the_card(memory_required, device)
            kept = self.memory.at_most_the_card(hard_memory_preservation, device)
            planned = (
                [patcher for patcher in models if self._follows(patcher)] if self.settings().enabled else []
            )
            kept += self.memory.prepare(planned, models, required, kept)
            self._stop_if_set()
            with self._attempts.loading():
                host_load(models, required, self.memory.beside_the_least(kept, device))
                for patcher in models:
                    if self._follows(patcher):
                        patcher.refresh_loras()
                for patcher in planned:
                    self.memory.place(patcher)
            self._stop_if_set()

        return load_models_gpu

    def _stop_if_set(self) -> None:
        settings = self.settings()
        if settings.enabled and settings.on_failure == "stop":
            self.notices.stop_if_any()

    def _make_sampling_prepare(self, host_prepare: Callable[..., Any]) -> Callable[..., Any]:
        def sampling_prepare(unet: Any, x: Any) -> Any:
            self.memory.image(int(x.shape[-2] * x.shape[-1]))
            try:
                return host_prepare(unet, x)
            finally:
                self.memory.image(None)

        return sampling_prepare

    def _make_has_online_lora(self, host_has: Callable[..., bool]) -> Callable[..., bool]:
        """What goes the host's own way it merges in its forwards, from wherever the factors are."""

        def has_online_lora(patcher: Any) -> bool:
            return False if self.settings().enabled else host_has(patcher)

        return has_online_lora

    def _make_model_load(self, host_load: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def model_load(loaded: Any, model_gpu_memory_when_using_cpu_swap: int = -1) -> nn.Module:
            session = self._session_of(loaded)
            if session is not None and model_gpu_memory_when_using_cpu_swap >= 0:
                try:
                    session.unmerge()
                except Exception:  # all are back; one that found no room on its device is moved now
                    logger.exception("putting a merged layer's parameter back on its device failed")
            return host_load(loaded, model_gpu_memory_when_using_cpu_swap)

        return model_load

    def _make_model_unload(self, host_unload: Callable[..., None]) -> Callable[..., None]:
        def model_unload(loaded: Any, avoid_model_moving: bool = False) -> None:
            session = self._session_of(loaded)
            if session is not None and not avoid_model_moving:
                session.release()
            host_unload(loaded, avoid_model_moving)

        return model_unload

    def _session_of(self, loaded: Any) -> HostedSession | None:
        """The session of a model that the host loads or unloads."""
        model = getattr(loaded.model, "model", None)
        return self._sessions.get(model) if isinstance(model, nn.Module) else None

    def _make_load_networks(self, host_load: Callable[..., None]) -> Callable[..., None]:
        def load_networks(
            names: Any, te_multipliers: Any = None, unet_multipliers: Any = None, dyn_dims: Any = None
        ) -> None:
            settings = self.settings()
            if settings.enabled:
                self._load(names, te_multipliers, unet_multipliers, settings)
                return
            self._begin_set(WEBUI, "")
            self.stand_back()
            present = self.record.present
            for file in zip(names, unet_multipliers or (), te_multipliers or (), strict=False):
                present.add(FileReport(file[0], *map(reportable, file[1:])))
            try:
                with self.overrides.hosts_loader():
                    host_load(names, te_multipliers, unet_multipliers, dyn_dims)
            except Exception as error:
                present.problem(None, f"the WebUI's own loading failed ({type(error).__name__}: {error})")
                raise

        return load_networks

    def _begin_set(self, patcher: str, compute: str, text_encoders: bool = True) -> None:
        """The prompt's LoRAs are being set."""
        self.record.begin(patcher, compute, text_encoders)
        self.notices.begin()
        for session in self._sessions.values():
            session.try_again()
            session.overhead.reset()

    def _load(
        self,
        names: Sequence[str],
        te_multipliers: Sequence[float],
        unet_multipliers: Sequence[float],
        settings: Settings,
        failure: Exception | None = None,
    ) -> None:
        """Set these LoRAs; where that fails as a whole, none, and say so: the host would keep silent, and
        sample with the former ones. failure: what has failed before."""
        try:
            self._begin_set(OURS, settings.arithmetic.compute, settings.text_encoders)
            if failure is not None:
                raise failure
            self.loader.load(
                names, te_multipliers, unet_multipliers, settings.text_encoders, settings.detailed_log
            )
        except Exception as error:
            logger.exception("setting the prompt's LoRAs failed")
            self.loader.take_off()
            reason = f"setting the prompt's LoRAs failed ({type(error).__name__}: {error})"
            self.loader.refuse_all(names, f"{reason}; please report it with the console's log")

    def _make_activate(self, host_activate: Callable[..., Any]) -> Callable[..., Any]:
        def activate(extra_network: Any, p: Any, params_list: Any) -> Any:
            settings, number = self.settings(), self.record.present.number
            if not settings.enabled:
                return host_activate(extra_network, p, params_list)
            refused: list[tuple[Any, str]] = []
            try:
                reasons = [(params, unreadable(params)) for params in params_list]
                refused += [(params, reason) for params, reason in reasons if reason is not None]
                readable = [params for params, reason in reasons if reason is None]
                return host_activate(extra_network, p, readable if refused else params_list)
            except Exception as error:
                if self.record.present.number == number:  # it did not come to load_networks
                    self._load([name_in(params) for params in params_list], (), (), settings, error)
                raise
            finally:
                for params, reason in refused:
                    self.loader.refuse(name_in(params), reason)

        return activate

    def _make_cached_params(self, host_params: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        def cached_params(processing: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            self._stop_if_set()
            settings = self.settings()
            versions = self.loader.versions if settings.enabled and settings.text_encoders else ()
            refused = tuple(self._planning.refused()) if versions else ()
            ours = (settings.arithmetic, versions, self._incomplete, refused) if versions else ()
            overridden = self.overrides.conditioning_key(settings.enabled)
            return (*host_params(processing, *args, **kwargs), ours, overridden)

        return cached_params


def generation_is_over(p: Any) -> None:
    """Whatever ended it."""
    from lib_precision_lora.host.generation.generations import GENERATIONS

    GENERATIONS.abandon(p)


def patchers_of(engine: Any) -> list[Any]:
    """The patchers of a checkpoint's model and text encoder."""
    objects = getattr(engine, "forge_objects", None)
    if objects is None:
        return []
    return [objects.unet, *([] if objects.clip is None else [objects.clip.patcher])]
