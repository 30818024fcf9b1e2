"""The patcher of a diffusion model."""

from __future__ import annotations

from typing import Any

from backend.patcher.base import ModelPatcher


class UnetPatcher(ModelPatcher):
    """Brings other models along while it samples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra_preserved_memory_during_sampling = 0
        self.extra_model_patchers_during_sampling: list[ModelPatcher] = []

    def clone(self) -> ModelPatcher:
        other = super().clone()
        assert isinstance(other, UnetPatcher)
        other.extra_preserved_memory_during_sampling = self.extra_preserved_memory_during_sampling
        other.extra_model_patchers_during_sampling = self.extra_model_patchers_during_sampling.copy()
        return other
