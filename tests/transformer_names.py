"""What trainers call the layers of Forge Neo's models: path → where it lies in the host's model.

As `trainer_names.py`: by hand, from the trainers' own code and from diffusers' conversions of checkpoints, in
their order of replacements (huggingface/diffusers, `loaders/single_file_utils.py`; Nerogar/OneTrainer,
`modules/model/Krea2Model.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from tests.trainer_names import ADDED_QKV, TO_QKV, Place, Places, authors, thirds

Replacements = Iterable[tuple[str, str]]

WAN: Replacements = [
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("cross_attn", "attn2"),
    ("self_attn", "attn1"),
    (".o.", ".to_out.0."),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".k_img.", ".add_k_proj."),
    (".v_img.", ".add_v_proj."),
    (".norm_k_img.", ".norm_added_k."),
    ("head.head", "proj_out"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm3", "norm2"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
]
ANIMA: Replacements = [
    ("t_embedder.1", "time_embed.t_embedder"),
    ("t_embedding_norm", "time_embed.norm"),
    ("blocks", "transformer_blocks"),
    ("adaln_modulation_self_attn.1", "norm1.linear_1"),
    ("adaln_modulation_self_attn.2", "norm1.linear_2"),
    ("adaln_modulation_cross_attn.1", "norm2.linear_1"),
    ("adaln_modulation_cross_attn.2", "norm2.linear_2"),
    ("adaln_modulation_mlp.1", "norm3.linear_1"),
    ("adaln_modulation_mlp.2", "norm3.linear_2"),
    ("self_attn", "attn1"),
    ("cross_attn", "attn2"),
    ("q_proj", "to_q"),
    ("k_proj", "to_k"),
    ("v_proj", "to_v"),
    ("output_proj", "to_out.0"),
    ("q_norm", "norm_q"),
    ("k_norm", "norm_k"),
    ("mlp.layer1", "ff.net.0.proj"),
    ("mlp.layer2", "ff.net.2"),
    ("x_embedder.proj.1", "patch_embed.proj"),
    ("final_layer.adaln_modulation.1", "norm_out.linear_1"),
    ("final_layer.adaln_modulation.2", "norm_out.linear_2"),
    ("final_layer.linear", "proj_out"),
]
KREA: Replacements = [
    ("first", "img_in"),
    ("last.linear", "final_layer.linear"),
    ("last.norm", "final_layer.norm"),
    ("txtmlp.0", "txt_in.norm"),
    ("txtmlp.1", "txt_in.linear_1"),
    ("txtmlp.3", "txt_in.linear_2"),
    ("tmlp.0", "time_embed.linear_1"),
    ("tmlp.2", "time_embed.linear_2"),
    ("tproj.1", "time_mod_proj"),
    ("txtfusion", "text_fusion"),
    ("attn.gate", "attn.to_gate"),
    ("qknorm.qnorm", "norm_q"),
    ("qknorm.knorm", "norm_k"),
    ("attn.wk", "attn.to_k"),
    ("attn.wo", "attn.to_out.0"),
    ("attn.wq", "attn.to_q"),
    ("attn.wv", "attn.to_v"),
    ("mlp.", "ff."),
    ("prenorm", "norm1"),
    ("postnorm", "norm2"),
]
FLUX2: Replacements = [
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    ("stream_modulation_img.lin", "stream_modulation_img.linear"),
    ("stream_modulation_txt.lin", "stream_modulation_txt.linear"),
    ("single_stream_modulation.lin", "single_stream_modulation.linear"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ("img_attn.norm.query_norm", "attn.norm_q"),
    ("img_attn.norm.key_norm", "attn.norm_k"),
    ("img_attn.proj", "attn.to_out.0"),
    ("img_mlp.0", "ff.linear_in"),
    ("img_mlp.2", "ff.linear_out"),
    ("txt_attn.norm.query_norm", "attn.norm_added_q"),
    ("txt_attn.norm.key_norm", "attn.norm_added_k"),
    ("txt_attn.proj", "attn.to_add_out"),
    ("txt_mlp.0", "ff_context.linear_in"),
    ("txt_mlp.2", "ff_context.linear_out"),
    ("linear1", "attn.to_qkv_mlp_proj"),
    ("linear2", "attn.to_out"),
    (".norm.query_norm", ".attn.norm_q"),
    (".norm.key_norm", ".attn.norm_k"),
    ("double_blocks", "transformer_blocks"),
    ("single_blocks", "single_transformer_blocks"),
]
LUMINA: Replacements = [
    ("context_refiner.0.attention_norm1", "context_refiner.0.norm1"),
    ("context_refiner.1.attention_norm1", "context_refiner.1.norm1"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
    ("final_layer.linear", "norm_out.linear_2"),
    ("attention_norm1", "norm1.norm"),
    ("attention_norm2", "norm2"),
    ("cap_embedder", "time_caption_embed.caption_embedder"),
    ("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
    ("attention", "attn"),
    (".out.", ".to_out.0."),
    ("k_norm", "norm_k"),
    ("q_norm", "norm_q"),
    ("w1", "linear_1"),
    ("w2", "linear_2"),
    ("w3", "linear_3"),
    ("adaLN_modulation.1", "norm1.linear"),
]
Z_IMAGE: Replacements = [
    ("final_layer.", "all_final_layer.2-1."),
    ("x_embedder.", "all_x_embedder.2-1."),
    (".attention.k_norm.", ".attention.norm_k."),
    (".attention.q_norm.", ".attention.norm_q."),
    (".attention.out.", ".attention.to_out.0."),
]
REPLACEMENTS = {
    "Wan": WAN,
    "Anima": ANIMA,
    "Krea 2": KREA,
    "Flux 2": FLUX2,
    "Lumina 2": LUMINA,
    "Z-Image": Z_IMAGE,
    "Qwen-Image": [],
    "Ernie-Image": [],
}
"""In the order in which they are made. Qwen-Image and Ernie-Image have one name for each layer."""


def diffusers(model: str, parameters: Collection[str], queries: int, values: int) -> Places:
    """diffusers' names. queries, values: rows of one layer's queries, and of its keys or values."""
    places: dict[str, Place] = {}
    for path, place in authors(parameters).items():
        new = f"{path}."
        for old, name in REPLACEMENTS[model]:
            if old == "blocks" and not new.startswith("blocks."):
                continue
            new = new.replace(old, name)
        if model == "Krea 2" and new.startswith("blocks."):
            new = f"transformer_{new}"
        new = new.removesuffix(".")
        if new.endswith("img_attn.qkv"):
            places |= thirds(new.removesuffix("img_attn.qkv"), TO_QKV, place.module, queries)
        elif new.endswith("txt_attn.qkv"):
            places |= thirds(new.removesuffix("txt_attn.qkv"), ADDED_QKV, place.module, queries)
        elif new.endswith(".qkv"):
            places |= _grouped(new.removesuffix("qkv"), place.module, queries, values)
        else:
            swapped = model == "Flux 2" and new == "norm_out.linear"
            places[new] = Place(place.module, swapped=swapped, attribute=place.attribute)
    return places


def _grouped(path: str, module: str, queries: int, values: int) -> Places:
    """q, k and v of attention in which several heads of queries share one of keys and values."""
    return {
        f"{path}to_q": Place(module, (0, queries)),
        f"{path}to_k": Place(module, (queries, values)),
        f"{path}to_v": Place(module, (queries + values, values)),
    }


def parameters(model: str) -> Iterator[str]:
    """The parameters that files may concern, in a model of two blocks of each kind, in the authors' names."""
    for block, parts in BLOCKS[model].items():
        for number in range(2):
            yield from (f"diffusion_model.{block}.{number}.{_weight(model, part)}" for part in parts)
    yield from (f"diffusion_model.{_weight(model, name)}" for name in OUTSIDE[model])


def _weight(model: str, module: str) -> str:
    norm = module.rpartition(".")[2] in ("prenorm", "postnorm", "qnorm", "knorm", "norm", "0")
    scale = model == "Krea 2" and norm and module != "tmlp.0"
    return f"{module}.{'scale' if scale else 'weight'}"


_WAN = [f"{a}_attn.{part}" for a in ("self", "cross") for part in ("q", "k", "v", "o", "norm_q", "norm_k")]
_WAN += ["cross_attn.k_img", "cross_attn.v_img", "cross_attn.norm_k_img", "ffn.0", "ffn.2", "norm3"]
_ANIMA = [
    f"{attn}_attn.{part}"
    for attn in ("self", "cross")
    for part in ("q_proj", "k_proj", "v_proj", "output_proj", "q_norm", "k_norm")
]
_KREA = [f"attn.{part}" for part in ("wq", "wk", "wv", "wo", "gate", "qknorm.qnorm", "qknorm.knorm")]
_KREA += ["mlp.gate", "mlp.up", "mlp.down", "prenorm", "postnorm"]
_CONTEXT = [f"attention.{part}" for part in ("qkv", "out", "q_norm", "k_norm")]
_CONTEXT += [f"feed_forward.w{number}" for number in (1, 2, 3)]
_CONTEXT += ["attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"]
_DOUBLE = [
    f"{stream}_{part}"
    for stream in ("img", "txt")
    for part in ("attn.qkv", "attn.proj", "attn.norm.query_norm", "attn.norm.key_norm", "mlp.0", "mlp.2")
]
_QWEN = [f"attn.{part}" for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")]
_QWEN += [f"attn.{part}" for part in ("to_out.0", "to_add_out", "norm_q", "norm_k", "norm_added_q")]
_QWEN += ["attn.norm_added_k"]
_QWEN += [f"{s}_{part}" for s in ("img", "txt") for part in ("mod.1", "mlp.net.0.proj", "mlp.net.2")]


def _next_dit(modulation: str) -> dict[str, list[str]]:
    whole = [*_CONTEXT, modulation]
    return {"layers": whole, "noise_refiner": whole, "context_refiner": _CONTEXT}


BLOCKS = {
    "Wan": {"blocks": _WAN},
    "Anima": {
        "blocks": [
            *_ANIMA,
            *(f"adaln_modulation_{n}.{i}" for n in ("self_attn", "cross_attn", "mlp") for i in (1, 2)),
            *("mlp.layer1", "mlp.layer2"),
        ]
    },
    "Krea 2": dict.fromkeys(("blocks", "txtfusion.layerwise_blocks", "txtfusion.refiner_blocks"), _KREA),
    "Flux 2": {
        "double_blocks": _DOUBLE,
        "single_blocks": ["linear1", "linear2", "norm.query_norm", "norm.key_norm"],
    },
    "Lumina 2": _next_dit("adaLN_modulation.1"),
    "Z-Image": _next_dit("adaLN_modulation.0"),
    "Qwen-Image": {"transformer_blocks": _QWEN},
    "Ernie-Image": {
        "layers": [
            *(f"self_attention.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc2", "adaLN_sa_ln", "adaLN_mlp_ln"),
        ]
    },
}
_LUMINA_OUTSIDE = [
    *("x_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1"),
    *("final_layer.linear", "final_layer.adaLN_modulation.1"),
]
OUTSIDE = {
    "Wan": [
        *("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
        *("time_projection.1", "head.head", *(f"img_emb.proj.{n}" for n in (0, 1, 3, 4))),
    ],
    "Anima": [
        *("x_embedder.proj.1", "t_embedder.1.linear_1", "t_embedder.1.linear_2", "t_embedding_norm"),
        *("final_layer.linear", "final_layer.adaln_modulation.1", "final_layer.adaln_modulation.2"),
    ],
    "Krea 2": [
        *("first", "tmlp.0", "tmlp.2", "tproj.1", "txtmlp.0", "txtmlp.1", "txtmlp.3", "last.linear"),
        *("last.norm", "txtfusion.projector"),
    ],
    "Flux 2": [
        *("img_in", "txt_in", "time_in.in_layer", "time_in.out_layer", "final_layer.linear"),
        *("double_stream_modulation_img.lin", "double_stream_modulation_txt.lin"),
        *("single_stream_modulation.lin", "final_layer.adaLN_modulation.1"),
    ],
    "Lumina 2": _LUMINA_OUTSIDE,
    "Z-Image": _LUMINA_OUTSIDE,
    "Qwen-Image": [
        *("img_in", "txt_in", "txt_norm", "norm_out.linear", "proj_out"),
        *(f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)),
    ],
    "Ernie-Image": [
        *("x_embedder.proj", "text_proj", "time_embedding.linear_1", "time_embedding.linear_2"),
        *("adaLN_modulation.1", "final_norm.linear", "final_linear"),
    ],
}
