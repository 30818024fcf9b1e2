"""The host's merge of patches into one weight, from the definitions of the kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lora_families import DELTAS, decomposed
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
    if kind not in DELTAS:
        return weight
    delta, scale, magnitude = DELTAS[kind](content, weight)
    if delta.numel() == weight.numel():
        delta = delta.reshape(weight.shape)
    elif weight.shape[1] < delta.shape[1]:
        weight = torch.nn.functional.pad(weight, (0, delta.shape[1] - weight.shape[1]))
    else:
        delta = torch.nn.functional.pad(delta, (0, weight.shape[1] - delta.shape[1]))
    if magnitude is None:
        weight += function(strength * scale * delta)
        return weight
    return decomposed(weight, function(scale * delta), strength, magnitude)


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
