"""One generation, in the order in which the host takes its steps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lib_precision_lora.host.page import script
from tests.host.checkpoints import PICTURE, TOKENS, Checkpoint
from tests.host.webui import Host


@dataclass(frozen=True, eq=False)
class Image:
    """values: the last pass's output; passes: that of each; comments: below it; parameters: its infotext."""

    passes: tuple[Tensor, ...]
    comments: tuple[str, ...]
    parameters: dict[str, Any]

    @property
    def values(self) -> Tensor:
        return self.passes[-1]


def load_checkpoint(host: Host, make: Callable[[], Checkpoint]) -> Checkpoint:
    """As the host does: the present one is let go first."""
    data = host.sd_models.model_data
    if data.sd_model:
        data.sd_model = None
        host.memory.unload_all_models()
        host.memory.soft_empty_cache()
        gc.collect()
    checkpoint = make()
    data.set_sd_model(checkpoint)
    data.forge_loading_parameters = {"checkpoint_info": checkpoint.sd_checkpoint_info}
    return checkpoint


def generate(
    host: Host,
    prompt: str,
    *,
    hires_prompt: str | None = None,
    refiner: Callable[[], Checkpoint] | None = None,
    before_sampling: Callable[[Any], None] | None = None,
    between_steps: Callable[[Any], None] | None = None,
    activate: bool = True,
) -> Image:
    """An image from the current checkpoint.

    hires_prompt: of a second pass; refiner: loads another checkpoint between two steps; before_sampling:
    what an extension does in `process_before_every_sampling`, given the checkpoint; between_steps: what one
    does while sampling. activate: False where the user has disabled extra networks.
    """
    p = host.processing.StableDiffusionProcessingTxt2Img(prompt=prompt, steps=2)
    with torch.inference_mode():
        host.current.comments, host.current.extra_generation_params = [], {}
        host.current.forge_objects = host.current.forge_objects_original.shallow_copy()
        p.prompts, p.negative_prompts = [prompt], [""]
        p.parse_extra_network_prompts()
        if activate:
            host.extra_networks.activate(p, p.extra_network_data)
        host.current.forge_objects = host.current.forge_objects_after_applying_lora.shallow_copy()
        p.setup_conds()
        p.extra_generation_params.update(host.current.extra_generation_params)
        for comment in host.current.comments:
            p.comment(comment)
        script.show_notices(p)
        passes = [_sample(host, context_of(p.c), before_sampling, between_steps)]
        if refiner is not None:
            load_checkpoint(host, refiner)
            host.extra_networks.activate(p, p.extra_network_data)
            p.setup_conds()
            passes.append(_sample(host, context_of(p.c), None, None, fresh=False))
        if hires_prompt is not None:
            prompts, networks = host.extra_networks.parse_prompts([hires_prompt])
            host.extra_networks.activate(p, networks)
            conditioning = p.get_conds_with_caching(
                _conditioning, prompts, p.steps, [p.cached_hr_c, p.cached_c], networks, 4
            )
            script.show_notices(p)
            passes.append(_sample(host, conditioning[0], before_sampling, between_steps))
        script.show_notices(p)
    script.show_late_notices(p, SimpleNamespace(comments=""))
    return Image(tuple(passes), tuple(p.comments), p.extra_generation_params)


def _sample(
    host: Host,
    context: Tensor,
    before_sampling: Callable[[Any], None] | None,
    between_steps: Callable[[Any], None] | None,
    fresh: bool = True,
) -> Tensor:
    checkpoint = host.current
    if fresh:
        checkpoint.forge_objects = checkpoint.forge_objects_after_applying_lora.shallow_copy()
    if before_sampling is not None:
        before_sampling(checkpoint)
    unet = checkpoint.forge_objects.unet
    host.samplers.sampling_prepare(unet, x=PICTURE)
    if between_steps is not None:
        unet.model.diffusion_model(TOKENS, PICTURE, context)
        between_steps(checkpoint)
    output = unet.model.diffusion_model(TOKENS, PICTURE, context)
    host.samplers.sampling_cleanup(unet)
    return output.clone()


def _conditioning(model: Any, prompts: Any, *_: Any) -> list[Tensor]:
    return model.get_learned_conditioning(prompts)


def context_of(conditioning: Any) -> Tensor:
    """The vector of the one prompt: as it is in the double, in the host's schedules in the real one."""
    if isinstance(conditioning, list):
        return conditioning[0]
    return conditioning.batch[0][0].schedules[0].cond


def distance(image: Image, exact: Tensor) -> float:
    """`‖y − exact‖ / ‖exact‖`."""
    return float((image.values.double() - exact).norm() / exact.norm())
