"""By what text conditioning is cached."""

from __future__ import annotations

from typing import Any

from modules import sd_models, shared


def cached_params(
    self: Any, required_prompts: Any, steps: int, extra_network_data: Any, hires_steps: int | None
) -> tuple[Any, ...]:
    return (
        required_prompts,
        steps,
        hires_steps,
        extra_network_data,
        self.width,
        self.height,
        self.distilled_cfg_scale,
        self.hr_distilled_cfg,
        str(sd_models.model_data.forge_loading_parameters),
        shared.opts.CLIP_stop_at_last_layers,
    )
