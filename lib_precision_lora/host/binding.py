"""The extension in a running WebUI: what is swapped in every host, and what follows from it.

free_memory               no request above the card's size
sampling_prepare          how large the image is, for the plan
networks.load_networks    read files, report what cannot be applied, keep what the prompt asks for
ExtraNetworkLora.activate where the WebUI would stumble over one LoRA of the prompt, leave out that one
cached_params             text conditioning is cached by our settings and file versions as well
get_state_dict_after_quant, save_unet, save_checkpoint     `saving.py`

What else is swapped differs from host to host: `forge/host.py`, `neo/host.py`. What one generation does
differently, and what is swapped for it: `generation/generation_overrides.py`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lib_precision_lora.host.generation.generation_overrides import GenerationOverrides
from lib_precision_lora.host.generation.notices import Notices
from lib_precision_lora.host.generation.progress import NoJob, Progress
from lib_precision_lora.host.generation.record import Record
from lib_precision_lora.host.generation.report import FileReport
from lib_precision_lora.host.interface import Host, LoadRequest, Merge, patchers_of
from lib_precision_lora.host.loras.division import HostPatches
from lib_precision_lora.host.loras.failures import ForwardFailures
from lib_precision_lora.host.loras.files import LoraFiles
from lib_precision_lora.host.loras.following import Following, known
from lib_precision_lora.host.loras.hosted import HostedSession
from lib_precision_lora.host.loras.loading import NetworkLoader
from lib_precision_lora.host.loras.strengths import name_in, reportable, unreadable
from lib_precision_lora.host.page.settings import Settings, read_settings
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


class Binding:
    """All that is swapped while the extension is loaded; switched off, it passes everything through."""

    def __init__(self, host: Host) -> None:
        import extra_networks_lora
        import networks
        from backend import utils
        from backend.diffusion_engine.base import ForgeDiffusionEngine
        from modules import processing, sd_models, shared

        self.host = host
        self._shared, self._sd_models = shared, sd_models
        self.progress = Progress(lambda: shared.state)
        self.notices = Notices(
            lambda: getattr(sd_models.model_data.get_sd_model(), "extra_generation_params", None)
        )
        self.record = Record()
        self.following = Following(
            self.settings, self._models, self.progress, self.record, self.notices, self._new_session
        )
        self._positions: int | None = None
        budgeting = Budgeting(host, self.following.sessions, self.following.session, self.settings)
        self._planning = Planning(
            budgeting, lambda: [each for each in patchers_of(self._engine()) if self._follows(each)]
        )
        self.memory = MemoryPlanner(
            host,
            budgeting,
            self._planning,
            self.following.session,
            self.following.left_out,
            self.progress.stage,
        )
        failures = ForwardFailures(
            self.following.sessions, host, self.memory, self.following.left_out, self._stop_if_set
        )
        self.following.elsewhere = lambda model, models: failures.elsewhere(model, models)
        self.following.no_room = lambda model: self.memory.left_out(model)
        self.following.watch = lambda model, session: failures.watch(model, session)
        files = LoraFiles(limit=lambda: self.settings().cache_bytes, stage=self.progress.stage)
        self.loader = NetworkLoader(host, files, self.notices, self.record, self.progress)
        saving = Saving(self.following.sessions, Progress(NoJob).stage, self._prompted)
        self._replacements = [
            *host.replacements(self),
            Replacement(host.memory, "free_memory", self.memory.guard),
            *(Replacement(each, "sampling_prepare", self._make_sampling_prepare) for each in host.samplers),
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

    @property
    def enabled(self) -> bool:
        """Whether LoRAs are ours to apply at this moment."""
        return self.settings().enabled

    def _engine(self) -> Any:
        return self._sd_models.model_data.get_sd_model()

    def _models(self) -> list[nn.Module]:
        return [patcher.model for patcher in patchers_of(self._engine())]

    def _new_session(self, model: nn.Module) -> HostedSession:
        return HostedSession(model, self.host.put_aside, self.host.memory.get_torch_device)

    def sessions(self) -> Mapping[nn.Module, HostedSession]:
        """The models on which something was attached, with their sessions."""
        return self.following.sessions

    @property
    def memory_report(self) -> MemoryReport | None:
        """LoRA factors on the device: as planned, and as they stand there now."""
        return self.memory.report(self._models())

    def peak_meter(self) -> PeakMeter:
        """Measures the card's largest use from here on. Its statistics are reset, unless the host measures by
        itself at this moment (as for the page), or a generation that surrounds this one is measured."""
        monitor = getattr(self._shared, "mem_mon", None)
        measured = monitor is not None and monitor.run_flag is not None and monitor.run_flag.is_set()
        return PeakMeter(self.host.memory.get_torch_device(), reset=not (measured or self.overrides.running))

    def plan_for(self, loras: Sequence[tuple[str, float]], positions: int | None) -> Prospect:
        """What the memory plan of these LoRAs on the checkpoint that is loaded would be (`prospect.foresee`).

        To be called while no generation runs.
        """
        settings = self.settings()
        asides: dict[nn.Module, HostedSession] = {}

        def aside(model: nn.Module) -> HostedSession:
            if model not in asides:
                session = self.following.sessions.get(model) or self._new_session(model)
                asides[model] = session.aside(model, settings.arithmetic.stock_dora_norm)
            return asides[model]

        planning = Planning(Budgeting(self.host, self.following.sessions, aside, self.settings))
        return foresee(self.host, self.loader, planning, loras, settings.text_encoders, positions)

    def stand_back(self) -> None:
        """Take everything off, and have the host build its own patches at its next chance."""
        for model in list(self.following.sessions):
            self.following.sessions.pop(model).clear()
            self.memory.forget(model)
            self.host.forget(model)
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
        if not isinstance(model, nn.Module) or not self.host.takes_loras(patcher):
            return False
        return self.enabled or model in self.following.sessions

    def bring(self, model: nn.Module, patches: HostPatches, merge: Merge) -> None:
        """As `Following.bring`."""
        self.following.bring(model, patches, merge)

    def stand_back_from(self, model: nn.Module) -> bool:
        """As `Following.stand_back_from`."""
        return self.following.stand_back_from(model)

    def load(self, request: LoadRequest, place: Callable[[float, float], None]) -> None:
        """Plan what the host is about to place, have it placed with room for factors, and attach."""
        device = self.host.memory.get_torch_device()
        request = dataclasses.replace(
            request,
            required=self.memory.at_most_the_card(request.required, device),
            kept=self.memory.at_most_the_card(request.kept, device),
            positions=self._positions,
        )
        planned = [each for each in request.models if self._follows(each)] if self.enabled else []
        kept = request.kept + self.memory.prepare(planned, request)
        self._stop_if_set()
        with self.following.attempts.loading():
            place(request.required, self.memory.beside_the_least(kept, device))
            for patcher in request.models:
                if self._follows(patcher):
                    self.host.follow(patcher)
            for patcher in planned:
                self.memory.place(patcher)
        self._stop_if_set()

    def unmerge(self, model: Any) -> bool:
        """A model is about to be placed layer by layer: the host is to find its own parameters there. Whether
        some were put back for that."""
        session = known(self.following.sessions, model)
        if session is None or not session.merged:
            return False
        try:
            session.unmerge()
        except Exception:  # all are back; one that found no room on its device is moved now
            logger.exception("putting a merged layer's parameter back on its device failed")
        return True

    def release(self, model: Any) -> None:
        """A model leaves its device, and its factors with it."""
        session = known(self.following.sessions, model)
        if session is not None:
            session.release()

    def _stop_if_set(self) -> None:
        settings = self.settings()
        if settings.enabled and settings.on_failure == "stop":
            self.notices.stop_if_any()

    def _make_sampling_prepare(self, host_prepare: Callable[..., Any]) -> Callable[..., Any]:
        def sampling_prepare(unet: Any, x: Any) -> Any:
            self._positions = int(x.shape[-2] * x.shape[-1])
            try:
                return host_prepare(unet, x)
            finally:
                self._positions = None

        return sampling_prepare

    def _make_load_networks(self, host_load: Callable[..., None]) -> Callable[..., None]:
        def load_networks(
            names: Any, te_multipliers: Any = None, unet_multipliers: Any = None, *more: Any, **named: Any
        ) -> None:
            settings = self.settings()
            reason = self.host.leaves_to_host(self._engine()) if settings.enabled else None
            if settings.enabled and reason is None:
                self._load(names, te_multipliers, unet_multipliers, settings)
                return
            if reason is not None and names:
                logger.info("LoRAs are left to the WebUI: %s", reason)
            self._begin_set(WEBUI, "", once=self.host.applies_once)
            self.stand_back()
            present = self.record.present
            for file in zip(names, unet_multipliers or (), te_multipliers or (), strict=False):
                present.add(FileReport(file[0], *map(reportable, file[1:])))
            try:
                with self.overrides.hosts_loader():
                    host_load(names, te_multipliers, unet_multipliers, *more, **named)
            except Exception as error:
                present.problem(None, f"the WebUI's own loading failed ({type(error).__name__}: {error})")
                raise

        return load_networks

    def _begin_set(self, patcher: str, compute: str, text_encoders: bool = True, once: bool = False) -> None:
        """The prompt's LoRAs are being set."""
        self.record.begin(patcher, compute, text_encoders, once)
        self.notices.begin()
        for session in self.following.sessions.values():
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
            ours = (settings.arithmetic, versions, self.following.incomplete, refused) if versions else ()
            overridden = self.overrides.conditioning_key(settings.enabled)
            return (*host_params(processing, *args, **kwargs), ours, overridden)

        return cached_params


def generation_is_over(p: Any) -> None:
    """Whatever ended it."""
    from lib_precision_lora.host.generation.generations import GENERATIONS

    GENERATIONS.abandon(p)
