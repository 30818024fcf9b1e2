"""Under which names files know the parameters of a model.

A host knows a part of them, its own key map; the rest is made from the model's parameters. Trainers that save
diffusers' names split what MMDiT models fuse, q, k and v above all: such a name means some rows of a
parameter, and in the places where diffusers has scale before shift, rows in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from lib_precision_lora.names.mmdit import LINEAR1, Part, joint_blocks
from lib_precision_lora.names.models import DENOISER, model_of
from lib_precision_lora.names.text_encoders import language_model_names
from lib_precision_lora.names.transformers import transformer_parts
from lib_precision_lora.names.unet import diffusers_names, unet_blocks

Shape = tuple[int, ...]

CLIP_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "clip_l": ("lora_te1_", "lora_te_"),
    "clip_h": ("lora_te1_", "lora_te_"),
    "clip_g": ("lora_te2_",),
    "t5xxl": ("lora_te3_", "lora_te_"),
}
"""The host's name of a text encoder → under which prefixes files know its modules."""

_SCALED_NORMS = (".query_norm", ".key_norm")
"""Norms whose weight Flux's authors, and control LoRAs, call a scale, whatever the host does."""

_INPUT_LAYERS = ("img_in", "input_blocks.0.0")


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows (start, length) of a parameter, all of them where rows is None; swapped: the file has the two
    halves of the rows in the other order."""

    parameter: str
    rows: tuple[int, int] | None = None
    swapped: bool = False


def is_input_layer(name: str) -> bool:
    """Whether a file may have another number of input channels than this layer or weight, as control LoRAs
    do; anywhere else that is the sign of another model."""
    return name.removesuffix(".weight").endswith(_INPUT_LAYERS)


def every_name(parameters: Collection[str], shape_of: Callable[[str], Shape]) -> Iterator[tuple[str, Rows]]:
    """Every name that is known, a host's own first; arguments as for `more_names`."""
    inside = [parameter.removeprefix(DENOISER) for parameter in parameters if parameter.startswith(DENOISER)]
    blocks = {block.name: block for block in unet_blocks(inside)}
    for path in inside:
        module, _, attribute = path.rpartition(".")
        if attribute == "weight":
            yield DENOISER + module, Rows(DENOISER + path)
            for name in (module, *diffusers_names(module, blocks)):
                yield f"lora_unet_{_flat(name)}", Rows(DENOISER + path)
        else:
            yield DENOISER + path, Rows(DENOISER + path)
    yield from more_names(parameters, shape_of)


def more_names(parameters: Collection[str], shape_of: Callable[[str], Shape]) -> Iterator[tuple[str, Rows]]:
    """Names by which files know a model's parameters, or some of their rows, beside those of every host.

    parameters: as in `named_parameters()` of the host's wrapper, `diffusion_model.…` or `clip_l.…`;
    shape_of: the logical shape of one of them, asked for fused weights alone.
    """
    inside = [parameter.removeprefix(DENOISER) for parameter in parameters if parameter.startswith(DENOISER)]
    model, joint = model_of(inside), joint_blocks(inside)
    clip_l = any(parameter.startswith("clip_l.") for parameter in parameters)
    for parameter in parameters:
        module, _, attribute = parameter.rpartition(".")
        if attribute not in ("weight", "scale"):
            continue
        root, _, path = module.partition(".")
        if root == "diffusion_model":
            if attribute == "scale":
                yield f"lora_unet_{_flat(path)}", Rows(parameter)
            elif path.endswith(_SCALED_NORMS):
                yield f"{parameter.removesuffix(attribute)}scale", Rows(parameter)
            for part in transformer_parts(model, path, joint):
                rows = _rows(parameter, part, shape_of)
                for name in part.names:
                    yield name, rows
        elif root not in CLIP_PREFIXES:
            for name in language_model_names(root, path):
                yield name, Rows(parameter)
        elif root in CLIP_PREFIXES and path.startswith("transformer."):
            first = ("lora_te_",) if root == "clip_g" and not clip_l else ()
            for prefix in (*CLIP_PREFIXES[root], *first):
                yield prefix + _flat(path.removeprefix("transformer.")), Rows(parameter)


def _rows(parameter: str, part: Part, shape_of: Callable[[str], Shape]) -> Rows:
    if not part.of:
        return Rows(parameter, swapped=part.swapped)
    rows, width = shape_of(parameter)[:2]
    if part.of == len(LINEAR1):
        lengths = [width, width, width, rows - 3 * width]
    else:  # keys and values may be narrower than queries
        lengths = [width, (rows - width) // 2, (rows - width) // 2]
    return Rows(parameter, (sum(lengths[: part.index]), lengths[part.index]), part.swapped)


def _flat(path: str) -> str:
    return path.replace(".", "_")
