"""Around every sampling: the diffusion model, and what it brings along, are loaded."""

from __future__ import annotations

from typing import Any

from backend import memory_management, utils
from torch import Tensor


def sampling_prepare(unet: Any, x: Tensor) -> None:
    preserved = unet.extra_preserved_memory_during_sampling
    dtype = unet.model.computation_dtype
    if unet.has_online_lora():
        preserved += utils.nested_compute_size(unet.lora_patches, dtype.itemsize)
    memory_management.load_models_gpu(
        models=[unet, *unet.extra_model_patchers_during_sampling],
        memory_required=unet.memory_required([2 * x.shape[0], *x.shape[1:]]),
        hard_memory_preservation=preserved,
    )
    if unet.has_online_lora():
        utils.nested_move_to_device(unet.lora_patches, device=unet.current_device, dtype=dtype)


def sampling_cleanup(unet: Any) -> None:
    if unet.has_online_lora():
        utils.nested_move_to_device(unet.lora_patches, device=unet.offload_device)
