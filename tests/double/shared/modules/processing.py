"""A generation: its options, its checkpoint, text conditioning; how it samples is a subclass's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from backend import memory_management
from modules import extra_networks, sd_models, shared
from modules.conditioning_key import cached_params
from modules.sd_models import forge_model_reload
from modules.shared import opts
from modules.sysinfo import set_config


def empty_cache() -> list[Any]:
    return [None, None, None]


class StableDiffusionProcessing:
    """What one image is made from. Conditioning is cached on the class, from generation to generation."""

    cached_uc: ClassVar[list[Any]] = empty_cache()
    cached_c: ClassVar[list[Any]] = empty_cache()

    def __init__(self, prompt: str = "", negative_prompt: str = "", steps: int = 50, **fields: Any) -> None:
        self.prompt, self.negative_prompt, self.steps = prompt, negative_prompt, steps
        self.width = self.height = 512
        self.cfg_scale, self.distilled_cfg_scale, self.hr_distilled_cfg = 7.0, 3.5, 3.5
        self.disable_extra_networks = False
        self.n_iter, self.iteration = 1, 0
        self.enable_hr, self.hr_checkpoint_name = False, None
        self.override_settings: dict[str, Any] = {}
        self.override_settings_restore_afterwards = True
        self.__dict__.update(fields)
        self.scripts: Any = None
        self.comments: dict[str, int] = {}
        self.extra_generation_params: dict[str, Any] = {}
        self.prompts: list[str] = []
        self.negative_prompts: list[str] = []
        self.extra_network_data: Any = None
        self.c = self.uc = None

    __hash__ = None  # type: ignore[assignment]  # as of the host's, which is a dataclass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StableDiffusionProcessing) and vars(self) == vars(other)

    def clear_prompt_cache(self) -> None:
        self.cached_c, self.cached_uc = empty_cache(), empty_cache()  # type: ignore[misc]
        StableDiffusionProcessing.cached_c = empty_cache()
        StableDiffusionProcessing.cached_uc = empty_cache()

    @property
    def sd_model(self) -> Any:
        return shared.sd_model

    def comment(self, text: str) -> None:
        self.comments[text] = 1

    def parse_extra_network_prompts(self) -> None:
        self.prompts, self.extra_network_data = extra_networks.parse_prompts(self.prompts)

    cached_params = cached_params

    def get_conds_with_caching(
        self,
        function: Any,
        required_prompts: Any,
        steps: int,
        caches: Any,
        extra_network_data: Any,
        hires_steps: int | None = None,
    ) -> Any:
        parameters = self.cached_params(required_prompts, steps, extra_network_data, hires_steps)
        for cache in caches:
            if cache[0] is not None and parameters == cache[0]:
                return cache[1]
        caches[0][1] = function(shared.sd_model, required_prompts, steps, hires_steps)
        caches[0][0] = parameters
        return caches[0][1]

    def setup_conds(self) -> None:
        for prompts, name in ((self.negative_prompts, "uc"), (self.prompts, "c")):
            cache = getattr(self, f"cached_{name}")
            value = self.get_conds_with_caching(
                learned_conditioning, prompts, self.steps, [cache], self.extra_network_data
            )
            setattr(self, name, value)


class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    """With a second, larger pass."""

    cached_hr_uc: ClassVar[list[Any]] = empty_cache()
    cached_hr_c: ClassVar[list[Any]] = empty_cache()


def learned_conditioning(model: Any, prompts: Any, steps: int, hires_steps: int | None) -> Any:
    return model.get_learned_conditioning(prompts)


need_global_unload = False


def manage_model_and_prompt_cache(p: Any) -> None:
    global need_global_unload
    _, just_reloaded = forge_model_reload()
    if need_global_unload and not just_reloaded:
        memory_management.unload_all_models()
    if need_global_unload:
        p.clear_prompt_cache()
    need_global_unload = False


def process_images(p: Any) -> Any:
    if p.scripts is not None:
        p.scripts.before_process(p)
    stored_opts = {key: opts.data[key] for key in p.override_settings if key in opts.data}
    try:
        if sd_models.checkpoint_aliases.get(p.override_settings.get("sd_model_checkpoint")) is None:
            p.override_settings.pop("sd_model_checkpoint", None)
        set_config(p.override_settings, is_api=True, run_callbacks=False, save_config=False)
        if not getattr(p, "txt2img_upscale", False):
            manage_model_and_prompt_cache(p)
        return process_images_inner(p)
    finally:
        if p.override_settings_restore_afterwards:
            set_config(stored_opts, save_config=False)


def process_images_inner(p: Any) -> Any:
    engine = shared.sd_model
    engine.comments, engine.extra_generation_params = [], {}
    if p.scripts is not None:
        p.scripts.process(p)
    for n in range(p.n_iter):
        p.iteration = n
        shared.state.skipped = False
        if shared.state.interrupted or shared.state.stopping_generation:
            break
        if not getattr(p, "txt2img_upscale", False) or p.hr_checkpoint_name is None:
            sd_models.forge_model_reload()
        p.sd_model.forge_objects = p.sd_model.forge_objects_original.shallow_copy()
        p.prompts, p.negative_prompts = [p.prompt], [p.negative_prompt]
        if p.scripts is not None:
            p.scripts.before_process_batch(p, batch_number=n)
        p.parse_extra_network_prompts()
        if not p.disable_extra_networks:
            extra_networks.activate(p, p.extra_network_data)
        p.sd_model.forge_objects = p.sd_model.forge_objects_after_applying_lora.shallow_copy()
        p.setup_conds()
        for comment in p.sd_model.comments:
            p.comment(comment)
        p.sample(
            conditioning=p.c,
            unconditional_conditioning=p.uc,
            seeds=[],
            subseeds=[],
            subseed_strength=0.0,
            prompts=p.prompts,
        )
        if p.scripts is not None:
            p.scripts.post_sample(p, None)
    processed = SimpleNamespace(comments="".join(f"{comment}\n" for comment in p.comments))
    if p.scripts is not None:
        p.scripts.postprocess(p, processed)
    return processed
