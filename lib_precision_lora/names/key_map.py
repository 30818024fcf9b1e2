"""Names that a host's key map lacks, made from the model's own parameters.

Trainers that save diffusers' names split what MMDiT models fuse, q, k and v above all: such a name means
some rows of a parameter, and in the places where diffusers has scale before shift, rows in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from lib_precision_lora.names.mmdit import Part, mmdit_parts

Shape = tuple[int, ...]

CLIP_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "clip_l": ("lora_te1_", "lora_te_"),
    "clip_h": ("lora_te1_", "lora_te_"),
    "clip_g": ("lora_te2_",),
    "t5xxl": ("lora_te3_", "lora_te_"),
}
"""The host's name of a text encoder → under which prefixes files know its modules."""

INPUT_LAYERS = ("img_in.weight", "input_blocks.0.0.weight")
"""Where a file may have another number of input channels than the checkpoint, as control LoRAs do; anywhere
else that is the sign of another model."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows (start, length) of a parameter, all of them where rows is None; swapped: the file has the two
    halves of the rows in the other order."""

    parameter: str
    rows: tuple[int, int] | None = None
    swapped: bool = False


def more_names(
    parameter: str, known: Collection[str], shape_of: Callable[[str], Shape]
) -> Iterator[tuple[str, Rows]]:
    """Names by which files know a parameter, or some of its rows, beside those of every host.

    parameter: as in `named_parameters()` of the host's wrapper, `diffusion_model.…` or `clip_l.…`; known:
    all of them; shape_of: the logical shape of one, asked for fused weights alone.
    """
    module, _, attribute = parameter.rpartition(".")
    if attribute not in ("weight", "scale"):
        return
    root, _, path = module.partition(".")
    if root == "diffusion_model":
        if attribute == "scale":
            yield f"lora_unet_{path.replace('.', '_')}", Rows(parameter)
        for part in mmdit_parts(path, known):
            rows = _rows(parameter, part, shape_of)
            for name in part.names:
                yield name, rows
    elif root in CLIP_PREFIXES and path.startswith("transformer."):
        flat = path.removeprefix("transformer.").replace(".", "_")
        prefixes = CLIP_PREFIXES[root]
        if root == "clip_g" and not any(name.startswith("clip_l.") for name in known):
            prefixes += ("lora_te_",)
        for prefix in prefixes:
            yield prefix + flat, Rows(parameter)


def _rows(parameter: str, part: Part, shape_of: Callable[[str], Shape]) -> Rows:
    if not part.of:
        return Rows(parameter, swapped=part.swapped)
    shape = shape_of(parameter)
    width = shape[0] // 3 if part.of == 3 else shape[1]
    length = width if part.index < 3 else shape[0] - 3 * width
    return Rows(parameter, (part.index * width, length), part.swapped)
