"""What a key looks like that no layer takes: which model it speaks of, and whether that is another one."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from lib_precision_lora.names.architectures import describe_leftover, foreign, kind_of, unreadable
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
    model_of,
)
from tests.trainer_files import EVERY_OF_NEO, NEO_LAYOUTS, make_file
from tests.trainer_models import parameters, places_of, shape_in

KEYS: Mapping[str, tuple[str, str | None]] = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.alpha": ("SD 1.5 or SDXL", UNET),
    "unet.mid_block.attentions.0.proj_in.lora_A.weight": ("SD 1.5 or SDXL", UNET),
    "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": ("SD 1.5 or SDXL", UNET),
    "lora_unet_double_blocks_3_img_mlp_0.lora_up.weight": ("Flux, Chroma or Flux 2", FLUX),
    "double_blocks.3.processor.qkv_lora1.down.weight": ("Flux or Chroma", FLUX),
    "lora_unet_single_blocks_3_linear1.lora_up.weight": ("Hunyuan Video, Flux or Flux 2", FLUX),
    "transformer.single_transformer_blocks.3.proj_out.lora_A.weight": ("Flux or Hunyuan", FLUX),
    "base_model.model.transformer_blocks.3.attn.to_q.lora_A.default.weight": ("SD 3, Flux", SD3),
    "lora_unet_joint_blocks_3_x_block_attn_qkv.lora_up.weight": ("SD 3", SD3),
    "lora_unet_distilled_guidance_layer_in_proj.lora_up.weight": ("Flux or Chroma", FLUX),
    "diffusion_model.blocks.3.self_attn.q.lora_A.weight": ("Wan", WAN),
    "lora_unet_blocks_3_ffn_0.lora_down.weight": ("Wan", WAN),
    "lora_unet_double_blocks_3_img_mlp_fc1.lora_down.weight": ("Hunyuan Video", None),
    "lora_unet_single_blocks_3_modulation_linear.lora_down.weight": ("Hunyuan Video", None),
    "transformer.transformer_blocks.3.img_mlp.net.2.lora_A.weight": ("Qwen-Image", QWEN),
    "transformer.transformer_blocks.3.attn1.to_q.lora_A.weight": ("PixArt, LTX-Video or Anima", ANIMA),
    "diffusion_model.layers.3.attention.qkv.lora_A.weight": ("Lumina 2 or Z-Image", LUMINA),
    "diffusion_model.double_stream_blocks.3.block.ff.lora_A.weight": ("HiDream", None),
    "lora_prior_unet_down_blocks_0_1.lora_up.weight": ("Stable Cascade", None),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": ("text encoder CLIP-L", None),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": ("text encoder CLIP-G", None),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": ("text encoder CLIP-G", None),
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha": ("text encoder T5", None),
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": ("text encoder T5", None),
    "bundle_emb.cat.clip_l": ("textual inversions", None),
    "emb_params": ("textual inversions", None),
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.oft_R.weight": ("SD 1.5 or SDXL", UNET),
    "oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.0": ("kohya's OFT for Flux", None),
    "lora_unet_blocks_3_cross_attn_k_img.lora_down.weight": ("Wan", WAN),
    "lora_unet_blocks_3_self_attn_q_proj.lora_down.weight": ("Anima", ANIMA),
    "diffusion_model.llm_adapter.blocks.0.mlp.0.lora_A.weight": ("Anima", ANIMA),
    "diffusion_model.blocks.3.attn.wq.lora_A.weight": ("Krea 2", KREA),
    "transformer.transformer_blocks.3.ff.gate.lora_A.weight": ("Krea 2", KREA),
    "lora_unet_layers_3_attention_to_q.lora_down.weight": ("Z-Image", Z_IMAGE),
    "transformer.layers.3.attn.to_q.lora_A.weight": ("Lumina 2", LUMINA),
    "diffusion_model.layers.3.self_attention.to_q.lora_A.weight": ("Ernie-Image", ERNIE),
    "diffusion_model.double_stream_modulation_img.lin.lora_A.weight": ("Flux 2", FLUX2),
    "lora_unet_double_blocks_3_img_mod_lin.lora_down.weight": ("Flux or Chroma", FLUX),
    "something.else": ("no layout", None),
}
"""A key → what it is called, and the model among ours of which it speaks."""


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_called_by_the_layout_it_resembles(key: str) -> None:
    label, model = KEYS[key]
    kind = kind_of(key)
    assert kind.label.startswith(label)
    assert (model in kind.models) == (model is not None)


@pytest.mark.parametrize("model", [UNET, FLUX, SD3])
def test_no_models_own_names_are_foreign_to_it(model: str) -> None:
    own = [key for key, (_, speaks_of) in KEYS.items() if speaks_of == model]
    assert len(own) > 1
    assert foreign(own, model) == ((), "")


@pytest.mark.parametrize(("model", "layout"), EVERY_OF_NEO)
def test_no_file_of_one_of_neos_models_is_foreign_to_it(model: str, layout: str) -> None:
    form, known, shape = NEO_LAYOUTS[model][layout], parameters(model), shape_in(model)
    state, _ = make_file(form, places_of(model, form.paths), {name: shape(name) for name in known})
    assert foreign(state, model_of(known)) == ((), "")
    assert model_of(known) == model
    assert foreign(state, UNET)[0], "and it is to another"


def test_keys_of_another_model_are_named_by_what_they_have_in_common() -> None:
    flux = [key for key, (_, model) in KEYS.items() if model == FLUX]
    assert foreign([*flux, "something.else", "emb_params"], UNET) == (tuple(flux), "Flux or Chroma")
    wan_and_qwen = [key for key, (label, _) in KEYS.items() if label in ("Wan", "Qwen-Image")]
    assert set(foreign(wan_and_qwen, UNET)[0]) == set(wan_and_qwen)
    assert foreign(wan_and_qwen, UNET)[1] == "Qwen-Image and Wan"


def test_nothing_is_foreign_to_a_model_that_is_not_known() -> None:
    assert model_of(["diffusion_model.unknown.0.attn.weight", "clip_l.transformer.x"]) is None
    assert foreign(KEYS, None) == ((), "")


@pytest.mark.parametrize(
    ("parameter", "model"),
    [
        ("diffusion_model.input_blocks.0.0.weight", UNET),
        ("diffusion_model.double_blocks.0.img_mlp.0.weight", FLUX),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", SD3),
    ],
)
def test_a_model_is_known_by_its_blocks(parameter: str, model: str) -> None:
    assert model_of(["diffusion_model.time_embed.0.weight", parameter]) == model


def test_the_logs_clause_counts_each_kind_and_names_the_first() -> None:
    keys = [f"lora_te3_encoder_block_{index}_layer_0_SelfAttention_q.alpha" for index in range(20)]
    clause = describe_leftover(["strange", *keys], shown=2)
    assert clause == (
        f"20 of text encoder T5 ({keys[0]}, {keys[1]}, …); 1 of no layout that is known (strange)"
    )


FORMS: Mapping[str, tuple[list[str], str]] = {
    "Nunchaku": (
        ["transformer_blocks.0.qkv_proj.lora_down", "single_transformer_blocks.3.mlp_fc1.lora_up"],
        "Nunchaku",
    ),
    "Nunchaku, a whole model": (["transformer.transformer_blocks.0.qkv_proj.qweight"], "Nunchaku"),
    "cloneofsimo": (["unet:0:up", "unet:0:down", "text_encoder:12:up"], "cloneofsimo"),
    "a list": (["0", "1", "2"], "cloneofsimo"),
    "textual inversion": (["emb_params"], "embeddings"),
    "kohya's OFT for Flux": (["oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.0"], "OFT"),
    "LLLite": (["lllite_unet_input_blocks_1_1_to_q.down.0.weight"], "ControlNet"),
    "IP-Adapter": (["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"], "ControlNet"),
    "a checkpoint": (["model.diffusion_model.input_blocks.0.0.weight"], "models/Stable-diffusion"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_cannot_be_read_is_named_with_what_to_do(form: str) -> None:
    keys, name = FORMS[form]
    clause = unreadable(keys)
    assert clause is not None
    assert clause.startswith("it is ")
    assert name in clause
    assert ": " in clause
    assert "another model" not in clause


READABLE = [
    "lora_unet_double_blocks_3_img_mlp_0.lora_up.weight",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "transformer.single_transformer_blocks.0.proj_out.lora_down.weight",
    "transformer.transformer_blocks.0.attn.to_q.alpha",
    "diffusion_model.double_blocks.0.img_attn.proj.lokr_w1",
    "double_blocks.3.processor.qkv_lora1.down.weight",
    "unet.down_blocks.0.attn.to_k.lora.up.weight",
    "model.diffusion_model.input_blocks.1.1.proj_in.lora_A.default.weight",
]


@pytest.mark.parametrize("key", READABLE)
def test_a_name_of_a_lora_is_no_such_form(key: str) -> None:
    assert unreadable([key]) is None


def test_the_commonest_form_counts() -> None:
    assert unreadable([*READABLE[:3], "emb_params"]) is None
    assert unreadable([]) is None
