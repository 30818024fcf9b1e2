"""By what text conditioning is cached."""

from __future__ import annotations

from typing import Any

from modules import shared


def cached_params(
    self: Any,
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
        shared.opts.CLIP_stop_at_last_layers,
        shared.sd_model.sd_checkpoint_info,
        extra_network_data,
        self.width,
        self.height,
    )
