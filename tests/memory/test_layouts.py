"""A plan finds every layer that trainers name, and its rows, in a checkpoint's header, as the reader does."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_precision_lora.memory.checkpoint import MODEL, read_checkpoint
from lib_precision_lora.memory.lora_header import LoraHeader, read_lora_header
from lib_precision_lora.memory.naming import Places
from tests.memory.checkpoints import write_hole
from tests.trainer_files import ALL_LAYOUTS, EVERY, EVERY_OF_NEO, make_file
from tests.trainer_models import HIDDEN, ROOTS, parameters, places_of, shape_in

ENCODERS = {"CLIP-L": "CLIP-L", "CLIP-G": "CLIP-G", "T5": "T5"}
CONTEXT = {"SD 1.5": 768, "SDXL": 2048}
"""Features of the prompt, by which a UNet is known."""


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape, in the host's names; the prompt's layers of a UNet have their true width."""
    shapes = {parameter: shape_in(model)(parameter) for parameter in parameters(model)}
    for parameter in shapes:
        if parameter.endswith("attn2.to_k.weight"):
            shapes[parameter] = HIDDEN, CONTEXT.get(model, HIDDEN)
    return shapes


def places_in(model: str, path: Path) -> Places:
    """Those of a checkpoint of this model; an encoder's beside a UNet."""
    shapes = shapes_of(model)
    if model in ENCODERS:
        shapes |= shapes_of("SD 1.5")
    named = {
        ("model." if name.startswith("diffusion_model.") else "text_encoders.") + name: ("F16", shape)
        for name, shape in shapes.items()
    }
    return Places(read_checkpoint(write_hole(path / "model.safetensors", named)))


def read_lora(path: Path, tensors: dict[str, tuple[int, ...]], places: Places) -> LoraHeader:
    file = write_hole(path / "lora.safetensors", {key: ("F32", shape) for key, shape in tensors.items()})
    return read_lora_header(file, places)


@pytest.mark.parametrize(("model", "layout"), [*EVERY, *EVERY_OF_NEO])
def test_every_name_finds_its_layer_and_its_rows(model: str, layout: str, tmp_path: Path) -> None:
    form, shapes, places = ALL_LAYOUTS[model][layout], shapes_of(model), places_in(model, tmp_path)
    root = ROOTS.get(model, "diffusion_model.")
    expected, actual = {}, {}
    for path, place in places_of(model, form.paths).items():
        state, _ = make_file(form, {path: place}, shapes)
        if not state:
            continue
        header = read_lora(tmp_path, {key: tuple(tensor.shape) for key, tensor in state.items()}, places)
        assert (header.unknown, header.unmatched) == ((), ())
        start, length = place.rows or (0, shapes[place.parameter][0])
        if form.writer == "XLabs" and path.endswith("linear1"):
            length = 3 * HIDDEN
        module = place.module.removeprefix(root)
        expected[path] = [(ENCODERS.get(model, MODEL), module, start, start + length)]
        actual[path] = [
            (found.component, found.layer.name, found.start, found.stop)
            for layer in (*header.model, *header.text)
            if (found := layer.place) is not None and layer.fits_its_place
        ]
        assert bool(header.text) == (model in ENCODERS)
    assert len(expected) > 3
    assert actual == expected


@pytest.mark.parametrize("name", ["transformer.transformer_blocks.9.attn.to_q", "lora_unet_other_blocks_0"])
def test_a_name_that_no_layer_has_finds_none(name: str, tmp_path: Path) -> None:
    pair = {f"{name}.lora_A.weight": (2, HIDDEN), f"{name}.lora_B.weight": (HIDDEN, 2)}
    header = read_lora(tmp_path, pair, places_in("Flux", tmp_path))
    assert header.unmatched == (name,)


def test_a_control_loras_whole_norms_are_of_their_layers(tmp_path: Path) -> None:
    norm = "double_blocks.0.img_attn.norm.key_norm"
    tensors = {
        "img_in.lora_A.weight": (2, 16),
        "img_in.lora_B.weight": (HIDDEN, 2),
        f"{norm}.scale": (HIDDEN,),
    }
    header = read_lora(tmp_path, tensors, places_in("Flux", tmp_path))
    assert {layer.place.layer.name: layer.kind for layer in header.model if layer.place} == {
        "img_in": "lora",
        norm: "diff",
    }
    assert header.unknown == ()
    del tensors["img_in.lora_A.weight"], tensors["img_in.lora_B.weight"]
    tensors |= {"txt_in.lora_A.weight": (2, HIDDEN), "txt_in.lora_B.weight": (HIDDEN, 2)}
    header = read_lora(tmp_path, tensors, places_in("Flux", tmp_path))
    assert header.unknown == (f"{norm}.scale",), "beside no LoRA of the input it is a checkpoint's key"
