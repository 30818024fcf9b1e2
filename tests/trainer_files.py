"""LoRA files in the layouts of today's trainers, on every layer that a layout has a name for, with what they
add in float64.

Facts from the trainers' own code: kohya-ss/sd-scripts (networks/), KohakuBlueleaf/LyCORIS (wrapper.py,
kohya.py), bghira/SimpleTuner, Nerogar/OneTrainer (modules/util/convert_lora_util.py, and its former
modules/util/convert/lora), ostris/ai-toolkit (toolkit/network_mixins.py), XLabs-AI/x-flux, black-forest-labs'
own LoRAs, huggingface/diffusers (loaders/lora_conversion_utils.py), kohya-ss/musubi-tuner (networks/,
convert_lora.py), modelscope/DiffSynth-Studio (examples/*/model_training).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.trainer_names import Place, Places

RANK, ALPHA = 2, 3.0
Name = Callable[[str], str | None]
"""A layer's path → its name in a file; None where the layout has none."""


@dataclass(frozen=True, slots=True)
class Layout:
    """paths: whose names it starts from, "diffusers", "authors", "omi" or "fused"; name: what it makes of
    them; writer: which tensors stand behind a name; norms: whether it trains them."""

    paths: str
    name: Name
    writer: str
    norms: bool = False


ENDINGS: Mapping[str, tuple[str, str, bool]] = {
    "kohya": (".lora_up.weight", ".lora_down.weight", True),
    "PEFT": (".lora_B.weight", ".lora_A.weight", False),
    "PEFT with alpha": (".lora_B.weight", ".lora_A.weight", True),
    "PEFT default": (".lora_B.default.weight", ".lora_A.default.weight", False),
    "PEFT default_0": (".lora_B.default_0.weight", ".lora_A.default_0.weight", False),
    "diffusers": (".lora.up.weight", ".lora.down.weight", False),
    "processors": ("_lora.up.weight", "_lora.down.weight", False),
    "text encoder": (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", False),
    "XLabs": (".up.weight", ".down.weight", False),
}
"""writer → endings of up and down, and whether there is an alpha."""


def flat(prefix: str) -> Name:
    return lambda path: prefix + path.replace(".", "_")


def dotted(prefix: str) -> Name:
    return lambda path: prefix + path


def processors(prefix: str) -> Name:
    """Early diffusers: attention alone, through a processor, the output projection without its number."""

    def name(path: str) -> str | None:
        match = re.fullmatch(r"(.*\.attn[12])\.(to_[qkv]|to_out)(?:\.0)?", path)
        return f"{prefix}{match[1]}.processor.{match[2]}" if match else None

    return name


def old_text_encoder(path: str) -> str | None:
    """Early diffusers on CLIP: attention alone, called as in the U-Net."""
    match = re.fullmatch(r"(.*\.self_attn)\.(q|k|v|out)_proj", path)
    return f"text_encoder.{match[1]}.to_{match[2]}" if match else None


def xlabs(path: str) -> str | None:
    """q, k and v together, and the projection after attention; of single blocks the whole second layer."""
    names = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2"}
    names |= {"img_attn.proj": "proj_lora1", "txt_attn.proj": "proj_lora2"}
    names |= {"linear1": "qkv_lora", "linear2": "proj_lora"}
    match = re.fullmatch(r"((?:double|single)_blocks\.\d+)\.(.+)", path)
    if match is None or match[2] not in names:
        return None
    return f"{match[1]}.processor.{names[match[2]]}"


UNET_LAYOUTS: Mapping[str, Layout] = {
    "kohya": Layout("diffusers", flat("lora_unet_"), "kohya"),
    "kohya, SDXL": Layout("authors", flat("lora_unet_"), "kohya"),
    "LyCORIS by kohya": Layout("diffusers", flat("lora_unet_"), "LoKr", norms=True),
    "LyCORIS alone, SimpleTuner": Layout("diffusers", flat("lycoris_"), "LoKr", norms=True),
    "LyCORIS, dotted": Layout("diffusers", dotted("lycoris."), "LoKr"),
    "PEFT": Layout("diffusers", dotted("base_model.model."), "PEFT default"),
    "diffusers with PEFT": Layout("diffusers", dotted("unet."), "PEFT"),
    "diffusers with PEFT, wrapped": Layout("diffusers", dotted("unet.base_model.model."), "PEFT"),
    "diffusers, its second layout": Layout("diffusers", dotted("unet."), "diffusers"),
    "diffusers, attention processors": Layout("diffusers", processors("unet."), "processors"),
    "diffusers, bare attention processors": Layout("diffusers", processors(""), "processors"),
    "OneTrainer, full names": Layout("diffusers", dotted("unet."), "kohya"),
    "OneTrainer for ComfyUI": Layout("authors", dotted("diffusion_model."), "PEFT with alpha"),
    "OneTrainer, OMI": Layout("authors", dotted("unet."), "kohya"),
}
TRANSFORMER_LAYOUTS: Mapping[str, Layout] = {
    "kohya": Layout("authors", flat("lora_unet_"), "kohya"),
    "LyCORIS by kohya": Layout("authors", flat("lora_unet_"), "LoKr", norms=True),
    "diffusers, SimpleTuner, ai-toolkit": Layout("diffusers", dotted("transformer."), "PEFT"),
    "PEFT": Layout("diffusers", dotted("base_model.model."), "PEFT default"),
    "PEFT in diffusers": Layout("diffusers", dotted("transformer."), "PEFT default_0"),
    "diffusers, bare": Layout("diffusers", dotted(""), "PEFT"),
    "LyCORIS alone, SimpleTuner": Layout("diffusers", flat("lycoris_"), "LoKr", norms=True),
    "LyCORIS, dotted": Layout("diffusers", dotted("lycoris."), "LoKr"),
    "ai-toolkit, LoKr": Layout("diffusers", dotted("transformer."), "LoKr", norms=True),
    "OneTrainer": Layout("diffusers", flat("lora_transformer_"), "kohya"),
    "OneTrainer, full names": Layout("diffusers", dotted("transformer."), "kohya"),
    "OneTrainer for ComfyUI": Layout("authors", dotted("diffusion_model."), "PEFT with alpha"),
    "OneTrainer, fused": Layout("fused", dotted("transformer."), "kohya"),
    "OneTrainer, OMI": Layout("omi", dotted("transformer."), "kohya"),
    "authors' names": Layout("authors", dotted(""), "PEFT"),
    "authors' names, wrapped": Layout("authors", dotted("base_model.model."), "PEFT"),
    "authors' names, ai-toolkit": Layout("authors", dotted("diffusion_model."), "PEFT"),
}
FLUX_LAYOUTS: Mapping[str, Layout] = {
    **TRANSFORMER_LAYOUTS,
    "XLabs": Layout("authors", xlabs, "XLabs"),
    "XLabs for ComfyUI": Layout(
        "authors", lambda path: None if xlabs(path) is None else f"diffusion_model.{xlabs(path)}", "XLabs"
    ),
}


def comfy(encoder: str) -> Layout:
    return Layout("authors", dotted(f"text_encoders.{encoder}.transformer."), "PEFT with alpha")


CLIP_L_LAYOUTS: Mapping[str, Layout] = {
    "kohya, SD 1.5": Layout("authors", flat("lora_te_"), "kohya"),
    "kohya": Layout("authors", flat("lora_te1_"), "kohya"),
    "LyCORIS by kohya": Layout("authors", flat("lora_te1_"), "LoKr", norms=True),
    "LyCORIS alone": Layout("authors", flat("lycoris_"), "LoKr", norms=True),
    "diffusers with PEFT": Layout("authors", dotted("text_encoder."), "PEFT"),
    "PEFT": Layout("authors", dotted("base_model.model."), "PEFT default"),
    "diffusers, its second layout": Layout("authors", dotted("text_encoder."), "text encoder"),
    "diffusers, attention processors": Layout("authors", old_text_encoder, "processors"),
    "OneTrainer, full names": Layout("authors", dotted("text_encoder."), "kohya"),
    "OneTrainer for ComfyUI": Layout(
        "authors", dotted("text_encoders.clip_l.transformer."), "PEFT with alpha"
    ),
    "OneTrainer, OMI": Layout("authors", dotted("clip_l."), "kohya"),
}
CLIP_G_LAYOUTS: Mapping[str, Layout] = {
    "kohya": Layout("authors", flat("lora_te2_"), "kohya"),
    "LyCORIS by kohya": Layout("authors", flat("lora_te2_"), "LoKr", norms=True),
    "diffusers with PEFT": Layout("authors", dotted("text_encoder_2."), "PEFT"),
    "diffusers, its second layout": Layout("authors", dotted("text_encoder_2."), "text encoder"),
    "OneTrainer for ComfyUI": Layout(
        "authors", dotted("text_encoders.clip_g.transformer."), "PEFT with alpha"
    ),
    "OneTrainer, OMI": Layout("authors", dotted("clip_g."), "kohya"),
}
T5_LAYOUTS: Mapping[str, Layout] = {
    "kohya": Layout("authors", flat("lora_te3_"), "kohya"),
    "OneTrainer, Flux": Layout("authors", flat("lora_te2_"), "kohya"),
    "OneTrainer, Chroma": Layout("authors", flat("lora_te_"), "kohya"),
    "OneTrainer, Chroma for kohya": Layout("authors", flat("lora_te1_"), "kohya"),
    "LyCORIS alone": Layout("authors", flat("lycoris_"), "LoKr"),
    "diffusers, Flux": Layout("authors", dotted("text_encoder_2."), "PEFT"),
    "diffusers, SD 3": Layout("authors", dotted("text_encoder_3."), "PEFT"),
    "diffusers, Chroma": Layout("authors", dotted("text_encoder."), "PEFT"),
    "OneTrainer for ComfyUI": Layout(
        "authors", dotted("text_encoders.t5xxl.transformer."), "PEFT with alpha"
    ),
    "OneTrainer, OMI": Layout("authors", dotted("t5."), "kohya"),
}
LAYOUTS: Mapping[str, Mapping[str, Layout]] = {
    "SD 1.5": UNET_LAYOUTS,
    "SDXL": UNET_LAYOUTS,
    "Flux": FLUX_LAYOUTS,
    "Chroma": TRANSFORMER_LAYOUTS,
    "SD 3": TRANSFORMER_LAYOUTS,
    "SD 3.5": TRANSFORMER_LAYOUTS,
    "CLIP-L": CLIP_L_LAYOUTS,
    "CLIP-G": CLIP_G_LAYOUTS,
    "T5": T5_LAYOUTS,
}
_SPLIT = {name: layout for name, layout in TRANSFORMER_LAYOUTS.items() if layout.paths != "fused"}
NEO_TRANSFORMER_LAYOUTS: Mapping[str, Layout] = {
    **{name: layout for name, layout in _SPLIT.items() if layout.paths != "omi"},
    "musubi-tuner, Z-Image": Layout("diffusers", flat("lora_unet_"), "kohya"),
    "ai-toolkit, for ComfyUI": Layout("diffusers", dotted("diffusion_model."), "PEFT"),
    "DiffSynth": Layout("authors", dotted(""), "PEFT default"),
    "DiffSynth, diffusers' names": Layout("diffusers", dotted(""), "PEFT default"),
    "DiffSynth, whole names": Layout("authors", dotted("pipe.dit."), "PEFT default"),
    "OneTrainer, original": Layout("authors", dotted("net."), "PEFT with alpha"),
}
"""What is said of one trainer or one model is true of the others' files as well: a name means one layer."""

NEO_MODELS = (*("Flux 2", "Qwen-Image", "Wan", "Anima", "Krea 2", "Lumina 2", "Z-Image", "Ernie-Image"),)
NEO_LAYOUTS: Mapping[str, Mapping[str, Layout]] = {
    **dict.fromkeys(NEO_MODELS, NEO_TRANSFORMER_LAYOUTS),
    "Flux 2": {**NEO_TRANSFORMER_LAYOUTS, "OneTrainer, fused": TRANSFORMER_LAYOUTS["OneTrainer, fused"]},
}
ALL_LAYOUTS = {**LAYOUTS, **NEO_LAYOUTS}
EVERY_OF_NEO = [(model, layout) for model, layouts in NEO_LAYOUTS.items() for layout in layouts]
EVERY = [(model, layout) for model, layouts in LAYOUTS.items() for layout in layouts]


def named(layout: Layout, places: Places) -> Iterator[tuple[str, Place]]:
    """The layers for which a layout has a name; XLabs means q, k and v of a single block's first layer."""
    for path, place in places.items():
        name = layout.name(path)
        if name is not None:
            yield name, place


def make_file(
    layout: Layout, places: Places, shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file in this layout and, by parameter, ΔW in float64 at strength 1.

    shapes: of the parameters. Matrices and kernels get a LoRA or LoKr, norms a difference.
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for name, place in named(layout, places):
        shape = shapes[place.parameter]
        if len(shape) < 2 and not layout.norms:
            continue
        rows = place.rows
        if name.endswith("processor.qkv_lora"):
            rows = (0, 3 * shape[1])
        start, length = rows or (0, shape[0])
        tensors, delta = layer(layout.writer, (length, *shape[1:]), generator)
        state |= {name + ending: tensor for ending, tensor in tensors.items()}
        if place.swapped:
            delta = torch.cat([delta[length // 2 :], delta[: length // 2]])
        whole = deltas.setdefault(place.parameter, torch.zeros(shape, dtype=torch.float64))
        whole[start : start + length] += delta
    return state, deltas


def layer(
    writer: str, shape: tuple[int, ...], generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """One layer's tensors by ending, and ΔW in float64."""

    def values(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    if len(shape) < 2:
        value = values(*shape)
        return {".w_norm": value}, value.double()
    if writer == "LoKr":
        rows, columns = (2 if size % 2 == 0 else 1 for size in shape[:2])
        left, right = values(rows, columns), values(shape[0] // rows, shape[1] // columns, *shape[2:])
        tensors = {".lokr_w1": left, ".lokr_w2": right, ".alpha": torch.tensor(ALPHA)}
        kernel = (1,) * (len(shape) - 2)
        return tensors, torch.kron(left.double().view(rows, columns, *kernel), right.double())
    up_ending, down_ending, has_alpha = ENDINGS[writer]
    up, down = values(shape[0], RANK, *(1 for _ in shape[2:])), values(RANK, *shape[1:])
    delta = (up.double().flatten(1) @ down.double().flatten(1)).reshape(shape)
    tensors = {up_ending: up, down_ending: down}
    if has_alpha:
        tensors[".alpha"] = torch.tensor(ALPHA)
        delta *= ALPHA / RANK
    assert math.isfinite(float(delta.sum()))
    return tensors, delta
