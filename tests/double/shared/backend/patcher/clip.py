"""The text encoders of a checkpoint, with their patcher."""

from __future__ import annotations

from typing import Any

from backend import memory_management
from backend.patcher.base import ModelPatcher
from torch import nn


class JointTextEncoder(nn.Module):
    """Encoders by name."""

    def __init__(self, module_dict: Any) -> None:
        super().__init__()
        for name, module in module_dict.items():
            self.add_module(name, module)


class CLIP:
    """Clones share the encoders."""

    def __init__(self, model_dict: Any = {}, tokenizer_dict: Any = {}, no_init: bool = False) -> None:  # noqa: B006
        if no_init:
            return
        self.cond_stage_model = JointTextEncoder(model_dict)
        self.tokenizer = dict(tokenizer_dict)
        self.patcher = ModelPatcher(
            self.cond_stage_model,
            load_device=memory_management.text_encoder_device(),
            offload_device=memory_management.text_encoder_offload_device(),
        )

    def clone(self) -> CLIP:
        other = CLIP(no_init=True)
        other.patcher = self.patcher.clone()
        other.cond_stage_model = self.cond_stage_model
        other.tokenizer = self.tokenizer
        return other

    def add_patches(self, *args: Any, **kwargs: Any) -> set[Any]:
        return self.patcher.add_patches(*args, **kwargs)
