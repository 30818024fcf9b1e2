"""Checkpoints of Forge Neo's models: what is a layer, which component it is of, and what flows through it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_precision_lora.memory.architecture import Request
from lib_precision_lora.memory.checkpoint import MODEL, Checkpoint, read_checkpoint
from lib_precision_lora.memory.lora_header import read_lora_header
from lib_precision_lora.memory.naming import Places
from lib_precision_lora.names.text_encoders import ADAPTER
from tests.memory.checkpoints import Shapes, stored_as, write_hole
from tests.trainer_files import NEO_MODELS
from tests.trainer_models import HIDDEN, parameters, shape_in

TEXT, IMAGE = 10, 12
REQUEST = Request(48, 64, images=1, text_tokens=TEXT)

ROWS = {
    ("Flux 2", "double_blocks.0.txt_mlp.0"): TEXT,
    ("Flux 2", "single_blocks.1.linear1"): TEXT + IMAGE,
    ("Flux 2", "double_stream_modulation_txt.lin"): 1,
    ("Qwen-Image", "transformer_blocks.0.attn.add_q_proj"): TEXT,
    ("Qwen-Image", "transformer_blocks.0.img_mlp.net.2"): IMAGE,
    ("Wan", "blocks.0.cross_attn.k"): TEXT,
    ("Wan", "blocks.0.cross_attn.q"): IMAGE,
    ("Wan", "blocks.0.cross_attn.k_img"): 257,
    ("Anima", "blocks.1.adaln_modulation_mlp.2"): 1,
    ("Anima", "blocks.1.cross_attn.v_proj"): TEXT,
    ("Krea 2", "txtfusion.layerwise_blocks.0.mlp.up"): HIDDEN * TEXT,
    ("Krea 2", "blocks.0.attn.wq"): TEXT + IMAGE,
    ("Lumina 2", "context_refiner.0.attention.out"): TEXT,
    ("Z-Image", "noise_refiner.0.attention.out"): IMAGE,
    ("Z-Image", "layers.0.feed_forward.w2"): TEXT + IMAGE,
    ("Ernie-Image", "text_proj"): TEXT,
    ("Ernie-Image", "layers.0.mlp.up_proj"): TEXT + IMAGE,
}
"""What a layer multiplies for one image of 12 tokens; the small Krea 2's prompt comes by HIDDEN layers."""


def shapes_of(model: str) -> Shapes:
    return {name.removeprefix("diffusion_model."): shape_in(model)(name) for name in parameters(model)}


def checkpoint_of(path: Path, shapes: Shapes, prefix: str = "") -> Checkpoint:
    return read_checkpoint(write_hole(path / "a.safetensors", stored_as("BF16", shapes, prefix)))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "net."])
@pytest.mark.parametrize("model", NEO_MODELS)
def test_a_model_is_known_under_every_prefix(model: str, prefix: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, shapes_of(model), prefix)
    assert checkpoint.architecture.name == model
    assert checkpoint.components.keys() == {MODEL}


@pytest.mark.parametrize(("model", "name"), ROWS)
def test_a_layer_multiplies_what_flows_through_it(model: str, name: str, tmp_path: Path) -> None:
    layers = {layer.name: layer for layer in checkpoint_of(tmp_path, shapes_of(model)).model.layers}
    assert REQUEST.tokens(layers[name].flow) == ROWS[model, name]


@pytest.mark.parametrize(
    ("model", "name", "shape"),
    [
        ("Wan", "blocks.0.modulation", (1, 6, HIDDEN)),
        ("Wan", "head.modulation", (1, 2, HIDDEN)),
        ("Krea 2", "blocks.0.mod.lin", (6 * HIDDEN,)),
        ("Krea 2", "last.modulation.lin", (2, HIDDEN)),
        ("Z-Image", "x_pad_token", (1, HIDDEN)),
        ("Z-Image", "cap_pad_token", (1, HIDDEN)),
    ],
)
def test_what_is_read_around_a_forward_takes_a_patch(
    model: str, name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tmp_path, {**shapes_of(model), name: shape})
    assert name not in {layer.parameter for layer in checkpoint.model.layers}
    file = write_hole(tmp_path / "lora.safetensors", {f"diffusion_model.{name}.diff": ("F32", shape)})
    header = read_lora_header(file, Places(checkpoint))
    assert (header.unknown, header.unmatched) == ((), ())
    assert [layer.place.layer.parameter for layer in header.model if layer.place] == [name]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "net."])
def test_animas_adapter_is_a_component_of_its_own(prefix: str, tmp_path: Path) -> None:
    """Neo keeps it in the text encoder, and takes no room for it with the diffusion model."""
    shapes = {**shapes_of("Anima"), "llm_adapter.blocks.0.mlp.0.weight": (HIDDEN, HIDDEN)}
    shapes |= {"llm_adapter.embed.weight": (50, HIDDEN)}
    checkpoint = checkpoint_of(tmp_path, shapes, prefix)
    assert checkpoint.components[ADAPTER].file_bytes == 2 * (50 + HIDDEN) * HIDDEN
    assert [layer.name for layer in checkpoint.components[ADAPTER].layers] == ["blocks.0.mlp.0"]
    pair = {
        f"diffusion_model.llm_adapter.blocks.0.mlp.0.lora_{part}.weight": ("F32", (2, 2)) for part in "AB"
    }
    header = read_lora_header(write_hole(tmp_path / "lora.safetensors", pair), Places(checkpoint))
    assert [layer.place.component for layer in header.text if layer.place] == [ADAPTER]
    assert header.model == ()
