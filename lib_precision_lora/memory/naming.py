"""Which layer of a checkpoint a module of a LoRA file means.

The names that trainers write differ in a prefix, in dots or underscores, and in whose names they are: the
checkpoint's own, or diffusers'. Both are brought to one form, and diffusers' layers are placed in the
checkpoint's, where q, k and v are rows of one weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lib_precision_lora.memory.checkpoint import MODEL, Checkpoint, Component, Layer
from lib_precision_lora.names.unet import OUTSIDE, RESNET, unet_blocks

MODEL_PREFIXES = re.compile(
    r"^(base_model[._]model[._]|base_model[._])?(lora_unet_|lora_transformer_|lycoris_)?"
    r"(model\.)?(diffusion_model[._]|unet\.|transformer\.)?"
)
TEXT_PREFIXES = re.compile(r"^(?:base_model\.model\.)?(?:lora_te|text_encoders?[._]?)(\d?)[._]")

FLUX_DOUBLE: Mapping[str, str] = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "processor.qkv_lora1": "img_attn.qkv",
    "processor.qkv_lora2": "txt_attn.qkv",
    "processor.proj_lora1": "img_attn.proj",
    "processor.proj_lora2": "txt_attn.proj",
}
"""Layers of a double block under other names (diffusers', and XLabs' processors) → in the checkpoint."""

FLUX_FUSED: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""A fused layer of a double block → the parts of equal height that diffusers makes of it."""

FLUX_SINGLE_PARTS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
"""The rows of a single block's `linear1`, in order; the first three are as high as it is wide."""

FLUX_OUTSIDE: Mapping[str, str] = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Rows [start, stop) of a layer of a component."""

    component: str
    layer: Layer
    start: int
    stop: int


class Places:
    """Finds the place that a name means; made once per checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._components = checkpoint.components
        model = checkpoint.model
        self._model = {
            canonical(name): Place(MODEL, layer, start, stop)
            for name, layer, start, stop in _model_names(model, checkpoint.architecture.family)
        }
        self._text = {
            name: {canonical(_below_transformer(layer.name)): layer for layer in component.layers}
            for name, component in checkpoint.components.items()
            if name != MODEL
        }

    def find(self, name: str) -> Place | None:
        """name: of a module in a LoRA file; None where no layer of this checkpoint is known by it."""
        number = text_encoder(name)
        if number is None:
            return self._model.get(canonical(name[MODEL_PREFIXES.match(name).end() :]))  # type: ignore[union-attr]
        wanted = canonical(_below_transformer(TEXT_PREFIXES.sub("", name)))
        for component in _text_components(number):
            layer = self._text.get(component, {}).get(wanted)
            if layer is not None:
                return Place(component, layer, 0, layer.rows)
        return None


def text_encoder(name: str) -> str | None:
    """The number in the name of a text encoder's module ("" where it has none); None for other modules."""
    match = TEXT_PREFIXES.match(name)
    return None if match is None else match[1]


def canonical(name: str) -> str:
    """One form for dots and underscores, with and without `processor`, `to_out` as `to_out.0`."""
    name = name.replace(".", "_").replace("_processor_to_", "_to_")
    return f"{name}_0" if name.endswith("_to_out") else name


def _below_transformer(name: str) -> str:
    return re.sub(r"^(transformer[._])?(text_model[._])?", "", name)


def _text_components(number: str) -> tuple[str, ...]:
    """`lora_te2` is the second encoder: CLIP-G of SDXL, T5 of Flux; `lora_te` and `lora_te1` the first."""
    if number in ("", "1"):
        return ("CLIP-L", "CLIP-H", "CLIP-G")
    return ("T5",) if number == "3" else ("CLIP-G", "T5")


def _model_names(model: Component, family: str) -> Iterator[tuple[str, Layer, int, int]]:
    """Every known name of every layer of the diffusion model, with the rows that it means."""
    for layer in model.layers:
        yield layer.name, layer, 0, layer.rows
    if family == "UNet":
        yield from _unet_names(model)
    elif family == "Flux":
        for layer in model.layers:
            yield from _flux_names(layer)


def _unet_names(model: Component) -> Iterator[tuple[str, Layer, int, int]]:
    blocks = sorted(unet_blocks(model.tensors), key=lambda block: -len(block.name))
    for layer in model.layers:
        if layer.name in OUTSIDE:
            for name in OUTSIDE[layer.name]:
                yield name, layer, 0, layer.rows
            continue
        for block in blocks:
            if layer.name == block.name or layer.name.startswith(f"{block.name}."):
                part = layer.name[len(block.name) + 1 :]
                yield ".".join(filter(None, (block.diffusers, RESNET.get(part, part)))), layer, 0, layer.rows
                break


def _flux_names(layer: Layer) -> Iterator[tuple[str, Layer, int, int]]:
    for name in _other_names(layer.name, FLUX_OUTSIDE):
        yield name, layer, 0, layer.rows
    match = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", layer.name)
    if match is None:
        return
    kind, number, part = match.groups()
    if kind == "double":
        for owner in (f"transformer_blocks.{number}", f"double_blocks.{number}"):
            for name in _other_names(part, FLUX_DOUBLE):
                yield f"{owner}.{name}", layer, 0, layer.rows
            yield from _rows(layer, owner, FLUX_FUSED.get(part, ()), layer.rows // 3)
        return
    for owner in (f"single_transformer_blocks.{number}", f"single_blocks.{number}"):
        if part == "linear1":
            yield from _rows(layer, owner, FLUX_SINGLE_PARTS, layer.columns)
            yield f"{owner}.processor.qkv_lora", layer, 0, 3 * layer.columns
        elif part == "linear2":
            yield f"{owner}.proj_out", layer, 0, layer.rows
            yield f"{owner}.processor.proj_lora", layer, 0, layer.rows
        elif part == "modulation.lin":
            yield f"{owner}.norm.linear", layer, 0, layer.rows


def _other_names(wanted: str, table: Mapping[str, str]) -> list[str]:
    return [other for other, own in table.items() if own == wanted]


def _rows(
    layer: Layer, owner: str, parts: Iterable[str], height: int
) -> Iterator[tuple[str, Layer, int, int]]:
    """Parts of `height` rows each, one below the other; the last takes what is left."""
    names = tuple(parts)
    for index, part in enumerate(names):
        stop = layer.rows if index == len(names) - 1 else (index + 1) * height
        yield f"{owner}.{part}", layer, index * height, stop
