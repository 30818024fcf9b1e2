"""What diffusers calls the layers of Flux, Chroma and SD 3, against the names of their authors.

diffusers splits what the authors fuse (q, k and v; in Flux's single blocks the MLP too), and keeps scale
before shift in the final layer of both and in SD 3's last context block. Source: the conversions of
checkpoints in huggingface/diffusers, `scripts/convert_sd3_to_diffusers.py` and `single_file_utils.py`.
OneTrainer has two layouts more: parts of fused layers numbered (`qkv.0`, OMI), and whole ones (`attn.qkv`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

FLUX_DOUBLE: Mapping[str, str] = {
    "img_attn.qkv": "attn.qkv",
    "txt_attn.qkv": "attn.added_qkv",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
FLUX_SINGLE: Mapping[str, str] = {
    "linear1": "qkv_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
SD3_BLOCK: Mapping[str, str] = {
    "x_block.attn.qkv": "attn.qkv",
    "x_block.attn2.qkv": "attn2.qkv",
    "context_block.attn.qkv": "attn.added_qkv",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
OUTSIDE_BLOCKS: Mapping[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
QKV: Mapping[str, tuple[str, str, str]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
LINEAR1 = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
"""What the first layer of Flux's single blocks is made of; the last part is wider than the others."""

_BLOCK = re.compile(r"(double|single|joint)_blocks\.([0-9]{1,4})\.(.+)")
_APPROXIMATOR = re.compile(r"distilled_guidance_layer\.(layers|norms)\.(\d+)(?:\.(in|out)_layer)?")
_BLOCKS = {
    "double": "transformer_blocks",
    "single": "single_transformer_blocks",
    "joint": "transformer_blocks",
}


@dataclass(frozen=True, slots=True)
class Part:
    """names: what files call it, prefix and underscores included.

    index, of: it is this one of so many parts of a fused weight (of = 0: all of it); swapped: the file has
    the two halves of the rows in the other order.
    """

    names: tuple[str, ...]
    index: int = 0
    of: int = 0
    swapped: bool = False


def joint_blocks(paths: Iterable[str]) -> frozenset[int]:
    """The numbers of SD 3's blocks among the paths of a diffusion model's modules or parameters."""
    blocks = (_BLOCK.fullmatch(path) for path in paths)
    return frozenset(int(block[2]) for block in blocks if block and block[1] == "joint")


def mmdit_parts(path: str, joint: Collection[int]) -> Iterator[Part]:
    """What files call a module, or its parts; none for a module of another architecture.

    path: the module in its authors' names, inside the diffusion model; joint: the model's `joint_blocks`,
    which tell SD 3's last block from the others.
    """
    block = _BLOCK.fullmatch(path)
    if block is None:
        yield from _outside_blocks(path)
        return
    kind, number, inner = block.groups()
    home = f"lora_transformer_{_BLOCKS[kind]}_{number}_"
    fused = LINEAR1 if kind == "single" and inner == "linear1" else QKV.get(inner, ())
    for index, name in enumerate(fused):
        numbered = f"lora_unet_{path.replace('.', '_')}_{index}"
        yield Part((home + _flat(name), numbered), index, len(fused))
    name = {"double": FLUX_DOUBLE, "single": FLUX_SINGLE, "joint": SD3_BLOCK}[kind].get(inner, "")
    if name:
        swapped = inner == "context_block.adaLN_modulation.1" and int(number) + 1 not in joint
        yield Part((home + _flat(name),), swapped=swapped)


def _outside_blocks(path: str) -> Iterator[Part]:
    name = OUTSIDE_BLOCKS.get(path, "")
    layer = _APPROXIMATOR.fullmatch(path)
    if layer is not None:
        kind, number, which = layer.groups()
        end = {"in": ".linear_1", "out": ".linear_2", None: ""}[which]
        name = f"distilled_guidance_layer.{kind}.{number}{end}"
    if name:
        omi = ("lora_unet_img_in_proj",) if path == "img_in" else ()
        swapped = path == "final_layer.adaLN_modulation.1"
        yield Part(("lora_transformer_" + _flat(name), *omi), swapped=swapped)


def _flat(name: str) -> str:
    return name.replace(".", "_")
