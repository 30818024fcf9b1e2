"""A generation, as far as text conditioning goes."""

from __future__ import annotations

from typing import Any, ClassVar

from modules import extra_networks, shared
from modules.shared import opts


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
        self.__dict__.update(fields)
        self.scripts = None
        self.comments: dict[str, int] = {}
        self.extra_generation_params: dict[str, Any] = {}
        self.prompts: list[str] = []
        self.negative_prompts: list[str] = []
        self.extra_network_data: Any = None
        self.c = self.uc = None

    @property
    def sd_model(self) -> Any:
        return shared.sd_model

    def comment(self, text: str) -> None:
        self.comments[text] = 1

    def parse_extra_network_prompts(self) -> None:
        self.prompts, self.extra_network_data = extra_networks.parse_prompts(self.prompts)

    def cached_params(
        self,
        required_prompts: Any,
        steps: int,
        extra_network_data: Any,
        hires_steps: int | None = None,
        use_old_scheduling: bool = False,
    ) -> tuple[Any, ...]:
        return (
            required_prompts,
            self.distilled_cfg_scale,
            self.hr_distilled_cfg,
            steps,
            hires_steps,
            use_old_scheduling,
            opts.CLIP_stop_at_last_layers,
            shared.sd_model.sd_checkpoint_info,
            extra_network_data,
            self.width,
            self.height,
        )

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
