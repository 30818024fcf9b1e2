"""What flows through each layer of a diffusion model: vectors, the prompt's tokens, the image's, or both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lib_precision_lora.memory.architecture import Family, Flow
from lib_precision_lora.names.unet import DEEPEST_BLOCK

ONCE, TEXT, IMAGE, JOINT = Flow("once"), Flow("text"), Flow("image"), Flow("joint")
CLIP_TOKENS = 257
"""Of the image that a Wan 2.1 sees through CLIP's vision model."""

_FLUX_BLOCK = re.compile(r"(?:double|single)_blocks\.\d+")

_FLOWS: Mapping[Family, tuple[tuple[str, Flow], ...]] = {
    "MMDiT": (
        (r".*\badaLN_modulation\b|[ty]_embedder\b", ONCE),
        (r".*\bcontext_(?:block|embedder|processor)\b", TEXT),
        (r"", IMAGE),
    ),
    "Flux": (
        (r".*\b(?:img_mod|txt_mod|modulation|adaLN_modulation)\b", ONCE),
        (r"(?:time|vector|guidance)_in\b", ONCE),
        (r"txt_in\b|.*\btxt_(?:attn|mlp)\b", TEXT),
        (r"single_blocks\b", JOINT),
        (r"", IMAGE),
    ),
    "Flux 2": (
        (r"\w+_stream_modulation|.*\badaLN_modulation\b|(?:time|guidance)_in\b", ONCE),
        (r"txt_in\b|.*\btxt_(?:attn|mlp)\b", TEXT),
        (r"single_blocks\b", JOINT),
        (r"", IMAGE),
    ),
    "Qwen-Image": (
        (r"time_text_embed\b|norm_out\b|.*\b(?:img|txt)_mod\b", ONCE),
        (r"txt_(?:in|norm)\b|.*\b(?:txt_mlp|add_[qkv]_proj|to_add_out|norm_added_[qk])\b", TEXT),
        (r"", IMAGE),
    ),
    "Wan": (
        (r"time_(?:embedding|projection)\b|.*\bmodulation$", ONCE),
        (r"text_embedding\b|.*\bcross_attn\.(?:k|v|norm_k)$", TEXT),
        (r"img_emb\b|.*\bcross_attn\.(?:k_img|v_img|norm_k_img)$", Flow("vectors", count=CLIP_TOKENS)),
        (r"", IMAGE),
    ),
    "Anima": (
        (r"t_embedd|.*\badaln_modulation", ONCE),
        (r".*\bcross_attn\.(?:k_proj|v_proj|k_norm)$", TEXT),
        (r"", IMAGE),
    ),
    "Krea 2": (
        (r"tmlp\b|tproj\b|.*\bmod\b|last\.modulation\b", ONCE),
        (r"txt(?:fusion|mlp)\b", TEXT),
        (r"first\b", IMAGE),
        (r"", JOINT),
    ),
    "NextDiT": (
        (r"t_embedder\b|time_text_embed\b|clip_text_pooled_proj\b|.*\badaLN_modulation\b", ONCE),
        (r"cap_embedder\b|context_refiner\b", TEXT),
        (r"x_embedder\b|noise_refiner\b", IMAGE),
        (r"", JOINT),
    ),
    "Ernie-Image": (
        (r"time_embedding\b|adaLN_modulation\b|final_norm\b", ONCE),
        (r"text_proj\b", TEXT),
        (r"x_embedder\b", IMAGE),
        (r"", JOINT),
    ),
}
"""A transformer's family → patterns of its layers and what flows through them; the first that fits counts."""


@dataclass(frozen=True, slots=True)
class Counts:
    """doubles, singles: blocks of a Flux, for each of which a Chroma makes vectors; layers, width: of the
    text encoder, of which a Krea 2 sees each token so many times."""

    doubles: int = 0
    singles: int = 0
    layers: int = 1
    width: int = 1

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Counts:
        """shapes: of a diffusion model's parameters, by name."""
        blocks = {match[0] for match in map(_FLUX_BLOCK.match, shapes) if match}
        doubles = sum(block.startswith("double") for block in blocks)
        layers = sum(shapes.get("txtfusion.projector.weight", (1, 1))[1:2])
        width = sum(shapes.get("txtfusion.layerwise_blocks.0.attn.wq.weight", (1, 1))[1:2])
        return cls(doubles, len(blocks) - doubles, layers, width)


def flow_of(family: Family, name: str, levels: Mapping[str, int], counts: Counts) -> Flow:
    """What flows through a layer of a diffusion model.

    name: without `.weight`; levels: those of a UNet's blocks, by name.
    """
    if family == "UNet":
        return _unet_flow(name, levels)
    if name.startswith("distilled_guidance_layer."):
        return Flow("vectors", count=12 * counts.doubles + 3 * counts.singles + 2)
    if name.startswith("txtfusion.layerwise_blocks."):
        return Flow("text", count=counts.layers)
    if name == "txtfusion.projector":
        return Flow("text", count=counts.width)
    return next(flow for sign, flow in _FLOWS[family] if re.match(sign, name))


def _unet_flow(name: str, levels: Mapping[str, int]) -> Flow:
    if name.startswith(("time_embed.", "label_emb.")) or ".emb_layers." in name:
        return Flow("once")
    if name.endswith((".attn2.to_k", ".attn2.to_v")):
        return Flow("text")
    steps = name.split(".", DEEPEST_BLOCK)
    owners = (".".join(steps[:depth]) for depth in range(min(len(steps), DEEPEST_BLOCK), 1, -1))
    return Flow("positions", level=next((levels[owner] for owner in owners if owner in levels), 0))
