"""Around every sampling: the diffusion model, and what it brings along, are loaded."""

from __future__ import annotations

from typing import Any

from backend import memory_management, utils
from torch import Tensor


def sampling_prepare(unet: Any, x: Tensor) -> None:
    required = unet.memory_required([2 * x.shape[0], *x.shape[1:]])
    more = unet.extra_preserved_memory_during_sampling
    if unet.has_online_lora():
        more += utils.nested_compute_size(unet.patches, unet.model.computation_dtype.itemsize)
    memory_management.load_models_gpu(
        models=[unet, *unet.extra_model_patchers_during_sampling],
        memory_required=required + more,
        minimum_memory_required=required // 2 + more,
    )


def sampling_cleanup(unet: Any) -> None:
    memory_management.soft_empty_cache()
