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


def set_attr(obj: Any, attr: str, value: Tensor) -> None:
    set_attr_raw(obj, attr, nn.Parameter(value, requires_grad=False))


def get_state_dict_after_quant(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Copies, so that tensors which stand at several places can be saved."""
    return {prefix + name: value.clone() for name, value in model.state_dict().items()}


def tensor2parameter(x: Tensor) -> nn.Parameter:
    return x if isinstance(x, nn.Parameter) else nn.Parameter(x, requires_grad=False)


def nested_compute_size(obj: Any, element_size: int) -> int:
    if isinstance(obj, dict):
        return sum(nested_compute_size(value, element_size) for value in obj.values())
    if isinstance(obj, (list, tuple)):
        return sum(nested_compute_size(value, element_size) for value in obj)
    return obj.nelement() * element_size if isinstance(obj, torch.Tensor) else 0


def nested_move_to_device(obj: Any, **kwargs: Any) -> Any:
    """Lists and dictionaries are changed in place; of a tuple a plain one is made."""
    if isinstance(obj, dict):
        for key in obj:
            obj[key] = nested_move_to_device(obj[key], **kwargs)
    elif isinstance(obj, list):
        for index in range(len(obj)):
            obj[index] = nested_move_to_device(obj[index], **kwargs)
    elif isinstance(obj, tuple):
        return tuple(nested_move_to_device(value, **kwargs) for value in obj)
    elif isinstance(obj, torch.Tensor):
        return obj.to(**kwargs)
    return obj
