"""What a plan takes from names alone is what the host has: shapes, names of LoRAs, tokens of every layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lib_precision_lora.memory.architecture import Request
from lib_precision_lora.memory.checkpoint import read_checkpoint
from lib_precision_lora.memory.flows import Counts, flow_of
from lib_precision_lora.memory.naming import Places
from lib_precision_lora.names.unet import unet_blocks
from tests.forge import tiny_models
from tests.forge.real_forge import Forge
from tests.memory.checkpoints import (
    MODEL,
    Shapes,
    flux,
    sd2_unet,
    sd15_unet,
    sdxl_refiner_unet,
    sdxl_unet,
    stored_as,
    write_hole,
)

CHECKPOINTS: dict[str, Callable[[], Shapes]] = {
    "SD15": sd15_unet,
    "SD20": sd2_unet,
    "SDXL": sdxl_unet,
    "SDXLRefiner": sdxl_refiner_unet,
    "Flux": flux,
    "FluxSchnell": lambda: flux(guidance=False),
}


def guessed(shapes: Shapes) -> Any:
    """What the host takes a checkpoint of these shapes for."""
    from huggingface_guess import detection

    tensors = {MODEL + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return detection.model_config_from_unet(tensors, MODEL)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_hosts_model_has_these_names_and_shapes(forge: Forge, name: str) -> None:
    from backend.nn.flux import IntegratedFluxTransformer2DModel
    from backend.nn.unet import IntegratedUNet2DConditionModel

    shapes = CHECKPOINTS[name]()
    guess = guessed(shapes)
    assert type(guess).__name__ == name
    sizes = dict(guess.unet_config)
    sizes.pop("image_model", None)
    with torch.device("meta"):
        if name.startswith("Flux"):
            model: nn.Module = IntegratedFluxTransformer2DModel(**sizes)
        else:
            model = IntegratedUNet2DConditionModel.from_config(sizes)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_name_in_the_hosts_key_map_finds_the_same_rows(forge: Forge, name: str, tmp_path: Path) -> None:
    shapes = CHECKPOINTS[name]()
    guess = guessed(shapes)
    model = SimpleNamespace(
        state_dict=lambda: {f"diffusion_model.{key}": shape for key, shape in shapes.items()},
        diffusion_model=SimpleNamespace(config=dict(guess.unet_config)),
        config=guess,
    )
    places = Places(read_checkpoint(write_hole(tmp_path / "a.safetensors", stored_as("F16", shapes, MODEL))))
    compared = 0
    for key, target in forge.lora.model_lora_keys_unet(model, {}).items():
        parameter, rows = (target, None) if isinstance(target, str) else (target[0], target[1])
        shape = shapes.get(parameter.removeprefix("diffusion_model."), ())
        if len(shape) < 2:
            continue
        start, count = (0, shape[0]) if rows is None else rows[1:]
        place = places.find(key)
        assert place is not None, key
        assert f"diffusion_model.{place.layer.name}.weight" == parameter
        assert (place.start, place.stop) == (start, start + count), key
        compared += 1
    assert compared > 1000


@pytest.mark.parametrize(
    ("make", "family", "request_"),
    [
        (lambda forge: tiny_models.unet(forge, tiny_models.UNET_SIZES), "UNet", Request(32, 48, 2, 5)),
        (lambda forge: tiny_models.unet(forge, tiny_models.SDXL_SIZES), "UNet", Request(32, 48, 2, 5)),
        (tiny_models.flux, "Flux", Request(64, 64, 1, 5)),
        (tiny_models.chroma, "Flux", Request(64, 64, 1, 5)),
        (lambda forge: tiny_models.mmdit(forge, tiny_models.SD35_SIZES), "MMDiT", Request(64, 64, 1, 5)),
    ],
    ids=["SD 1.5", "SDXL", "Flux", "Chroma", "SD 3.5"],
)
def test_every_layer_of_the_host_sees_the_tokens_that_are_planned(
    forge: Forge, make: Callable[[Forge], Any], family: Any, request_: Request
) -> None:
    tiny = make(forge)
    model = tiny.model.diffusion_model
    seen: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            channels = 1 if module.weight.ndim > 2 else output.ndim - 1
            seen[name] = output.numel() // output.shape[channels]

        return hook

    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim >= 2:
            module.register_forward_hook(watch(name))
    with torch.inference_mode():
        tiny.run(tiny.model)
    names = [name for name, _ in model.named_parameters()]
    levels = {block.name: block.level for block in unet_blocks(names)}
    counts = Counts.of({name: tuple(value.shape) for name, value in model.named_parameters()})
    planned = {name: request_.tokens(flow_of(family, name, levels, counts)) for name in seen}
    assert len(seen) > 15
    assert planned == seen
