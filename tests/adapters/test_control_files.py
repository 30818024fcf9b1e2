"""Control LoRAs for Flux, in the names of BFL and of diffusers: wide inputs, biases, whole norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib_precision_lora.adapters import AdapterError, Assign, Diff, LoRA, read_adapters

G = torch.Generator().manual_seed(2)
DOUBLE, SINGLE = "diffusion_model.double_blocks.0.", "diffusion_model.single_blocks.0."
KEY_MAP = {
    **{
        name: f"{name}.weight"
        for name in (
            "diffusion_model.img_in",
            f"{DOUBLE}img_attn.qkv",
            f"{DOUBLE}img_mlp.0",
            f"{SINGLE}linear1",
        )
    },
    **{
        name: name
        for name in (
            f"{DOUBLE}img_attn.norm.key_norm.scale",
            f"{DOUBLE}txt_attn.norm.query_norm.scale",
            f"{SINGLE}norm.query_norm.scale",
        )
    },
    "transformer.x_embedder": "diffusion_model.img_in.weight",
    "transformer.transformer_blocks.0.attn.norm_k": f"{DOUBLE}img_attn.norm.key_norm.scale",
    "transformer.transformer_blocks.0.attn.norm_added_q": f"{DOUBLE}txt_attn.norm.query_norm.scale",
    "transformer.single_transformer_blocks.0.attn.norm_q": f"{SINGLE}norm.query_norm.scale",
}
"""As a host makes it for Flux, in part."""

NORMS = {
    f"{DOUBLE}img_attn.norm.key_norm.scale": torch.randn(8, generator=G),
    f"{DOUBLE}txt_attn.norm.query_norm.scale": torch.randn(8, generator=G).bfloat16(),
    f"{SINGLE}norm.query_norm.scale": torch.randn(8, generator=G),
}
DIFFUSERS_NORMS = {
    name: f"{key}.weight" for key, name in KEY_MAP.items() if ".norm_" in key and name in NORMS
}


def lora(key: str, out: int, columns: int, rank: int = 2) -> dict[str, Tensor]:
    """One layer with the bias of its `lora_B`."""
    return {
        f"{key}.lora_A.weight": torch.randn(rank, columns, generator=G),
        f"{key}.lora_B.weight": torch.randn(out, rank, generator=G),
        f"{key}.lora_B.bias": torch.randn(out, generator=G),
    }


def bfl() -> dict[str, Tensor]:
    bare = {name.removeprefix("diffusion_model."): value for name, value in NORMS.items()}
    return {
        **bare,
        **lora("img_in", 32, 16),
        **lora("double_blocks.0.img_attn.qkv", 96, 32),
        **lora("double_blocks.0.img_mlp.0", 128, 32),
        **lora("single_blocks.0.linear1", 224, 32),
    }


def diffusers() -> dict[str, Tensor]:
    norms = {DIFFUSERS_NORMS[name]: value for name, value in NORMS.items()}
    return {**norms, **lora("transformer.x_embedder", 32, 16)}


@pytest.mark.parametrize("make", [bfl, diffusers])
def test_every_tensor_of_a_control_lora_is_read(make) -> None:
    file = make()
    adapters = read_adapters(file, KEY_MAP)
    assert adapters.unmatched == ()
    assert adapters.layout == "PEFT"
    for name, value in NORMS.items():
        adapter = adapters[name]
        assert isinstance(adapter, Assign)
        assert adapter.value is value
    layers = {key.removesuffix(".lora_A.weight") for key in file if key.endswith(".lora_A.weight")}
    assert len(adapters) == len(NORMS) + 2 * len(layers)
    for layer in layers:
        weight = KEY_MAP.get(layer) or KEY_MAP[f"diffusion_model.{layer}"]
        pair, bias = adapters[weight], adapters[weight.removesuffix(".weight") + ".bias"]
        assert isinstance(pair, LoRA)
        assert pair.up is file[f"{layer}.lora_B.weight"]
        assert pair.down is file[f"{layer}.lora_A.weight"]
        assert pair.scale == 1.0
        assert isinstance(bias, Diff)
        assert bias.value is file[f"{layer}.lora_B.bias"]


def test_without_a_key_map_the_file_shows_the_same_adapters() -> None:
    adapters = read_adapters(bfl())
    assert adapters.unmatched == ()
    assert {adapter.kind for adapter in adapters.values()} == {"lora", "diff", "set"}


def test_the_bias_of_a_lora_has_the_loras_scale() -> None:
    file = lora("img_in", 6, 4) | {"img_in.alpha": torch.tensor(3.0)}
    adapters = read_adapters(file)
    bias = adapters["img_in.bias"]
    assert isinstance(bias, Diff)
    torch.testing.assert_close(bias.value, 1.5 * file["img_in.lora_B.bias"])


def test_norms_without_a_lora_on_the_input_are_those_of_a_checkpoint() -> None:
    file = bfl()
    file = {key: value for key, value in file.items() if not key.startswith("img_in")}
    adapters = read_adapters(file, KEY_MAP)
    assert set(adapters.unmatched) == {name.removeprefix("diffusion_model.") for name in NORMS}
    assert not NORMS.keys() & adapters.keys()


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        ("img_in.lora_B.bias", "img_in"),
        ("single_blocks.0.norm.query_norm.scale", "single_blocks.0.norm.query_norm.scale"),
    ],
)
def test_a_damaged_bias_or_norm_names_its_layer(key: str, layer: str) -> None:
    file = bfl()
    file[key] = torch.full_like(file[key], torch.nan)
    with pytest.raises(AdapterError, match=f"^{layer}: .* NaN or inf"):
        read_adapters(file, KEY_MAP)
