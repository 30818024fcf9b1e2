"""What trainers call the layers of each architecture: path → where it lies in the host's model.

Written by hand from the trainers' own code and from diffusers' conversions of checkpoints, in the direction
in which files are read. `authors` are the names of a model's authors, which the host keeps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """module: in the host's model; rows: (start, length) of a fused weight; swapped: the file has the second
    half of the rows first; attribute: of the parameter."""

    module: str
    rows: tuple[int, int] | None = None
    swapped: bool = False
    attribute: str = "weight"

    @property
    def parameter(self) -> str:
        return f"{self.module}.{self.attribute}"


Places = Mapping[str, Place]

TO_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def authors(parameters: Iterable[str], root: str = "diffusion_model.") -> dict[str, Place]:
    """Every module with a weight, or a norm's scale, under its own name."""
    places = {}
    for parameter in parameters:
        module, _, attribute = parameter.rpartition(".")
        if parameter.startswith(root) and attribute in ("weight", "scale"):
            places[module.removeprefix(root)] = Place(module, attribute=attribute)
    return places


def unet(levels: int, parameters: Collection[str]) -> dict[str, Place]:
    """diffusers' names for a U-Net with one residual and one attention block per level.

    Every other input block follows a downsampling, every other output block precedes an upsampling.
    """
    names: dict[str, str] = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    for level in range(levels):
        names |= _residual(f"down_blocks.{level}.resnets.0", f"input_blocks.{2 * level + 1}.0")
        names |= _attention(f"down_blocks.{level}.attentions.0", f"input_blocks.{2 * level + 1}.1")
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{2 * level + 2}.0.op"
        for block in (0, 1):
            number = 2 * level + block
            names |= _residual(f"up_blocks.{level}.resnets.{block}", f"output_blocks.{number}.0")
            names |= _attention(f"up_blocks.{level}.attentions.{block}", f"output_blocks.{number}.1")
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{2 * level + 1}.2.conv"
    names |= _residual("mid_block.resnets.0", "middle_block.0")
    names |= _attention("mid_block.attentions.0", "middle_block.1")
    names |= _residual("mid_block.resnets.1", "middle_block.2")
    return {
        path: Place(f"diffusion_model.{module}")
        for path, module in names.items()
        if f"diffusion_model.{module}.weight" in parameters
    }


def _residual(path: str, module: str) -> dict[str, str]:
    parts = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return {f"{path}.{theirs}": f"{module}.{ours}" for theirs, ours in parts.items()}


def _attention(path: str, module: str) -> dict[str, str]:
    block = "transformer_blocks.0."
    parts = ["norm", "proj_in", "proj_out"]
    parts += [f"{block}norm{index}" for index in (1, 2, 3)]
    parts += [f"{block}ff.net.0.proj", f"{block}ff.net.2"]
    for attention in ("attn1", "attn2"):
        parts += [f"{block}{attention}.{end}" for end in ("to_q", "to_k", "to_v", "to_out.0")]
    return {f"{path}.{part}": f"{module}.{part}" for part in parts}


def flux(doubles: int, singles: int, hidden: int, ratio: int, chroma: bool = False) -> dict[str, Place]:
    """diffusers' names for Flux and, without all modulation, for Chroma. ratio: that of the MLP's width."""
    m = "diffusion_model."
    places = {
        "x_embedder": Place(f"{m}img_in"),
        "context_embedder": Place(f"{m}txt_in"),
        "proj_out": Place(f"{m}final_layer.linear"),
    }
    if not chroma:
        places["norm_out.linear"] = Place(f"{m}final_layer.adaLN_modulation.1", swapped=True)
        for theirs, ours in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
            for number, end in ((1, "in"), (2, "out")):
                path = f"time_text_embed.{theirs}_embedder.linear_{number}"
                places[path] = Place(f"{m}{ours}.{end}_layer")
    for i in range(doubles):
        path, module = f"transformer_blocks.{i}.", f"{m}double_blocks.{i}."
        places |= thirds(path, TO_QKV, module + "img_attn.qkv", hidden)
        places |= thirds(path, ADDED_QKV, module + "txt_attn.qkv", hidden)
        places[path + "attn.to_out.0"] = Place(module + "img_attn.proj")
        places[path + "attn.to_add_out"] = Place(module + "txt_attn.proj")
        for stream, prefix, context in (("img", "", ""), ("txt", "added_", "_context")):
            ff, norm = f"ff{context}", f"norm1{context}"
            places[f"{path}{ff}.net.0.proj"] = Place(f"{module}{stream}_mlp.0")
            places[f"{path}{ff}.net.2"] = Place(f"{module}{stream}_mlp.2")
            for letter, kind in (("q", "query"), ("k", "key")):
                target = Place(f"{module}{stream}_attn.norm.{kind}_norm", attribute="scale")
                places[f"{path}attn.norm_{prefix}{letter}"] = target
            if not chroma:
                places[f"{path}{norm}.linear"] = Place(f"{module}{stream}_mod.lin")
    for i in range(singles):
        path, module = f"single_transformer_blocks.{i}.", f"{m}single_blocks.{i}."
        places |= thirds(path, TO_QKV, module + "linear1", hidden)
        places[path + "proj_mlp"] = Place(module + "linear1", (3 * hidden, ratio * hidden))
        places[path + "proj_out"] = Place(module + "linear2")
        places[path + "attn.norm_q"] = Place(module + "norm.query_norm", attribute="scale")
        places[path + "attn.norm_k"] = Place(module + "norm.key_norm", attribute="scale")
        if not chroma:
            places[path + "norm.linear"] = Place(module + "modulation.lin")
    return places


def chroma(doubles: int, singles: int, hidden: int, ratio: int, layers: int) -> dict[str, Place]:
    """diffusers' names for Chroma. layers: of what stands in for Flux's modulation."""
    places = flux(doubles, singles, hidden, ratio, chroma=True)
    guidance = "distilled_guidance_layer."
    ours = f"diffusion_model.{guidance}"
    places |= {guidance + end: Place(ours + end) for end in ("in_proj", "out_proj")}
    for i in range(layers):
        places[f"{guidance}layers.{i}.linear_1"] = Place(f"{ours}layers.{i}.in_layer")
        places[f"{guidance}layers.{i}.linear_2"] = Place(f"{ours}layers.{i}.out_layer")
        places[f"{guidance}norms.{i}"] = Place(f"{ours}norms.{i}", attribute="scale")
    return places


def sd3(depth: int, hidden: int, parameters: Collection[str]) -> dict[str, Place]:
    """diffusers' names for SD 3 and 3.5, for those parameters that there are."""
    m = "diffusion_model."
    places = {
        "pos_embed.proj": Place(f"{m}x_embedder.proj"),
        "context_embedder": Place(f"{m}context_embedder"),
        "time_text_embed.timestep_embedder.linear_1": Place(f"{m}t_embedder.mlp.0"),
        "time_text_embed.timestep_embedder.linear_2": Place(f"{m}t_embedder.mlp.2"),
        "time_text_embed.text_embedder.linear_1": Place(f"{m}y_embedder.mlp.0"),
        "time_text_embed.text_embedder.linear_2": Place(f"{m}y_embedder.mlp.2"),
        "norm_out.linear": Place(f"{m}final_layer.adaLN_modulation.1", swapped=True),
        "proj_out": Place(f"{m}final_layer.linear"),
    }
    for i in range(depth):
        path, module = f"transformer_blocks.{i}.", f"{m}joint_blocks.{i}."
        for attn in ("attn", "attn2"):
            names = tuple(f"{attn}.to_{letter}" for letter in "qkv")
            places |= thirds(path, names, f"{module}x_block.{attn}.qkv", hidden)
            places[f"{path}{attn}.to_out.0"] = Place(f"{module}x_block.{attn}.proj")
            for letter in "qk":
                places[f"{path}{attn}.norm_{letter}"] = Place(f"{module}x_block.{attn}.ln_{letter}")
        places |= thirds(path, ADDED_QKV, f"{module}context_block.attn.qkv", hidden)
        places[path + "attn.to_add_out"] = Place(f"{module}context_block.attn.proj")
        for letter in "qk":
            places[f"{path}attn.norm_added_{letter}"] = Place(f"{module}context_block.attn.ln_{letter}")
        places[path + "norm1.linear"] = Place(f"{module}x_block.adaLN_modulation.1")
        modulation = f"{module}context_block.adaLN_modulation.1"
        places[path + "norm1_context.linear"] = Place(modulation, swapped=i == depth - 1)
        for block, ff in (("x_block", "ff"), ("context_block", "ff_context")):
            places[f"{path}{ff}.net.0.proj"] = Place(f"{module}{block}.mlp.fc1")
            places[f"{path}{ff}.net.2"] = Place(f"{module}{block}.mlp.fc2")
    return {path: place for path, place in places.items() if place.parameter in parameters}


def thirds(path: str, names: tuple[str, ...], module: str, hidden: int) -> dict[str, Place]:
    """q, k and v, in this order, in one weight."""
    return {path + name: Place(module, (index * hidden, hidden)) for index, name in enumerate(names)}


def omi(authors: Places, hidden: int, ratio: int) -> dict[str, Place]:
    """OneTrainer's OMI layout: authors' names, the parts of fused layers numbered."""
    places: dict[str, Place] = {}
    for path, place in authors.items():
        if path.endswith("qkv"):
            places |= thirds(f"{path}.", ("0", "1", "2"), place.module, hidden)
        elif path.endswith("linear1"):
            places |= thirds(f"{path}.", ("0", "1", "2"), place.module, hidden)
            places[f"{path}.3"] = Place(place.module, (3 * hidden, ratio * hidden))
        else:
            places["img_in.proj" if path == "img_in" else path] = place
    return places


def fused(diffusers: Places) -> dict[str, Place]:
    """OneTrainer's own names where it trains fused layers: those of diffusers, the parts under one name."""
    names = {"attn.to_v": "attn.qkv", "attn2.to_v": "attn2.qkv", "attn.add_v_proj": "attn.added_qkv"}
    places: dict[str, Place] = {}
    for path, place in diffusers.items():
        block, _, part = path.rpartition("attn")
        if place.rows is None:
            places[path] = place
        elif path.startswith("single_") and path.endswith("proj_mlp"):
            places[path.replace("proj_mlp", "qkv_mlp")] = Place(place.module)
        elif not path.startswith("single_") and path.endswith(tuple(names)):
            places[block + names["attn" + part]] = Place(place.module)
    return places
