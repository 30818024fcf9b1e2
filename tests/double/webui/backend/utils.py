"""Attributes by dotted path, parameters from tensors, files to state dicts."""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn


def load_torch_file(ckpt: str, safe_load: bool = False, device: Any = None) -> dict[str, Tensor]:
    if ckpt.lower().endswith(".safetensors"):
        return safetensors.torch.load_file(ckpt)
    content = torch.load(ckpt, map_location="cpu", weights_only=safe_load)
    return content.get("state_dict", content)


def get_attr(obj: Any, attr: str) -> Any:
    for name in attr.split("."):
        obj = getattr(obj, name)
    return obj


def get_attr_with_parent(obj: Any, attr: str) -> tuple[Any, str, Any]:
    path, _, name = attr.rpartition(".")
    parent = get_attr(obj, path) if path else obj
    return parent, name, getattr(parent, name)


def set_attr_raw(obj: Any, attr: str, value: Any) -> None:
    parent, name, _ = get_attr_with_parent(obj, attr)
    setattr(parent, name, value)


def tensor2parameter(x: Tensor) -> nn.Parameter:
    return x if isinstance(x, nn.Parameter) else nn.Parameter(x, requires_grad=False)
