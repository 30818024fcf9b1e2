"""Names that a host's key map lacks, made from the model's own parameters.

Trainers that save diffusers' names split what MMDiT models fuse, q, k and v above all: such a name means
some rows of a parameter, and in the places where diffusers has scale before shift, rows in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lib_precision_lora.adapters.mmdit_names import Part, mmdit_parts
from lib_precision_lora.adapters.target import Target

Shape = tuple[int, ...]

CLIP_PREFIXES = {
    "clip_l": ("lora_te1_", "lora_te_"),
    "clip_h": ("lora_te1_", "lora_te_"),
    "clip_g": ("lora_te2_",),
    "t5xxl": ("lora_te3_", "lora_te_"),
}
"""The host's name of a text encoder → under which prefixes files know its modules."""


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
    for parameter in known:
        for name, target in _more_names(parameter, known, shape_of):
            complete.setdefault(name, target)
    projection = "clip_l.transformer.text_projection.weight"
    if projection in known:
        complete["text_encoder.text_projection"] = projection
    return complete


def _more_names(
    parameter: str, known: list[str], shape_of: Callable[[str], Shape]
) -> Iterator[tuple[str, Target | str]]:
    module, _, attribute = parameter.rpartition(".")
    if attribute not in ("weight", "scale"):
        return
    root, _, path = module.partition(".")
    if root == "diffusion_model":
        if attribute == "scale":
            yield f"lora_unet_{path.replace('.', '_')}", parameter
        for part in mmdit_parts(path, known):
            target = _target(parameter, part, shape_of)
            for name in part.names:
                yield name, target
    elif root in CLIP_PREFIXES and path.startswith("transformer."):
        flat = path.removeprefix("transformer.").replace(".", "_")
        prefixes = CLIP_PREFIXES[root]
        if root == "clip_g" and not any(name.startswith("clip_l.") for name in known):
            prefixes += ("lora_te_",)
        for prefix in prefixes:
            yield prefix + flat, parameter


def _target(parameter: str, part: Part, shape_of: Callable[[str], Shape]) -> Target:
    rows = None
    if part.of:
        shape = shape_of(parameter)
        width = shape[0] // 3 if part.of == 3 else shape[1]
        length = width if part.index < 3 else shape[0] - 3 * width
        rows = (part.index * width, length)
    return Target(parameter, rows, swap_halves if part.swapped else None)


def swap_halves(rows: Tensor) -> Tensor:
    """`[shift; scale] = swap([scale; shift])`; rows: [2 · n, …]."""
    first, second = rows.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)
