"""The override of a generation: put over what the host reads while it runs, gone when it ends.

Nothing is set and put back later. The user's options, and the host's parameters of the checkpoint to load
(`forge_loading_parameters`), stay the user's own all the time. While a generation runs, what is read from
them is overlaid: the settings where they are read, the storage type where the host decides whether to load
the checkpoint anew. So whatever rewrites these parameters in between (hires fix, the refiner, another
checkpoint in `override_settings`, the page) rewrites the user's own, and the next generation finds them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lib_precision_lora.host.contract import Requirement
from lib_precision_lora.host.generation.low_bits import OPTION, low_bits_options, objection
from lib_precision_lora.host.generation.notices import tell
from lib_precision_lora.host.generation.override import (
    Generation,
    Override,
    generations,
    offered,
    requests,
)
from lib_precision_lora.host.generation.progress import Progress
from lib_precision_lora.host.page.settings import COMPUTE_MODES, Settings
from lib_precision_lora.host.replacement import Replacement
from lib_precision_lora.ui.choices import AS_SET, FP16_LORA, OURS, STOCK_ONLINE

logger = logging.getLogger("lib_precision_lora")

OVERRIDE_REQUIREMENTS = (
    Requirement("modules.processing", "manage_model_and_prompt_cache", ("p",)),
    Requirement("modules.processing", "process_images_inner", ("p",)),
    Requirement("modules.processing", "set_config", ("req", "is_api", "run_callbacks", "save_config")),
    Requirement("modules.processing", "forge_model_reload"),
    Requirement("modules.sd_models", "forge_model_reload"),
    Requirement("modules.sd_models", "get_closet_checkpoint_match", ("search_string",), called=True),
    Requirement("modules.sd_models", "model_data.forge_loading_parameters"),
    Requirement("modules.sd_models", "model_data.forge_hash"),
    Requirement("modules_forge.main_entry", "forge_unet_storage_dtype_options"),
    Requirement("modules_forge.main_entry", "refresh_model_loading_parameters"),
    Requirement("backend.args", "dynamic_args"),
)


class GenerationOverrides:
    """Swaps what the host does around a generation.

    manage_model_and_prompt_cache  the override begins: its first step after `before_process`
    process_images_inner           it ends
    forge_model_reload             the checkpoint is loaded in the storage type of the override; not at all
                                   where the user has interrupted the generation before that
    set_config                     a storage type in `override_settings` is an override, and no option
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        progress: Progress,
        over: Callable[[Any], None] = lambda p: None,
    ) -> None:
        """settings: the user's own; progress: where loading a checkpoint is shown; over: told of each
        generation that is over, whatever ended it."""
        from backend import args
        from modules import processing, sd_models, shared
        from modules_forge import main_entry

        self._settings, self._progress, self._over = settings, progress, over
        self._lock = threading.Lock()
        self._when_idle: Callable[[], None] | None = None
        self._sd_models, self._shared, self._main_entry = sd_models, shared, main_entry
        self._dynamic_args = args.dynamic_args
        self._running: list[tuple[Any, Generation]] = []
        self._explained = False  # what (fp16 LoRA) means; once for each start of the WebUI
        self._replacements = [
            Replacement(processing, "manage_model_and_prompt_cache", self._make_manage_model),
            Replacement(processing, "process_images_inner", self._make_process),
            Replacement(processing, "set_config", self._make_set_config),
            Replacement(processing, "forge_model_reload", self._make_reload),
            Replacement(sd_models, "forge_model_reload", self._make_reload),
        ]

    def uninstall(self) -> None:
        for replacement in reversed(self._replacements):
            replacement.undo()

    @property
    def running(self) -> bool:
        """Whether a generation is being made."""
        return bool(self._running)

    def when_idle(self, call: Callable[[], None]) -> None:
        """Now, if no generation is being made; else when the one that is being made is over."""
        with self._lock:
            if self._running:
                self._when_idle = call
                return
        call()

    def current(self) -> Override:
        """What is in effect at this moment."""
        return self._running[-1][1].in_effect if self._running else Override()

    def overlaid(self, settings: Settings) -> Settings:
        """The user's settings as they are in the generation that runs: what is changed meanwhile takes effect
        at the next one."""
        override = self.current()
        if self._running:
            settings = self._running[-1][1].settings
        if override.compute != AS_SET:
            arithmetic = replace(settings.arithmetic, compute=COMPUTE_MODES[override.compute])
            settings = replace(settings, arithmetic=arithmetic)
        return settings if override.patcher == OURS else replace(settings, enabled=False)

    @contextmanager
    def hosts_loader(self) -> Iterator[None]:
        """While the host's own code loads LoRAs: whether it merges them or keeps them in fp16."""
        before = self._dynamic_args.get("online_lora", False)
        self._dynamic_args["online_lora"] = self._online()
        try:
            yield
        finally:
            self._dynamic_args["online_lora"] = before

    def conditioning_key(self, enabled: bool) -> tuple[object, ...]:
        """What else decides about cached conditioning: the host itself forgets it where the user changes
        the storage type, and the LoRAs that it puts on a text encoder (not enabled) differ by their mode."""
        storage = _storage_type(self._sd_models.model_data.get_sd_model())
        return str(storage), not enabled and self._online()

    def _online(self) -> bool:
        override = self.current()
        if override.patcher != OURS:
            return override.patcher == STOCK_ONLINE
        if override.low_bits != AS_SET:
            return low_bits_options()[override.low_bits][1]
        return bool(self._dynamic_args.get("online_lora", False))

    def _make_manage_model(self, host_manage: Callable[[Any], None]) -> Callable[[Any], None]:
        def manage_model_and_prompt_cache(p: Any) -> None:
            generation = self._begin(p)
            try:
                with self._inside(p, generation):
                    host_manage(p)
            except BaseException:
                generations.forget(p)
                self._told(p)
                raise

        return manage_model_and_prompt_cache

    def _make_process(self, host_process: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def process_images_inner(p: Any) -> Any:
            present = generations.get(p)
            generation = present or self._begin(p)
            try:
                with self._inside(p, generation):
                    try:
                        if present is None:
                            self._load_where_the_host_does_not(p)
                        return host_process(p)
                    finally:
                        self._told(p)
            finally:
                generations.forget(p)

        return process_images_inner

    def _told(self, p: Any) -> None:
        try:
            self._over(p)
        except Exception:  # the image is more than its report
            logger.exception("the report of a generation failed; please report it with the console's log")

    def _make_set_config(self, host_set: Callable[..., None]) -> Callable[..., None]:
        def set_config(req: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            host_set({key: value for key, value in req.items() if key != OPTION}, *args, **kwargs)

        return set_config

    def _make_reload(self, host_reload: Callable[[], Any]) -> Callable[[], Any]:
        def forge_model_reload() -> Any:
            data = self._sd_models.model_data
            if data.sd_model is None:  # loading has failed, and the host believes in the former one
                data.forge_hash = ""
            if self._running and self._progress.interrupted and _is_checkpoint(data.sd_model):
                return data.sd_model, False  # of which the host makes no image any more
            own = data.forge_loading_parameters
            parameters = self._loading_parameters(own)
            if parameters is own:
                with self._shown(own, "as set"):
                    return host_reload()
            data.forge_loading_parameters = parameters
            low_bits = self._running[-1][1].wanted.low_bits
            try:
                with self._shown(parameters, f"in {low_bits} for this generation"):
                    return host_reload()
            except Exception as error:
                logger.exception("loading the checkpoint in the storage type of this generation failed")
                data.forge_hash = ""
                p, generation = self._running[-1]
                reason = f"loading the checkpoint in it failed ({type(error).__name__}: {error})"
                generation.failed[str(parameters)] = generation.refused = reason
                _tell_refusal(p, generation)
            finally:
                self._dynamic_args[OPTION] = own.get("unet_storage_dtype")
                if data.forge_loading_parameters is parameters:
                    data.forge_loading_parameters = own
            with self._shown(own, "as set"):
                return host_reload()

        return forge_model_reload

    @contextmanager
    def _shown(self, parameters: dict[str, Any], how: str) -> Iterator[None]:
        """While the host loads the checkpoint with these parameters, if it does. Its loader cannot be
        interrupted in the middle."""
        if not self._running or self._sd_models.model_data.forge_hash == str(parameters):
            yield
            return
        with self._progress.whole(f"loading the checkpoint {how}"):
            yield

    def _begin(self, p: Any) -> Generation:
        """The generation of this processing object, before its checkpoint is loaded."""
        wanted = offered(p, requests.get(p) or Override())
        named = (getattr(p, "override_settings", None) or {}).get(OPTION)
        if named is not None and wanted.low_bits == AS_SET:
            wanted = offered(p, replace(wanted, low_bits=str(named)))
            if wanted.low_bits != AS_SET and not p.override_settings_restore_afterwards:
                self._set_for_good(wanted.low_bits)
        outer = self._running[-1][1].wanted if self._running else Override()
        generation = Generation(wanted.within(outer), self._settings())
        generations.set(p, generation)
        return generation

    def _set_for_good(self, low_bits: str) -> None:
        """A client of the API has asked for an option that is not restored afterwards: the host would set
        it, and load the checkpoint as before."""
        self._shared.opts.set(OPTION, low_bits, is_api=True, run_callbacks=False)
        self._main_entry.refresh_model_loading_parameters()

    @contextmanager
    def _inside(self, p: Any, generation: Generation) -> Iterator[None]:
        with self._lock:
            self._running.append((p, generation))
        try:
            if not self._explained and self._online() and self.overlaid(self._settings()).enabled:
                self._explained = True
                logger.info("%s", FP16_LORA)
                p.comment(FP16_LORA)
            yield
        finally:
            with self._lock:
                self._running.pop()
                idle = None
                if not self._running:
                    idle, self._when_idle = self._when_idle, None
            if idle is not None:
                try:
                    idle()
                except Exception:  # the image is made
                    logger.exception("what waited for the end of a generation failed")

    def _load_where_the_host_does_not(self, p: Any) -> None:
        """The upscale button of the gallery loads no checkpoint where hires fix names one, be it the same."""
        name = getattr(p, "hr_checkpoint_name", None)
        own = self._sd_models.model_data.forge_loading_parameters
        match = name and self._sd_models.get_closet_checkpoint_match(name)
        if match and match is own.get("checkpoint_info"):
            self._sd_models.forge_model_reload()

    def _loading_parameters(self, own: dict[str, Any]) -> dict[str, Any]:
        """The host's loading parameters as they are in the generation that runs; `own` where they are the
        user's own, or come to the same."""
        if not self._running or "checkpoint_info" not in own:
            return own
        p, generation = self._running[-1]
        generation.refused = None
        if generation.wanted.low_bits == AS_SET or own["checkpoint_info"] is None:
            return own
        storage, _ = low_bits_options()[generation.wanted.low_bits]
        data = self._sd_models.model_data
        there = data.forge_hash == str(own) and _storage_type(data.get_sd_model()) == storage
        if there or storage == own.get("unet_storage_dtype"):
            return own
        parameters = {**own, "unet_storage_dtype": storage}
        checkpoint = own["checkpoint_info"].filename
        generation.refused = generation.failed.get(str(parameters)) or objection(checkpoint, storage)
        _tell_refusal(p, generation)
        return own if generation.refused else parameters


def _is_checkpoint(engine: Any) -> bool:
    """Before the first one is loaded, the host has something that only looks like one."""
    return hasattr(engine, "forge_objects_original")


def _tell_refusal(p: Any, generation: Generation) -> None:
    if generation.refused is not None:
        asked = f"{generation.wanted.low_bits} was asked for, but {generation.refused}"
        tell(p, f"Diffusion in Low Bits stays as set above: {asked}")


def _storage_type(engine: Any) -> Any:
    """In which type the diffusion model of the checkpoint at hand is stored."""
    unet = getattr(getattr(engine, "forge_objects_original", None), "unet", None)
    return getattr(getattr(unet, "model", None), "storage_dtype", None)
