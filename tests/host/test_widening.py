"""Control LoRAs: an input layer takes more channels than the checkpoint's."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from tests.host.checkpoints import Checkpoint
from tests.host.generation import distance, generate, load_checkpoint
from tests.host.loras import Active, exact_output, exact_weights, make_lora, prompt, values
from tests.host.observers import branches, bytes_of_bases
from tests.host.webui import Host

EXACT = 1e-5


@pytest.mark.parametrize("layer", ["img_in", "input_blocks_0_0"])
def test_a_file_that_widens_an_input_layer_is_left_to_the_host(host: Host, layer: str) -> None:
    checkpoint = load_checkpoint(host, lambda: Checkpoint(host))
    base = bytes_of_bases(checkpoint)
    if layer == "img_in":
        name, wide = "diffusion_model.img_in.weight", (8, 9)
        up, down = values(8, 2), values(2, 9)
        tensors = {f"lora_unet_{layer}.lora_up.weight": up, f"lora_unet_{layer}.lora_down.weight": down}
        delta = up.double() @ down.double()
    else:
        name, wide = "diffusion_model.input_blocks.0.0.weight", (4, 7, 3, 3)
        delta = values(*wide).double()
        tensors = {f"lora_unet_{layer}.diff": delta.float()}
    safetensors.torch.save_file(tensors, host.lora_dir / "control.safetensors")
    active = [Active(make_lora("part", modules=["diffusion_model.blocks.0.attn"]), 0.5)]
    active[0].file.write(host)
    image = generate(host, prompt("a cat", *active) + "<lora:control:1>")
    assert not image.comments
    assert checkpoint.model.get_parameter(name).shape == wide
    weight = torch.zeros(wide, dtype=torch.float64)
    weight[tuple(slice(size) for size in checkpoint.weight(name).shape)] = checkpoint.weight(name)
    unet, te = exact_weights(checkpoint, active)
    assert distance(image, checkpoint.exact("a cat", {**unet, name: weight + delta}, te)) < EXACT
    assert branches(checkpoint.model) == 1
    image = generate(host, "a cat")
    assert distance(image, exact_output(checkpoint, "a cat")) < EXACT
    assert bytes_of_bases(checkpoint) == base
