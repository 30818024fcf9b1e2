"""What a plan takes from names and shapes alone is what Neo has: names of LoRAs, tokens of every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.memory.architecture import KNOWN, Request
from lib_precision_lora.memory.checkpoint import Checkpoint, read_checkpoint
from lib_precision_lora.memory.flows import Counts, flow_of
from lib_precision_lora.memory.naming import Places
from tests.memory.checkpoints import MODEL, stored_as, write_hole
from tests.neo.real_neo import Neo
from tests.neo.tiny_models import TINY_MODELS
from tests.tiny import values

FLUX2_KLEIN: Mapping[str, Any] = {
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "context_in_dim": 7680,
    "hidden_size": 3072,
    "mlp_ratio": 3.0,
    "num_heads": 24,
    "depth": 5,
    "depth_single_blocks": 20,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "guidance_embed": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
}
WAN_14B: Mapping[str, Any] = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
ANIMA: Mapping[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 2048,
    "num_blocks": 28,
    "num_heads": 16,
}
LUMINA: Mapping[str, Any] = {
    "in_channels": 16,
    "dim": 2304,
    "n_layers": 26,
    "n_heads": 24,
    "n_kv_heads": 8,
    "qk_norm": True,
    "cap_feat_dim": 2304,
    "axes_dims": [32, 32, 32],
}
Z_IMAGE: Mapping[str, Any] = {
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_heads": 30,
    "n_kv_heads": 30,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "pad_tokens_multiple": 32,
}
REPOSITORIES = {
    "Flux 2": "black-forest-labs/FLUX.2-klein-4B",
    "Qwen-Image": "Qwen/Qwen-Image",
    "Wan": "Wan-AI/Wan2.1-T2V-14B",
    "Anima": "circlestone-labs/Anima",
    "Krea 2": "krea/Krea-2-Raw",
    "Lumina 2": "neta-art/Neta-Lumina",
    "Z-Image": "Tongyi-MAI/Z-Image-Turbo",
    "Ernie-Image": "baidu/ERNIE-Image",
}


def whole(name: str) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model in its true size, without values, and its sizes as Neo keeps them."""
    from backend.nn import anima, ernie, flux, krea, lumina, qwen, wan

    make, sizes = {
        "Flux 2": (flux.IntegratedFluxTransformer2DModel, FLUX2_KLEIN),
        "Qwen-Image": (qwen.QwenImageTransformer2DModel, {}),
        "Wan": (wan.WanModel, WAN_14B),
        "Anima": (anima.Anima, ANIMA),
        "Krea 2": (krea.SingleStreamDiT, {"layers": 28}),
        "Lumina 2": (lumina.NextDiT, LUMINA),
        "Z-Image": (lumina.NextDiT, Z_IMAGE),
        "Ernie-Image": (ernie.ErnieImageModel, {}),
    }[name]
    with torch.device("meta"):
        return make(**sizes), sizes


def checkpoint_of(model: nn.Module, path: Path) -> Checkpoint:
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return read_checkpoint(write_hole(path / "a.safetensors", stored_as("BF16", shapes, MODEL)))


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_checkpoint_in_its_true_size_is_known_with_its_layers_and_bytes(
    neo: Neo, name: str, tmp_path: Path
) -> None:
    model, _ = whole(name)
    checkpoint = checkpoint_of(model, tmp_path)
    assert checkpoint.architecture.name == name
    parameters = dict(model.named_parameters())
    assert checkpoint.model.held_bytes() == 2 * sum(map(Tensor.numel, parameters.values()))
    multiply = {
        key for key, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))
    }
    assert {layer.name for layer in checkpoint.model.layers} == multiply
    known = {layer.parameter for layer in checkpoint.model.every_layer}
    assert known == {key for key in parameters if not key.endswith(".bias")}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_every_name_in_neos_key_map_finds_the_same_rows(neo: Neo, name: str, tmp_path: Path) -> None:
    model, sizes = whole(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    places = Places(checkpoint_of(model, tmp_path))
    host = SimpleNamespace(
        state_dict=lambda: {f"diffusion_model.{key}": shape for key, shape in shapes.items()},
        diffusion_model=SimpleNamespace(config=dict(sizes)),
        config=SimpleNamespace(huggingface_repo=REPOSITORIES[name]),
    )
    compared = 0
    for key, target in neo.lora.model_lora_keys_unet(host, {}).items():
        parameter, rows = (target, None) if isinstance(target, str) else (target[0], target[1])
        shape = shapes.get(parameter.removeprefix("diffusion_model."), ())
        foreign = name in BY_AUTHORS_NAMES and not key.startswith("lora_unet_")
        start, count = (0, math.prod(shape[:1])) if rows is None else rows[1:]
        if len(shape) < 2 or start + count > shape[0] or foreign:
            continue
        place = places.find(key)
        assert place is not None, key
        assert f"diffusion_model.{place.layer.parameter}" == parameter
        assert (place.start, place.stop) == (start, start + count), key
        compared += 1
    assert compared > 80


BY_AUTHORS_NAMES = ("Flux 2", "Lumina 2")
"""For these Neo's key map has Flux's and Z-Image's names of diffusers, which no trainer writes for them."""

PADDED = {"Z-Image": lambda model: model.diffusion_model(*padded())}
"""Neo fills the prompt and the image up to multiples of 32; here they are so already."""


def padded() -> tuple[Tensor, Tensor, Tensor]:
    return values(1, 4, 16, 16), torch.tensor([0.7]), values(1, 32, 24)


REQUESTS = {
    "Flux": Request(64, 64, 1, 5),
    "Chroma": Request(64, 64, 1, 5),
    "Flux 2": Request(64, 64, 1, 5),
    "Qwen-Image": Request(48, 64, 1, 5),
    "Wan": Request(96, 64, 1, 5),
    "Anima": Request(48, 64, 1, 5),
    "Krea 2": Request(48, 64, 1, 5),
    "Lumina 2": Request(48, 64, 1, 5),
    "Z-Image": Request(128, 128, 1, 32),
    "Ernie-Image": Request(96, 64, 1, 5),
}
"""As `TINY_MODELS` run; Wan's two frames of 48 by 64 are as many tokens as one twice as wide."""


@pytest.mark.parametrize("name", REQUESTS)
def test_every_layer_sees_the_tokens_that_are_planned(neo: Neo, name: str) -> None:
    tiny = TINY_MODELS[name](neo)
    model = tiny.model.diffusion_model
    seen: dict[str, int] = {}

    def watch(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            channels = 1 if module.weight.ndim > 2 else output.ndim - 1
            seen[layer] = output.numel() // output.shape[channels]

        return hook

    for layer, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2:
            module.register_forward_hook(watch(layer))
    with torch.inference_mode():
        PADDED.get(name, tiny.run)(tiny.model)
    families = {each.name: each.family for each in KNOWN} | {"Flux": "Flux"}
    counts = Counts.of({key: tuple(value.shape) for key, value in model.named_parameters()})
    planned = {layer: REQUESTS[name].tokens(flow_of(families[name], layer, {}, counts)) for layer in seen}
    assert len(seen) > 15
    if name == "Chroma":  # Neo makes as many vectors as the whole Chroma has, whatever its blocks
        seen = {layer: tokens for layer, tokens in seen.items() if not layer.startswith("distilled")}
        planned = {layer: planned[layer] for layer in seen}
    assert planned == seen
