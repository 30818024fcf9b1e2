"""What diffusers calls the layers of newer transformers, against the names of their authors.

Wan, Anima, Krea 2, Lumina 2, Z-Image and Flux 2; Qwen-Image and Ernie-Image have one name for each layer.
Sources: the conversions of checkpoints in huggingface/diffusers (`loaders/single_file_utils.py`) and of LoRAs
(`loaders/lora_conversion_utils.py`), and Nerogar/OneTrainer (`modules/model/`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from lib_precision_lora.names.layouts import flat_path
from lib_precision_lora.names.mmdit import QKV, Part, mmdit_parts
from lib_precision_lora.names.models import ANIMA, FLUX, FLUX2, KREA, LUMINA, SD3, WAN, Z_IMAGE

TO_QKV = ("to_q", "to_k", "to_v")


@dataclass(frozen=True, slots=True)
class Naming:
    """Of one model: authors' names → those of diffusers.

    blocks: what a list of blocks is called; inside: parts of a block, by their own names; outside: layers in
    no block; fused: parts that diffusers splits in three; swapped: layers whose halves diffusers has in the
    other order.
    """

    blocks: Mapping[str, str]
    inside: Mapping[str, str]
    outside: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    swapped: frozenset[str] = frozenset()


def _twice(own: str, theirs: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{own}.{part}": f"{theirs}.{name}" for part, name in parts.items()}


_WAN_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
_ANIMA_ATTENTION = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_KREA_BLOCK = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
    "attn.qknorm.qnorm": "attn.norm_q",
    "attn.qknorm.knorm": "attn.norm_k",
    "prenorm": "norm1",
    "postnorm": "norm2",
}
_NEXT_DIT_BLOCKS = {name: name for name in ("layers", "noise_refiner", "context_refiner")}

NAMINGS: Mapping[str, Naming] = {
    FLUX2: Naming(
        {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"},
        {
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_attn.norm.query_norm": "attn.norm_q",
            "img_attn.norm.key_norm": "attn.norm_k",
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
            "img_attn.qkv": "attn.qkv",
            "txt_attn.qkv": "attn.added_qkv",
            "linear1": "attn.to_qkv_mlp_proj",
            "linear2": "attn.to_out",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        },
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
            "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        },
        {name: QKV[name] for name in ("img_attn.qkv", "txt_attn.qkv")},
        frozenset({"final_layer.adaLN_modulation.1"}),
    ),
    WAN: Naming(
        {"blocks": "blocks"},
        {
            **_twice("self_attn", "attn1", _WAN_ATTENTION),
            **_twice("cross_attn", "attn2", _WAN_ATTENTION),
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
            "norm3": "norm2",
        },
        {
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "time_projection.1": "condition_embedder.time_proj",
            "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
            "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
            "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
            "head.head": "proj_out",
        },
    ),
    ANIMA: Naming(
        {"blocks": "transformer_blocks"},
        {
            **_twice("self_attn", "attn1", _ANIMA_ATTENTION),
            **_twice("cross_attn", "attn2", _ANIMA_ATTENTION),
            **{
                f"adaln_modulation_{part}.{index}": f"norm{number}.linear_{index}"
                for number, part in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
                for index in (1, 2)
            },
            "mlp.layer1": "ff.net.0.proj",
            "mlp.layer2": "ff.net.2",
        },
        {
            "x_embedder.proj.1": "patch_embed.proj",
            "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
            "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
            "t_embedding_norm": "time_embed.norm",
            "final_layer.adaln_modulation.1": "norm_out.linear_1",
            "final_layer.adaln_modulation.2": "norm_out.linear_2",
            "final_layer.linear": "proj_out",
        },
    ),
    KREA: Naming(
        {
            "blocks": "transformer_blocks",
            "txtfusion.layerwise_blocks": "text_fusion.layerwise_blocks",
            "txtfusion.refiner_blocks": "text_fusion.refiner_blocks",
        },
        _KREA_BLOCK,
        {
            "first": "img_in",
            "tmlp.0": "time_embed.linear_1",
            "tmlp.2": "time_embed.linear_2",
            "tproj.1": "time_mod_proj",
            "txtmlp.0": "txt_in.norm",
            "txtmlp.1": "txt_in.linear_1",
            "txtmlp.3": "txt_in.linear_2",
            "txtfusion.projector": "text_fusion.projector",
            "last.linear": "final_layer.linear",
            "last.norm": "final_layer.norm",
        },
    ),
    Z_IMAGE: Naming(
        _NEXT_DIT_BLOCKS,
        {
            "attention.out": "attention.to_out.0",
            "attention.q_norm": "attention.norm_q",
            "attention.k_norm": "attention.norm_k",
        },
        {
            "x_embedder": "all_x_embedder.2-1",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        },
        {"attention.qkv": tuple(f"attention.{part}" for part in TO_QKV)},
    ),
    LUMINA: Naming(
        _NEXT_DIT_BLOCKS,
        {
            "attention.out": "attn.to_out.0",
            "attention.q_norm": "attn.norm_q",
            "attention.k_norm": "attn.norm_k",
            **{f"feed_forward.w{number}": f"feed_forward.linear_{number}" for number in (1, 2, 3)},
            "adaLN_modulation.1": "norm1.linear",
            "attention_norm1": "norm1.norm",
            "attention_norm2": "norm2",
        },
        {
            "cap_embedder.0": "time_caption_embed.caption_embedder.0",
            "cap_embedder.1": "time_caption_embed.caption_embedder.1",
            "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
            "final_layer.adaLN_modulation.1": "norm_out.linear_1",
            "final_layer.linear": "norm_out.linear_2",
        },
        {"attention.qkv": tuple(f"attn.{part}" for part in TO_QKV)},
    ),
}

_CONTEXT_NORM = "context_refiner_{}_norm1"
"""Lumina 2's blocks of the prompt have no modulation, and their first norm has another name for that."""

_BLOCK = re.compile(r"((?:txtfusion\.)?[a-z_]+)\.([0-9]{1,4})\.(.+)")


def transformer_parts(model: str | None, path: str, joint: Collection[int]) -> Iterator[Part]:
    """What files call a module, or its parts; none for a module that has one name everywhere.

    model: of `names.models`; path: the module in its authors' names, inside the diffusion model; joint: as
    for `mmdit_parts`.
    """
    if model in (FLUX, SD3):
        yield from mmdit_parts(path, joint)
    naming = NAMINGS.get(model or "")
    if naming is None:
        return
    block = _BLOCK.fullmatch(path)
    if block is None or block[1] not in naming.blocks:
        if path in naming.outside:
            yield Part(_names(naming.outside[path]), swapped=path in naming.swapped)
        return
    kind, number, inner = block.groups()
    home = f"{naming.blocks[kind]}.{number}."
    fused = naming.fused.get(inner, ())
    for index, part in enumerate(fused):
        yield Part(_names(home + part), index, len(fused))
    if inner in naming.inside:
        names = _names(home + naming.inside[inner])
        if model == LUMINA and kind == "context_refiner" and inner == "attention_norm1":
            names = (f"lora_transformer_{_CONTEXT_NORM.format(number)}",)
        yield Part(names)


def _names(path: str) -> tuple[str, ...]:
    return (f"lora_transformer_{flat_path(path)}",)
