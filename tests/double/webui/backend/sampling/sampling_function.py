"""Around every sampling: the diffusion model, and what it brings along, are loaded."""

from __future__ import annotations

from typing import Any

from backend import memory_management
from torch import Tensor


def sampling_prepare(unet: Any, x: Tensor) -> None:
    memory_management.load_models_gpu(
        models=[unet, *unet.extra_model_patchers_during_sampling],
        memory_required=unet.memory_required([2 * x.shape[0], *x.shape[1:]]),
        hard_memory_preservation=unet.extra_preserved_memory_during_sampling,
    )


def sampling_cleanup(unet: Any) -> None:
    """Nothing here holds anything after sampling."""
