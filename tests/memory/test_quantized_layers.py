"""Headers of quantized checkpoints: bytes and logical shapes of what comfy-kitchen, or a scale, has made."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lib_precision_lora.memory.checkpoint import Component, read_checkpoint
from lib_precision_lora.memory.headers import HeaderError
from lib_precision_lora.memory.held import StorageChoiceError
from tests.memory.checkpoints import MODEL, flux, write_hole

Tensors = dict[str, tuple[str, tuple[int, ...]]]
SHAPES = flux(hidden=128, double=1, single=1)
MATRICES = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
REST = sum(math.prod(shape) for name, shape in SHAPES.items() if name not in MATRICES)


def whole(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def stored_parts(kind: str, rows: int, columns: int) -> Tensors:
    """The tensors of one layer as comfy-kitchen keeps them, by their ends."""
    if kind == "nvfp4":
        down, across = whole(rows, 16), whole(columns, 16)
        scales = (whole(down, 128), whole(across // 16, 4))
        return {
            "weight": ("U8", (down, across // 2)),
            "weight_scale": ("F8_E4M3", scales),
            "weight_scale_2": ("F32", ()),
        }
    if kind == "mxfp8":
        down, across = whole(rows, 32), whole(columns, 32)
        scales = (whole(down, 128), whole(across // 32, 4))
        return {"weight": ("F8_E4M3", (down, across)), "weight_scale": ("U8", scales)}
    if kind == "int8_tensorwise":
        return {"weight": ("I8", (rows, columns)), "weight_scale": ("F32", (rows, 1))}
    if kind == "convrot_w4a4":
        return {"weight": ("I8", (rows, columns // 2)), "weight_scale": ("F32", (rows,))}
    return {
        "weight": ({"float8_e5m2": "F8_E5M2"}.get(kind, "F8_E4M3"), (rows, columns)),
        "weight_scale": ("F32", ()),
        "input_scale": ("F32", ()),
    }


ITEM = {"F32": 4, "BF16": 2}
KINDS = {
    "float8_e4m3fn": "FP8 scaled",
    "float8_e5m2": "FP8 scaled",
    "nvfp4": "NVFP4",
    "mxfp8": "MXFP8",
    "int8_tensorwise": "INT8",
    "convrot_w4a4": "INT4",
}


def quantized(kind: str, in_metadata: bool = False) -> tuple[Tensors, dict[str, bytes], dict[str, str], int]:
    """A Flux whose matrices are quantized: tensors, those with values, metadata, and the matrices' bytes."""
    tensors: Tensors = {}
    filled, layers, nbytes = {}, {}, 0
    for name, shape in SHAPES.items():
        layer = MODEL + name.removesuffix(".weight")
        if name not in MATRICES:
            tensors[MODEL + name] = ("BF16", shape)
            continue
        parts = stored_parts(kind, *shape)
        tensors |= {f"{layer}.{end}": part for end, part in parts.items()}
        nbytes += sum(math.prod(part) * ITEM.get(stored, 1) for stored, part in parts.values())
        layers[layer] = {"format": kind}
        if not in_metadata:
            text = json.dumps(layers[layer]).encode()
            tensors[f"{layer}.comfy_quant"] = ("U8", (len(text),))
            filled[f"{layer}.comfy_quant"] = text
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if in_metadata else {}
    return tensors, filled, metadata, nbytes


def model_of(path: Path, kind: str, in_metadata: bool = False) -> tuple[Component, int]:
    tensors, filled, metadata, nbytes = quantized(kind, in_metadata)
    return read_checkpoint(write_hole(path / "model.safetensors", tensors, filled, metadata)).model, nbytes


@pytest.mark.parametrize("in_metadata", [False, True], ids=["beside the layers", "in the metadata"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_flux_takes_what_its_file_holds(kind: str, in_metadata: bool, tmp_path: Path) -> None:
    model, nbytes = model_of(tmp_path, kind, in_metadata)
    assert model.stored == KINDS[kind]
    assert model.held_bytes() == nbytes + 2 * REST
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == {
        name: padded(kind, shape) if name in MATRICES else shape for name, shape in SHAPES.items()
    }
    assert {layer.stored for layer in model.layers} == {KINDS[kind]}
    assert len(model.layers) == len(MATRICES)
    with pytest.raises(StorageChoiceError, match=rf"stored as {KINDS[kind]}, which the host does not"):
        model.held_bytes("nf4")


def padded(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    block = {"nvfp4": 16, "mxfp8": 32}.get(kind, 1)
    return tuple(whole(size, block) for size in shape)


def test_of_a_mixed_file_the_most_frequent_type_is_named_and_each_layer_counted(tmp_path: Path) -> None:
    tensors, filled, _, nbytes = quantized("nvfp4")
    layer = f"{MODEL}img_in"
    rows, columns = SHAPES["img_in.weight"]
    for end in stored_parts("nvfp4", rows, columns):
        tensors.pop(f"{layer}.{end}")
    tensors |= {f"{layer}.{end}": part for end, part in stored_parts("float8_e4m3fn", rows, columns).items()}
    text = b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'
    tensors[f"{layer}.comfy_quant"], filled[f"{layer}.comfy_quant"] = ("U8", (len(text),)), text
    model = read_checkpoint(write_hole(tmp_path / "model.safetensors", tensors, filled)).model
    assert model.stored == "NVFP4"
    exchanged = rows * columns // 2 + whole(rows, 128) * whole(columns // 16, 4) + 4
    assert model.held_bytes() == nbytes - exchanged + rows * columns + 8 + 2 * REST


@pytest.mark.parametrize("marked", [True, False])
def test_a_scaled_fp8_flux_takes_a_byte_per_weight_and_its_scales(marked: bool, tmp_path: Path) -> None:
    tensors: Tensors = {f"{MODEL}scaled_fp8": ("F8_E4M3", (2,))} if marked else {}
    for name, shape in SHAPES.items():
        layer = MODEL + name.removesuffix(".weight")
        tensors[MODEL + name] = ("F8_E4M3" if name in MATRICES else "BF16", shape)
        if name in MATRICES:
            tensors |= {f"{layer}.scale_weight": ("F32", ()), f"{layer}.scale_input": ("F32", ())}
    model = read_checkpoint(write_hole(tmp_path / "model.safetensors", tensors)).model
    assert model.stored == "FP8 scaled"
    assert set(model.tensors) == set(SHAPES)
    values = sum(math.prod(shape) for shape in MATRICES.values())
    assert model.held_bytes() == values + 8 * len(MATRICES) + 2 * REST
    assert model.held_bytes("bf16") == 2 * values + 2 * REST


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "comfy_quant cannot be read"),
        (b"[1]", "it names no format"),
        (b'{"format": 7}', "it names no format"),
        (b"\xff\xfe\x00", "comfy_quant cannot be read"),
        (b'{"format": "nvfp3"}', r"img_in has the format 'nvfp3', which is not known \(known: float8_e4m3fn"),
    ],
)
def test_a_damaged_configuration_is_named(text: bytes, said: str, tmp_path: Path) -> None:
    tensors, filled, _, _ = quantized("nvfp4")
    key = f"{MODEL}img_in.comfy_quant"
    tensors[key], filled[key] = ("U8", (len(text),)), text
    with pytest.raises(HeaderError, match=said):
        read_checkpoint(write_hole(tmp_path / "model.safetensors", tensors, filled))


@pytest.mark.parametrize("text", ["{", '{"layers": 3}', '{"layers": {"x": 3}}', '{"layers": {"x": {}}}', "["])
def test_damaged_metadata_is_named(text: str, tmp_path: Path) -> None:
    tensors, _, _, _ = quantized("nvfp4", in_metadata=True)
    path = write_hole(tmp_path / "model.safetensors", tensors, {}, {"_quantization_metadata": text})
    with pytest.raises(HeaderError, match=r"the file is damaged, download it again"):
        read_checkpoint(path)


def test_a_layer_that_is_configured_and_missing_changes_nothing(tmp_path: Path) -> None:
    tensors, filled, _, nbytes = quantized("int8_tensorwise")
    text = b'{"format": "nvfp4"}'
    tensors[f"{MODEL}gone.comfy_quant"], filled[f"{MODEL}gone.comfy_quant"] = ("U8", (len(text),)), text
    model = read_checkpoint(write_hole(tmp_path / "model.safetensors", tensors, filled)).model
    assert model.held_bytes() == nbytes + 2 * REST
