"""A host's key map, completed with the names that it lacks (`names/key_map.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lib_precision_lora.adapters.target import Target
from lib_precision_lora.names.key_map import Shape, more_names


def complete_key_map(
    names: Mapping[str, Any], parameters: Iterable[str], shape_of: Callable[[str], Shape]
) -> dict[str, Any]:
    """A host's key map with the names that it lacks; those that it has stay, but one.

    parameters: as in `named_parameters()` of the host's wrapper, `diffusion_model.…` or `clip_l.…`;
    shape_of: the logical shape of one of them, asked for fused weights alone. `text_encoder.text_projection`
    is CLIP-L's where there is one: hosts give it to CLIP-G, whose width is another.
    """
    known = list(parameters)
    complete = dict(names)
    for name, place in more_names(known, shape_of):
        target = Target(place.parameter, place.rows, swap_halves if place.swapped else None)
        complete.setdefault(name, target.name)
    projection = "clip_l.transformer.text_projection.weight"
    if projection in known:
        complete["text_encoder.text_projection"] = projection
    return complete


def swap_halves(rows: Tensor) -> Tensor:
    """`[shift; scale] = swap([scale; shift])`; rows: [2 · n, …]."""
    first, second = rows.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)
