"""A host's key map, completed with the names that it lacks (`names/key_map.py`)."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lib_precision_lora.adapters.target import Target
from lib_precision_lora.names.key_map import Shape, more_names


def complete_key_map(
    names: Mapping[str, Any], parameters: Iterable[str], shape_of: Callable[[str], Shape]
) -> dict[str, Any]:
    """A host's key map with the names that it lacks. Those that it has stay, but one, where they lead to rows
    that there are.

    parameters: as in `named_parameters()` of the host's wrapper, `diffusion_model.…` or `clip_l.…`;
    shape_of: the logical shape of one of them, asked for fused weights alone. `text_encoder.text_projection`
    is CLIP-L's where there is one: hosts give it to CLIP-G, whose width is another.
    """
    known = dict.fromkeys(parameters)
    shape_of = cache(shape_of)
    complete = {name: value for name, value in names.items() if _exists(Target.parse(value), known, shape_of)}
    for name, place in more_names(known, shape_of):
        target = Target(place.parameter, place.rows, swap_halves if place.swapped else None)
        complete.setdefault(name, target.name)
    projection = "clip_l.transformer.text_projection.weight"
    if projection in known:
        complete["text_encoder.text_projection"] = projection
    return complete


def _exists(target: Target, known: Container[str], shape_of: Callable[[str], Shape]) -> bool:
    """Whether there is such a parameter with these rows. Forge Neo gives Lumina 2's keys and values the rows
    that Z-Image's have, and Flux's norms the name that they had."""
    if target.parameter not in known:
        return False
    return target.rows is None or sum(target.rows) <= shape_of(target.parameter)[0]


def swap_halves(rows: Tensor) -> Tensor:
    """`[shift; scale] = swap([scale; shift])`; rows: [2 · n, …]."""
    first, second = rows.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)
