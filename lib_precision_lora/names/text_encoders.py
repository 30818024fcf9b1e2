"""The parameters of text encoders: as checkpoints name them → as the host's models do.

A host loads CLIP in the names of transformers, `text_model.…`, whether the checkpoint has these, those of
OpenCLIP, where q, k and v are one matrix, or the path below `text_model` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

HOSTS: Mapping[str, str] = {"CLIP-L": "clip_l", "CLIP-H": "clip_h", "CLIP-G": "clip_g", "T5": "t5xxl"}
"""A text encoder → the host's name of it."""

ADAPTER, ADAPTER_PATH = "text adapter", "llm_adapter."
"""What Anima's checkpoint holds beside its diffusion model, and a host keeps in the text encoder."""

ADAPTER_HOST = "qwen3_06b"
"""The host's name of the text encoder that has it."""

_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)(weight|bias)")
_RESBLOCK_PARTS: Mapping[str, tuple[str, ...]] = {
    "attn.in_proj_": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj.": ("self_attn.out_proj",),
    "mlp.c_fc.": ("mlp.fc1",),
    "mlp.c_proj.": ("mlp.fc2",),
    "ln_1.": ("layer_norm1",),
    "ln_2.": ("layer_norm2",),
}
_OPEN_CLIP: Mapping[str, str] = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}


def language_model_names(root: str, path: str) -> tuple[str, ...]:
    """What files call a module of a language model that is the text encoder, or of Anima's adapter in it.

    root: the host's name of the text encoder; path: of the module inside. sd-scripts writes what stands below
    `model`, ComfyUI puts `transformer` before it.
    """
    flat = path.replace(".", "_")
    if path.startswith(ADAPTER_PATH):
        inner = flat.removeprefix(ADAPTER_PATH.replace(".", "_"))
        return f"lora_unet_{flat}", f"lora_te_{flat}", f"lora_unet_text_conditioner_{inner}"
    inside = flat.removeprefix("model_")
    prefixed = (f"{prefix}_{name}" for prefix in ("lora_te", "lora_te1") for name in (inside, flat))
    return *prefixed, f"text_encoders.{root}.transformer.{path}"


def host_parameters(encoder: str, name: str) -> tuple[str, ...]:
    """The host's parameters that are made of one of the checkpoint's: as many equal parts of its rows.

    encoder: one of `HOSTS`; name: without the checkpoint's prefix; the host's has no prefix either.
    """
    if encoder == ADAPTER:
        return (name,)
    if encoder == "T5":
        return (name.removeprefix("transformer."),)
    if name in _OPEN_CLIP:
        return (_OPEN_CLIP[name],)
    match = _RESBLOCK.fullmatch(name)
    if match is None:
        path = name.removeprefix("transformer.")
        inside = path.startswith(("text_model.", "text_projection", "logit_scale"))
        return (path if inside else f"text_model.{path}",)
    number, part, attribute = match.groups()
    made = _RESBLOCK_PARTS.get(part, ())
    return tuple(f"text_model.encoder.layers.{number}.{each}.{attribute}" for each in made)
