"""A checkpoint is known by its true names and shapes: architecture, bytes in every storage type, tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_precision_lora.memory.architecture import Request
from lib_precision_lora.memory.checkpoint import Checkpoint, read_checkpoint
from lib_precision_lora.memory.headers import HeaderError
from lib_precision_lora.memory.held import STORAGES, StorageChoiceError
from lib_precision_lora.memory.host_estimate import host_inference_bytes
from tests.memory.checkpoints import (
    MODEL,
    Shapes,
    as_nf4,
    chroma,
    clip_g,
    clip_l,
    flux,
    sd2_unet,
    sd3,
    sd15_unet,
    sdxl_refiner_unet,
    sdxl_unet,
    stored_as,
    write_hole,
)

ARCHITECTURES: dict[str, tuple[Callable[[], Shapes], int]] = {
    "SD 1.5": (sd15_unet, 859_520_964),
    "SD 2": (sd2_unet, 865_910_724),
    "SDXL": (sdxl_unet, 2_567_463_684),
    "SDXL refiner": (sdxl_refiner_unet, 2_259_526_660),
    "SD 3 medium": (lambda: sd3(24), 2_084_951_104),
    "SD 3.5 medium": (lambda: sd3(24, dual=True), 2_299_786_816),
    "SD 3.5 large": (lambda: sd3(38), 8_146_271_040),
    "Flux dev": (flux, 11_901_408_320),
    "Flux schnell": (lambda: flux(guidance=False), 11_891_178_560),
    "Chroma": (chroma, 8_899_983_424),
}
"""Name → shapes and number of parameters, as the models' own classes count them."""


def checkpoint_of(path: Path, shapes: Shapes, stored: str = "F16", prefix: str = MODEL) -> Checkpoint:
    return read_checkpoint(write_hole(path / "model.safetensors", stored_as(stored, shapes, prefix)))


@pytest.mark.parametrize("prefix", [MODEL, ""])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_known_with_and_without_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    make, parameters = ARCHITECTURES[name]
    shapes = make()
    checkpoint = checkpoint_of(tmp_path, shapes, prefix=prefix)
    assert checkpoint.architecture.name == name
    assert (checkpoint.model.parameters, checkpoint.model.file_bytes) == (parameters, 2 * parameters)
    matrices = {n.removesuffix(".weight") for n, shape in shapes.items() if len(shape) in (2, 4)}
    assert {layer.name for layer in checkpoint.model.layers} == matrices


@pytest.mark.parametrize(
    "shapes",
    [{"a.weight": (3, 4)}, {"input_blocks.0.0.weight": (320, 4, 3, 3)}, clip_l(), {}],
    ids=["a matrix", "a UNet without attention", "a text encoder", "nothing"],
)
def test_what_is_no_diffusion_model_is_refused(shapes: Shapes, tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match=r"is it a checkpoint of another model, or a LoRA\?"):
        checkpoint_of(tmp_path, shapes, prefix="")


def test_a_whole_checkpoint_is_told_apart_into_its_components(tmp_path: Path) -> None:
    tensors = {
        **stored_as("F16", sdxl_unet(), MODEL),
        **stored_as("F16", clip_l(), "conditioner.embedders.0.transformer."),
        **stored_as("F16", clip_g(), "conditioner.embedders.1.model."),
        "first_stage_model.decoder.conv_in.weight": ("F32", (512, 4, 3, 3)),
        "model_ema.decay": ("F32", ()),
    }
    checkpoint = read_checkpoint(write_hole(tmp_path / "xl.safetensors", tensors))
    parameters = {name: component.parameters for name, component in checkpoint.components.items()}
    assert parameters == {
        "diffusion model": 2_567_463_684,
        "CLIP-L": 123_060_480,
        "CLIP-G": 694_659_840,
        "VAE": 512 * 4 * 9,
        "other": 1,
    }
    layers = {layer.name: layer for layer in checkpoint.components["CLIP-G"].layers}
    assert len(layers) == 32 * 6 + 1
    assert layers["text_model.encoder.layers.31.self_attn.v_proj"].rows == 1280
    assert layers["text_model.encoder.layers.0.mlp.fc1"].rows == 5120
    assert len(checkpoint.components["CLIP-L"].layers) == 12 * 6


def test_a_flux_takes_what_its_storage_type_says(tmp_path: Path) -> None:
    shapes = flux()
    model = checkpoint_of(tmp_path, shapes, "BF16").model
    n = model.parameters
    matrices = [math.prod(shape) for shape in shapes.values() if len(shape) == 2]
    packed = sum(size // 2 + size // 64 * 4 + 64 for size in matrices) + 2 * (n - sum(matrices))
    expected = {"as-is": 2 * n, "fp16": 2 * n, "bf16": 2 * n, "fp8": n, "nf4": packed, "fp4": packed}
    assert {storage: model.held_bytes(storage) for storage in STORAGES} == expected
    assert packed < 0.6 * n


def test_four_bits_are_counted_as_bitsandbytes_stores_them(tmp_path: Path) -> None:
    shapes = flux(hidden=128, double=1, single=1)
    model = checkpoint_of(tmp_path, shapes, "F16").model
    expected = 0
    for shape in shapes.values():
        values = torch.ones(shape, dtype=torch.float16)
        if len(shape) == 2:
            packed, state = bnb.quantize_4bit(values, blocksize=64, quant_type="nf4")
            expected += packed.nbytes + state.absmax.nbytes + state.code.nbytes
        else:
            expected += values.nbytes
    assert model.held_bytes("nf4") == expected


def test_convolutions_are_not_packed(tmp_path: Path) -> None:
    shapes = sd15_unet()
    model = checkpoint_of(tmp_path, shapes).model
    matrices = [math.prod(shape) for shape in shapes.values() if len(shape) == 2]
    rest = model.parameters - sum(matrices)
    assert rest > sum(matrices)
    assert model.held_bytes("nf4") == sum(size // 2 + size // 16 + 64 for size in matrices) + 2 * rest


@pytest.mark.parametrize(("stored", "each"), [("F32", 2), ("F16", 2), ("BF16", 2), ("F8_E4M3", 1)])
def test_as_is_means_what_the_host_makes_of_the_files_type(stored: str, each: int, tmp_path: Path) -> None:
    model = checkpoint_of(tmp_path, sd15_unet(), stored).model
    assert model.held_bytes("as-is") == each * model.parameters
    assert model.held_bytes("fp8") == model.parameters


def test_a_packed_checkpoint_is_read_with_its_logical_shapes(tmp_path: Path) -> None:
    shapes = flux()
    tensors, states = as_nf4(shapes)
    model = read_checkpoint(write_hole(tmp_path / "nf4.safetensors", tensors, states)).model
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == shapes
    assert model.stored == "NF4"
    matrices = [math.prod(shape) for shape in shapes.values() if len(shape) == 2]
    rest = model.parameters - sum(matrices)
    expected = sum(size // 2 + size // 16 + 64 for size in matrices) + 2 * rest
    assert model.held_bytes() == model.held_bytes("nf4") == expected
    with pytest.raises(StorageChoiceError, match="stored as NF4, which the host does not convert to fp8"):
        model.held_bytes("fp8")


def test_a_packed_weight_with_a_damaged_state_is_named(tmp_path: Path) -> None:
    tensors, states = as_nf4(flux(hidden=128, double=1, single=1))
    key = next(iter(states))
    with pytest.raises(HeaderError, match=r"quant_state.bitsandbytes__nf4 cannot be read"):
        read_checkpoint(write_hole(tmp_path / "a.safetensors", tensors, states | {key: b"\0" * 50}))
    wrong = states[key].replace(b"[", b"[7, ")
    tensors[key] = ("U8", (len(wrong),))
    with pytest.raises(HeaderError, match="its quant state says shape"):
        read_checkpoint(write_hole(tmp_path / "b.safetensors", tensors, states | {key: wrong}))


@pytest.mark.parametrize(("kind", "held"), [("Q8_0", 34 / 32), ("Q4_0", 18 / 32), ("Q4_K", 160 / 256)])
def test_a_gguf_flux_stays_as_stored_but_q4_k_unpacks_its_scales(
    kind: str, held: float, tmp_path: Path
) -> None:
    shapes = flux(hidden=256, double=1, single=1)
    writer = gguf.GGUFWriter(tmp_path / "flux.gguf", "flux")
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    packed = rest = 0
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[1] % 256 == 0:
            values = np.zeros((shape[0], shape[1] // block * size), np.uint8)
            writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind])
            packed += math.prod(shape)
        else:
            writer.add_tensor(name, np.zeros(shape, np.float32))
            rest += math.prod(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = read_checkpoint(tmp_path / "flux.gguf")
    assert (checkpoint.architecture.name, checkpoint.layout) == ("Flux dev", "GGUF")
    assert checkpoint.model.held_bytes() == packed * held + 2 * rest
    with pytest.raises(StorageChoiceError, match="stored as GGUF"):
        checkpoint.model.held_bytes("nf4")


@pytest.mark.parametrize(
    ("make", "size", "expected"),
    [
        (
            sd15_unet,
            (512, 768),
            {
                "input_blocks.0.0": 96 * 64,
                "input_blocks.1.1.transformer_blocks.0.attn1.to_q": 96 * 64,
                "input_blocks.1.1.transformer_blocks.0.attn2.to_q": 96 * 64,
                "input_blocks.1.1.transformer_blocks.0.attn2.to_k": 77,
                "input_blocks.1.0.emb_layers.1": 1,
                "time_embed.0": 1,
                "input_blocks.3.0.op": 48 * 32,
                "input_blocks.4.1.proj_in": 48 * 32,
                "middle_block.1.transformer_blocks.0.ff.net.2": 12 * 8,
                "output_blocks.2.0.in_layers.2": 12 * 8,
                "output_blocks.2.1.conv": 24 * 16,
                "output_blocks.5.1.transformer_blocks.0.attn2.to_v": 77,
                "output_blocks.5.2.conv": 48 * 32,
                "output_blocks.11.1.transformer_blocks.0.attn1.to_out.0": 96 * 64,
                "out.2": 96 * 64,
            },
        ),
        (
            sdxl_unet,
            (1000, 1016),
            {
                "input_blocks.1.0.in_layers.2": 127 * 125,
                "input_blocks.4.1.transformer_blocks.1.attn1.to_q": 64 * 63,
                "middle_block.1.transformer_blocks.9.attn1.to_q": 32 * 32,
                "label_emb.0.0": 1,
                "output_blocks.2.2.conv": 64 * 63,
            },
        ),
        (
            flux,
            (1024, 768),
            {
                "img_in": 48 * 64,
                "txt_in": 256,
                "double_blocks.0.img_attn.qkv": 48 * 64,
                "double_blocks.18.txt_mlp.2": 256,
                "double_blocks.0.img_mod.lin": 1,
                "single_blocks.37.linear1": 48 * 64 + 256,
                "single_blocks.0.modulation.lin": 1,
                "guidance_in.in_layer": 1,
                "final_layer.linear": 48 * 64,
                "final_layer.adaLN_modulation.1": 1,
            },
        ),
        (
            chroma,
            (1024, 1024),
            {"distilled_guidance_layer.layers.0.in_layer": 344, "single_blocks.0.linear2": 64 * 64 + 256},
        ),
        (
            lambda: sd3(24),
            (1024, 1024),
            {
                "x_embedder.proj": 64 * 64,
                "joint_blocks.0.x_block.attn.qkv": 64 * 64,
                "joint_blocks.0.context_block.attn.qkv": 77 + 256,
                "joint_blocks.0.context_block.adaLN_modulation.1": 1,
                "y_embedder.mlp.0": 1,
            },
        ),
    ],
    ids=["SD 1.5", "SDXL", "Flux", "Chroma", "SD 3"],
)
def test_each_layer_sees_its_own_number_of_tokens(
    make: Callable[[], Shapes], size: tuple[int, int], expected: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tmp_path, make())
    flows = {layer.name: layer.flow for layer in checkpoint.model.layers}
    for images in (1, 6):
        request = Request(*size, images=images, text_tokens=checkpoint.architecture.text_tokens)
        tokens = {name: request.tokens(flows[name]) for name in expected}
        assert tokens == {name: images * count for name, count in expected.items()}


def test_the_hosts_estimate_is_never_below_one_gibibyte_and_grows_with_pixels_and_images() -> None:
    assert host_inference_bytes(512, 512, 1) == 2**30
    assert host_inference_bytes(1024, 1024, 1) == int(1.28 * 2 * 128 * 128 * 2 * 16384)
    assert host_inference_bytes(2048, 1024, 3) == int(1.28 * 6 * 256 * 128 * 2 * 16384)


TELLING = (
    "double_blocks.0.img_attn.qkv.weight",
    "distilled_guidance_layer.in_proj.weight",
    "joint_blocks.0.context_block.attn.qkv.weight",
    "x_embedder.proj.weight",
    "input_blocks.0.0.weight",
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "input_blocks.1.0.op.weight",
    "output_blocks.0.0.in_layers.2.weight",
    "output_blocks.0.1.conv.weight",
    "output_blocks.1.2.conv.weight",
    "middle_block.1.weight",
)


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.dictionaries(
        st.sampled_from(TELLING), st.lists(st.sampled_from([0, 1, 2, 768, 1600]), max_size=3), min_size=1
    )
)
def test_known_names_of_any_shape_are_counted_or_refused(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]]
) -> None:
    path = write_hole(
        tmp_path_factory.getbasetemp() / "any.safetensors",
        {name: ("F16", shape) for name, shape in shapes.items()},
    )
    try:
        checkpoint = read_checkpoint(path)
    except HeaderError:
        return
    request = Request(64, 64, images=1, text_tokens=77)
    assert checkpoint.model.held_bytes("nf4") >= 0
    assert all(request.tokens(layer.flow) > 0 for layer in checkpoint.model.layers)
