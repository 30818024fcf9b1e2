"""A LoRA's header tells kinds, ranks, places, and the bytes that its branches make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lib_precision_lora.adapters import read_adapters
from lib_precision_lora.memory.architecture import Flow, Request
from lib_precision_lora.memory.checkpoint import Layer, read_checkpoint
from lib_precision_lora.memory.headers import HeaderError
from lib_precision_lora.memory.lora_footprints import factor_sizes, workspace_bytes
from lib_precision_lora.memory.lora_header import LoraHeader, read_lora_header
from lib_precision_lora.memory.naming import Place, Places
from lib_precision_lora.names.endings import ENDINGS
from tests.families import FAMILIES, family
from tests.memory.checkpoints import (
    MODEL,
    Shapes,
    chroma,
    clip_g,
    clip_l,
    flux,
    sd15_unet,
    sdxl_unet,
    stored_as,
    write_hole,
)

ROWS, COLUMNS = 64, 96
LAYER = Layer("layer", ROWS, COLUMNS, (), "F16", 2 * ROWS * COLUMNS, Flow("image"))


class OneLayer:
    """A checkpoint of one layer, to which every name belongs."""

    def find(self, name: str) -> Place:
        return Place("diffusion model", LAYER, 0, ROWS)


def lora_header(path: Path, tensors: dict[str, Tensor]) -> LoraHeader:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return read_lora_header(path, OneLayer())  # type: ignore[arg-type]


def of_family(name: str) -> dict[str, Tensor]:
    return {f"layer.{key}": value for key, value in family(name, (ROWS, COLUMNS)).tensors.items()}


def test_a_sparse_rest_of_nothing_is_no_factor_without_values(tmp_path: Path) -> None:
    """As the reader has it (`tests/adapters/test_sparse_rest.py`)."""
    rest = {"indices": torch.zeros(2, 0).long(), "values": torch.zeros(0), "size": torch.tensor([64, 96])}
    tensors = of_family("lora") | {f"layer.bias_{part}": value for part, value in rest.items()}
    assert read_adapters(tensors)["layer"].kind == "lora with a sparse rest"
    (layer,) = lora_header(tmp_path / "lora.safetensors", tensors).model
    assert layer.kind == "lora"


@pytest.mark.parametrize("name", FAMILIES)
def test_kind_and_rank_are_what_the_reader_says(name: str, tmp_path: Path) -> None:
    tensors = of_family(name)
    header = lora_header(tmp_path / "a.safetensors", tensors)
    adapter = next(iter(read_adapters(tensors).values()))
    assert len(header.model) == 1
    layer = header.model[0]
    kind = "diff" if adapter.kind == "set" else adapter.kind
    assert (layer.name, layer.kind, layer.rank) == ("layer", kind, adapter.rank)
    assert layer.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_up_and_down_are_counted_apart(tmp_path: Path) -> None:
    tensors = {
        "a.lora_up.weight": torch.zeros(64, 4, dtype=torch.float16),
        "a.lora_down.weight": torch.zeros(4, 96),
        "a.alpha": torch.tensor(2.0),
    }
    layer = lora_header(tmp_path / "a.safetensors", tensors).model[0]
    assert (layer.factors["lora_up"].nbytes, layer.factors["lora_down"].nbytes, layer.nbytes) == (
        2 * 64 * 4,
        4 * 4 * 96,
        2048 + 4,
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": torch.zeros(3, 3)}, "none of its 1 tensors has a name of a LoRA"),
        ({"a.lora_up.weight": torch.zeros(3, 0), "a.lora_down.weight": torch.zeros(0, 3)}, "holds no values"),
    ],
)
def test_what_holds_no_lora_is_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match=message):
        lora_header(tmp_path / "a.safetensors", tensors)


def places_of(path: Path, *components: tuple[Shapes, str]) -> Places:
    tensors = {}
    for shapes, prefix in components:
        tensors |= stored_as("F16", shapes, prefix)
    return Places(read_checkpoint(write_hole(path / "model.safetensors", tensors)))


def test_a_layer_that_a_file_names_twice_is_counted_once(tmp_path: Path) -> None:
    names = ("lora_unet_double_blocks_3_img_attn_qkv", "transformer.double_blocks.3.img_attn.qkv")
    tensors = {
        f"{name}.{ending}": ("F16", shape)
        for name in names
        for ending, shape in (("lora_up.weight", (9216, 4)), ("lora_down.weight", (4, 3072)))
    }
    part = "transformer.transformer_blocks.3.attn.to_k"
    tensors |= {f"{part}.lora_B.weight": ("F16", (3072, 4)), f"{part}.lora_A.weight": ("F16", (4, 3072))}
    places = places_of(tmp_path, (flux(), MODEL))
    header = read_lora_header(write_hole(tmp_path / "lora.safetensors", tensors), places)
    assert [layer.name for layer in header.model] == [names[0], part], "some of its rows are another place"
    assert set(header.unknown) == {key for key in tensors if key.startswith(names[1])}


def test_the_bias_of_a_layer_under_another_name_is_a_parameter_of_its_own(tmp_path: Path) -> None:
    names = ("lora_unet_img_in", "transformer.img_in")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{names[0]}.lora_up.weight": ("F16", (3072, 4)),
        f"{names[0]}.lora_down.weight": ("F16", (4, 64)),
        f"{names[1]}.diff_b": ("F16", (3072,)),
    }
    places = places_of(tmp_path, (flux(), MODEL))
    header = read_lora_header(write_hole(tmp_path / "lora.safetensors", tensors), places)
    assert [layer.name for layer in header.model] == list(names)
    assert header.unknown == ()


FLUX_NAMES = {
    "lora_unet_double_blocks_3_img_attn_qkv": ("double_blocks.3.img_attn.qkv", 0, 9216),
    "double_blocks.3.img_attn.qkv": ("double_blocks.3.img_attn.qkv", 0, 9216),
    "diffusion_model.single_blocks.0.linear1": ("single_blocks.0.linear1", 0, 21504),
    "transformer.transformer_blocks.3.attn.to_q": ("double_blocks.3.img_attn.qkv", 0, 3072),
    "transformer.transformer_blocks.3.attn.to_k": ("double_blocks.3.img_attn.qkv", 3072, 6144),
    "transformer.transformer_blocks.3.attn.add_v_proj": ("double_blocks.3.txt_attn.qkv", 6144, 9216),
    "lora_transformer_transformer_blocks_3_ff_net_0_proj": ("double_blocks.3.img_mlp.0", 0, 12288),
    "lycoris_transformer_blocks_3_ff_context_net_2": ("double_blocks.3.txt_mlp.2", 0, 3072),
    "base_model.model.transformer_blocks.3.attn.to_out.0": ("double_blocks.3.img_attn.proj", 0, 3072),
    "transformer.single_transformer_blocks.7.attn.to_v": ("single_blocks.7.linear1", 6144, 9216),
    "transformer.single_transformer_blocks.7.proj_mlp": ("single_blocks.7.linear1", 9216, 21504),
    "transformer.single_transformer_blocks.7.proj_out": ("single_blocks.7.linear2", 0, 3072),
    "transformer.single_transformer_blocks.7.norm.linear": ("single_blocks.7.modulation.lin", 0, 9216),
    "transformer.x_embedder": ("img_in", 0, 3072),
    "transformer.proj_out": ("final_layer.linear", 0, 64),
    "double_blocks.3.processor.qkv_lora1": ("double_blocks.3.img_attn.qkv", 0, 9216),
    "single_blocks.7.processor.qkv_lora": ("single_blocks.7.linear1", 0, 9216),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": ("text_model.encoder.layers.0.mlp.fc1", 0, 3072),
}
SDXL_NAMES = {
    "lora_unet_input_blocks_4_1_proj_in": ("input_blocks.4.1.proj_in", 0, 640),
    "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": (
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k",
        0,
        640,
    ),
    "unet.mid_block.attentions.0.transformer_blocks.9.attn1.processor.to_out": (
        "middle_block.1.transformer_blocks.9.attn1.to_out.0",
        0,
        1280,
    ),
    "lora_unet_up_blocks_0_upsamplers_0_conv": ("output_blocks.2.2.conv", 0, 1280),
    "lora_unet_down_blocks_0_downsamplers_0_conv": ("input_blocks.3.0.op", 0, 320),
    "lora_unet_up_blocks_2_resnets_2_conv_shortcut": ("output_blocks.8.0.skip_connection", 0, 320),
    "lora_unet_add_embedding_linear_1": ("label_emb.0.0", 0, 1280),
    "lora_te1_text_model_encoder_layers_11_self_attn_q_proj": (
        "text_model.encoder.layers.11.self_attn.q_proj",
        0,
        768,
    ),
    "lora_te2_text_model_encoder_layers_31_self_attn_k_proj": (
        "text_model.encoder.layers.31.self_attn.k_proj",
        0,
        1280,
    ),
    "text_encoder_2.text_model.encoder.layers.31.mlp.fc2": ("text_model.encoder.layers.31.mlp.fc2", 0, 1280),
}


def found(places: Places, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for name in names:
        place = places.find(name)
        yield name, None if place is None else (place.layer.name, place.start, place.stop)


def test_names_of_every_trainer_find_their_rows_of_a_flux(tmp_path: Path) -> None:
    places = places_of(tmp_path, (flux(), MODEL), (clip_l(), "text_encoders.clip_l.transformer."))
    assert dict(found(places, FLUX_NAMES)) == FLUX_NAMES


def test_names_of_every_trainer_find_their_layers_of_an_sdxl(tmp_path: Path) -> None:
    places = places_of(
        tmp_path,
        (sdxl_unet(), MODEL),
        (clip_l(), "conditioner.embedders.0.transformer."),
        (clip_g(), "conditioner.embedders.1.model."),
    )
    assert dict(found(places, SDXL_NAMES)) == SDXL_NAMES


def test_names_of_another_model_find_nothing(tmp_path: Path) -> None:
    names = [name for name in FLUX_NAMES if "lora_te" not in name]
    places = places_of(tmp_path, (sd15_unet(), MODEL))
    assert dict(found(places, names)) == dict.fromkeys(names)
    names = ["lora_unet_double_blocks_19_img_attn_qkv", "transformer.transformer_blocks.0.attn.to_x", "", "."]
    places = places_of(tmp_path, (chroma(), MODEL))
    assert dict(found(places, names)) == dict.fromkeys(names)


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.dictionaries(
        st.sampled_from(sorted(ENDINGS)), st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=6
    )
)
def test_factors_of_any_shape_are_counted_or_refused(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_hole(path, {f"layer{ending}": ("F32", shape) for ending, shape in shapes.items()})
    try:
        header = read_lora_header(path, OneLayer())  # type: ignore[arg-type]
    except HeaderError:
        return
    request = Request(64, 64, images=1, text_tokens=77)
    for half in (False, True):
        assert all(size >= 0 for size in factor_sizes(header.model, half))
        assert workspace_bytes(header.model, request, half) >= 0
    assert all(isinstance(layer.fits_its_place, bool) for layer in header.model)
