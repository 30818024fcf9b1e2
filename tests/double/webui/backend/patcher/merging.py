"""The host's merge of patches into one weight, from the definitions of the kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

extra_weight_calculators: dict[str, Callable[[Tensor, float, Any], Tensor]] = {}


@torch.inference_mode()
def merge_lora_to_weight(
    patches: Any, weight: Tensor, key: str = "online_lora", computation_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Every patch `[strength, value, base factor, offset, function]` in turn, in the weight's type."""
    stored_type = weight.dtype
    weight = weight.to(computation_dtype, copy=True)
    for strength, value, base_factor, offset, function in patches:
        part = weight if offset is None else weight.narrow(*offset)
        if base_factor != 1.0:
            part *= base_factor
        kind, content = ("diff", value) if len(value) == 1 else value
        after = _merged(kind, content, part, strength, function or (lambda rows: rows))
        if offset is None:
            weight = after
    return weight.to(stored_type)


def _merged(
    kind: str, content: Any, weight: Tensor, strength: float, function: Callable[[Tensor], Tensor]
) -> Tensor:
    if kind == "diff":
        return _add_diff(content[0].to(weight), weight, strength)
    if kind == "set":
        return weight.copy_(content[0])
    if kind in extra_weight_calculators:
        return extra_weight_calculators[kind](weight, strength, content)
    if kind not in _DELTAS:
        return weight
    delta, scale, magnitude = _DELTAS[kind](content, weight)
    if delta.numel() == weight.numel():
        delta = delta.reshape(weight.shape)
    elif weight.shape[1] < delta.shape[1]:
        weight = torch.nn.functional.pad(weight, (0, delta.shape[1] - weight.shape[1]))
    else:
        delta = torch.nn.functional.pad(delta, (0, weight.shape[1] - delta.shape[1]))
    if magnitude is None:
        weight += function(strength * scale * delta)
        return weight
    merged = weight + function(scale * delta)
    norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    weight += strength * (merged * (magnitude.to(weight).reshape(norm.shape) / norm) - weight)
    return weight


def _add_diff(value: Tensor, weight: Tensor, strength: float) -> Tensor:
    """A convolution widens to hold a larger tensor; another misfit is passed over."""
    if strength == 0.0:
        return weight
    if value.shape == weight.shape:
        weight += strength * value
        return weight
    if not value.ndim == weight.ndim == 4:
        return weight
    wide = torch.zeros([max(sizes) for sizes in zip(weight.shape, value.shape, strict=True)]).to(weight)
    for tensor, factor in ((weight, 1.0), (value, strength)):
        wide[tuple(slice(size) for size in tensor.shape)] += factor * tensor
    return wide


def _lora(content: Any, weight: Tensor) -> tuple[Tensor, float, Tensor | None]:
    up, down, alpha, _, magnitude = content
    delta = up.to(weight).flatten(1) @ down.to(weight).flatten(1)
    return delta, 1.0 if alpha is None else alpha / down.shape[0], magnitude


def _loha(content: Any, weight: Tensor) -> tuple[Tensor, float, Tensor | None]:
    first_up, first_down, alpha, second_up, second_down, _, _, magnitude = content
    delta = (first_up.to(weight) @ first_down.to(weight)) * (second_up.to(weight) @ second_down.to(weight))
    return delta, 1.0 if alpha is None else alpha / first_down.shape[0], magnitude


def _lokr(content: Any, weight: Tensor) -> tuple[Tensor, float, Tensor | None]:
    first, second, *_, magnitude = content
    return torch.kron(first.to(weight), second.to(weight)), 1.0, magnitude


_DELTAS = {"lora": _lora, "loha": _loha, "lokr": _lokr}
"""Kind → (ΔW, its scale, a DoRA's magnitude)."""
