"""Which models a file's names speak of: for keys that match nothing, and files made for another model.

The names are those that trainers write, judged by their path alone: a path that several architectures share
counts as any of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lib_precision_lora.names.endings import module_of
from lib_precision_lora.names.layouts import bare_name, text_encoder_path
from lib_precision_lora.names.models import (
    ANIMA,
    ERNIE,
    FLUX,
    FLUX2,
    KREA,
    LUMINA,
    QWEN,
    SD3,
    UNET,
    WAN,
    Z_IMAGE,
)

BUNDLED_EMBEDDING = "bundle_emb."
"""What bundled textual inversions are filed under; they are the WebUI's, not ours."""

NEXT_DIT = "Lumina 2 or Z-Image"

_MODELS: tuple[tuple[str, frozenset[str], re.Pattern[str]], ...] = tuple(
    (label, frozenset(members), re.compile(pattern))
    for label, members, pattern in (
        (WAN, {WAN}, r"blocks_\d+_(?:(?:self|cross)_attn_(?:[qkvo]|[kv]_img|norm_[qk](?:_img)?)$|ffn_)"),
        (WAN, {WAN}, r"blocks_\d+_(?:attn[12]_|modulation$|norm3$)|condition_embedder_|head_head$"),
        (ANIMA, {ANIMA}, r"blocks_\d+_(?:(?:self|cross)_attn_|mlp_layer[12]$|adaln_modulation_)"),
        (ANIMA, {ANIMA}, r"(?:text_conditioner|llm_adapter)_|transformer_blocks_\d+_norm[123]_linear_[12]$"),
        (
            KREA,
            {KREA},
            r"blocks_\d+_(?:attn_(?:w[qkvo]|gate|qknorm_.*)|mlp_(?:gate|up|down))$|txt(?:fusion|mlp)_",
        ),
        (KREA, {KREA}, r"transformer_blocks_\d+_(?:attn_to_gate|ff_(?:gate|up|down))$|text_fusion_"),
        (
            "Hunyuan Video",
            {"Hunyuan Video"},
            r".*(?:_(?:img|txt)_(?:mlp_fc\d|mod_linear)|single_blocks_\d+_modulation_linear)"
            r"|txt_in_(?:individual_token_refiner|c_embedder|t_embedder)",
        ),
        (
            "Hunyuan Video, Flux or Flux 2",
            {"Hunyuan Video", FLUX, FLUX2},
            r"double_blocks_\d+_(?:img|txt)_attn_|single_blocks_\d+_linear[12]",
        ),
        (
            "Flux, Chroma or Flux 2",
            {FLUX, FLUX2},
            r"double_blocks_\d+_(?:img|txt)_mlp_|single_blocks_\d+_norm_|guidance_in_",
        ),
        (
            FLUX2,
            {FLUX2},
            r"(?:double|single)_stream_modulation|single_transformer_blocks_\d+_attn_to_(?:qkv_mlp_proj|out)"
            r"|(?:single_)?transformer_blocks_\d+_ff(?:_context)?_linear_(?:in|out)|time_guidance_embed_",
        ),
        (FLUX, {FLUX}, r"(?:double|single)_blocks_\d+_|distilled_guidance_layer_|vector_in_"),
        ("HiDream", {"HiDream"}, r"(?:double|single)_stream_blocks_\d+_"),
        ("AuraFlow", {"AuraFlow"}, r"joint_transformer_blocks_\d+_|(?:double|single)_layers_\d+_"),
        (SD3, {SD3}, r"joint_blocks_\d+_"),
        (QWEN, {QWEN}, r"transformer_blocks_\d+_(?:img|txt)_(?:mlp|mod)_"),
        (
            "Flux or Hunyuan Video, in diffusers' names",
            {FLUX, FLUX2, "Hunyuan Video", "AuraFlow"},
            r"single_transformer_blocks_\d+_",
        ),
        (
            "SD 3, Flux or another transformer, in diffusers' names",
            {SD3, FLUX, "Hunyuan Video", QWEN, FLUX2, KREA, ANIMA},
            r"transformer_blocks_\d+_(?:attn2?_|ff_|norm1_)",
        ),
        (
            "PixArt, LTX-Video or Anima, in diffusers' names",
            {"PixArt or LTX-Video", ANIMA},
            r"transformer_blocks_\d+_attn1_",
        ),
        (ERNIE, {ERNIE}, r"layers_\d+_(?:self_attention_|mlp_(?:\w+_proj|linear_fc2)$|adaLN_(?:sa|mlp)_ln$)"),
        (LUMINA, {LUMINA}, r"(?:layers|\w+_refiner)_\d+_(?:attn_|feed_forward_linear_|adaLN_modulation_1$)"),
        (LUMINA, {LUMINA}, r"(?:layers|\w+_refiner)_\d+_norm[12]_?|time_caption_embed_"),
        (Z_IMAGE, {Z_IMAGE}, r"(?:layers|\w+_refiner)_\d+_(?:attention_(?:to|norm)_|adaLN_modulation_0$)"),
        (Z_IMAGE, {Z_IMAGE}, r"all_(?:x_embedder|final_layer)_"),
        (NEXT_DIT, {LUMINA, Z_IMAGE}, r"layers_\d+_(?:attention_|feed_forward_|attention_norm|ffn_norm)"),
        (NEXT_DIT, {LUMINA, Z_IMAGE}, r"(?:noise|context)_refiner_\d+_|cap_embedder_"),
        ("AnimateDiff", {"AnimateDiff", UNET}, r".*motion_modules_"),
        (UNET, {UNET}, r"(?:input_blocks|output_blocks|down_blocks|up_blocks)_\d+_|(?:mid|middle)_block_"),
    )
)
"""(what to call it, which models have such a path, the path with underscores), the most telling first. A
diffusers SD 3.5 has `attn2` beside `attn`; PixArt and LTX-Video have `attn1` and `attn2`."""

_OTHERS: tuple[tuple[str, str, re.Pattern[str]], ...] = tuple(
    (label, remedy, re.compile(pattern))
    for label, remedy, pattern in (
        (
            "textual inversions, which are the WebUI's",
            "put it in the folder embeddings and write its name in the prompt",
            r"bundle_emb\.|emb_params$|string_to_param",
        ),
        (
            "kohya's OFT for Flux, which is not read yet",
            "merge it into its checkpoint with its trainer, or use another kind of LoRA",
            r".*\.oft_blocks\.\d+$",
        ),
        (
            "a LoRA in Nunchaku's packed form, which its own runtime alone can read",
            "use the LoRA from which it was converted",
            r"(?:.*\.)?(?:single_)?transformer_blocks\.\d+\..*"
            r"\.(?:lora_(?:down|up)|qweight|wscales|wzeros|smooth(?:_orig|_factor)?)$",
        ),
        (
            "a LoRA of cloneofsimo's lora_diffusion, which numbers its layers and does not name them",
            "look for it as kohya's trainer or diffusers save it, or convert it in the tool that made it",
            r"(?:unet|text_encoder)(?::\d+)+:(?:up|down|rank)$",
        ),
        (
            "tensors under numbers, as hypernetworks and cloneofsimo's lora_diffusion have",
            "put a hypernetwork in models/hypernetworks, or look for the LoRA as kohya's trainer or "
            "diffusers save it",
            r"\d+(?:\.\d+)*$",
        ),
        ("a ControlNet-LLLite", "put it in models/ControlNet and choose it there", r"lllite_"),
        ("an IP-Adapter", "put it in models/ControlNet and choose it there", r"(?:ip_adapter|image_proj)\."),
        (
            "a Control-LoRA",
            "put it in models/ControlNet and choose it there",
            r"(?:lora_controlnet$|control_model\.)",
        ),
        (
            "a whole checkpoint",
            "put it in models/Stable-diffusion and choose it there",
            r"(?:model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\."
            r"(?!.*\.(?:lora|hada|lokr|oft|boft|ia3)_).*\.(?:weight|bias|scale)$",
        ),
        ("Stable Cascade", "", r"lora_prior_"),
    )
)
"""(what to call it, what to do with a file that holds nothing else, its keys)."""

_ENCODERS = {1: "text encoder CLIP-L", 2: "text encoder CLIP-G of SDXL or SD 3", 3: "text encoder T5"}


@dataclass(frozen=True, slots=True)
class Kind:
    """What a key looks like. models: those that have such a layer, none where that is not known; remedy: what
    to do with a file of such keys, which is no LoRA that can be read for any model."""

    label: str
    models: frozenset[str] = frozenset()
    text_encoder: int | None = None
    remedy: str = ""


UNKNOWN = Kind("no layout that is known")
LONGEST_KEY = 1024


def unreadable(keys: Iterable[str]) -> str | None:
    """A clause that says what a file is and what to do, where most of its keys are of a form that cannot be
    read whatever the model is; None where they are not."""
    groups = by_kind(keys)
    kind = max(groups, key=lambda kind: len(groups[kind]), default=UNKNOWN)
    return f"it is {kind.label}: {kind.remedy}" if kind.remedy else None


def kind_of(key: str) -> Kind:
    """What a key of a file looks like."""
    for label, remedy, pattern in _OTHERS:
        if len(key) <= LONGEST_KEY and pattern.match(key):
            return Kind(label, remedy=remedy)
    number, path = text_encoder_path(bare_name(module_of(key)))
    if number is not None:
        return Kind(_ENCODERS[number], text_encoder=number)
    for label, models, pattern in _MODELS:
        if pattern.match(path):
            return Kind(label, models)
    return UNKNOWN


def by_kind(keys: Iterable[str]) -> Mapping[Kind, list[str]]:
    """Keys grouped by what they look like."""
    groups: dict[Kind, list[str]] = {}
    for key in keys:
        groups.setdefault(kind_of(key), []).append(key)
    return groups


def foreign(keys: Iterable[str], model: str | None) -> tuple[tuple[str, ...], str]:
    """The keys that speak of a model that this one is not, and which that is, in words; none where this one
    is not known."""
    kinds = {key: kind_of(key) for key in keys}
    strange = {
        key: kind
        for key, kind in kinds.items()
        if model is not None and kind.models and model not in kind.models
    }
    common = frozenset.intersection(*(kind.models for kind in strange.values())) if strange else frozenset()
    who = sorted(common) if common else sorted({kind.label for kind in strange.values()})
    return tuple(strange), (" or " if common else " and ").join(who)


def describe_leftover(keys: Iterable[str], shown: int = 8) -> str:
    """One clause for the log: how many keys look like what, with the first names of each kind."""
    groups = sorted(by_kind(keys).items(), key=lambda group: -len(group[1]))
    return "; ".join(
        f"{len(names)} of {kind.label} ({', '.join(names[:shown])}{', …' if len(names) > shown else ''})"
        for kind, names in groups
    )
