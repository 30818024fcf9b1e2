"""Input layers: control LoRAs have more input channels than the checkpoint, other files may have fewer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import safetensors.torch
from torch import Tensor
from torch.nn.functional import pad

from tests.host.checkpoints import Checkpoint
from tests.host.images import distance, generate
from tests.host.lora_files import Active, exact_output, exact_weights, make_lora, prompt, values
from tests.host.observers import bases_of, branches, hooks_of
from tests.host.webui import Host

EXACT = 1e-5
LINEAR = "diffusion_model.img_in.weight"
CONV = "diffusion_model.input_blocks.0.0.weight"
OWN = {LINEAR: 6, CONV: 4}
"""Input channels of the checkpoint's layers."""
CONTROL = {LINEAR: (3, 0), CONV: (0, 2)}
"""Channels of a control image, behind the tokens' or the picture's."""

Make = Callable[[int], tuple[dict[str, Tensor], str, Tensor]]
"""Input channels → a file's tensors, the parameter that they concern, and ΔW in float64."""


def linear_lora(channels: int) -> tuple[dict[str, Tensor], str, Tensor]:
    up, down = values(8, 2, seed=channels), values(2, channels)
    tensors = {"lora_unet_img_in.lora_up.weight": up, "lora_unet_img_in.lora_down.weight": down}
    return tensors, LINEAR, up.double() @ down.double()


def conv_lora(channels: int) -> tuple[dict[str, Tensor], str, Tensor]:
    up, down = values(4, 2, 1, 1, seed=channels), values(2, channels, 3, 3)
    key = "lora_unet_input_blocks_0_0"
    delta = (up.double().flatten(1) @ down.double().flatten(1)).reshape(4, channels, 3, 3)
    return {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, CONV, delta


def conv_diff(channels: int) -> tuple[dict[str, Tensor], str, Tensor]:
    value = values(4, channels, 3, 3, seed=channels)
    return {"lora_unet_input_blocks_0_0.diff": value}, CONV, value.double()


WIDE = pytest.mark.parametrize(("make", "channels"), [(linear_lora, 9), (conv_lora, 6), (conv_diff, 6)])


def give_control_image(checkpoint: Checkpoint, name: str | None) -> None:
    """Somebody (another extension) hands it to this input layer from now on, or to none."""
    checkpoint.model.diffusion_model.control = CONTROL.get(name, (0, 0))


def with_channels(weight: Tensor, channels: int) -> Tensor:
    """[out, in, *kernel] with zeros behind its own input channels."""
    return pad(weight, (*(0, 0) * (weight.ndim - 2), 0, channels - weight.shape[1]))


@WIDE
def test_a_file_that_widens_an_input_layer_runs_beside_the_base(
    host: Host, checkpoint: Checkpoint, make: Make, channels: int
) -> None:
    tensors, name, delta = make(channels)
    safetensors.torch.save_file(tensors, host.lora_dir / "control.safetensors")
    active = [Active(make_lora("part", modules=["diffusion_model.blocks.0.attn"]), 0.5)]
    active[0].file.write(host)
    base = bases_of(checkpoint)
    give_control_image(checkpoint, name)
    unet, te = exact_weights(checkpoint, active)
    for strength in (1.0, -0.5, 0.0):
        image = generate(host, prompt("a cat", *active) + f"<lora:control:{strength}>")
        assert not image.comments
        wide = with_channels(checkpoint.weight(name), channels) + strength * delta
        assert distance(image, checkpoint.exact("a cat", {**unet, name: wide}, te)) < EXACT
        assert branches(checkpoint.model) == 2
        assert bases_of(checkpoint) == base
        assert not host.contract.merged(checkpoint)
    give_control_image(checkpoint, None)
    image = generate(host, "a cat")
    assert distance(image, exact_output(checkpoint, "a cat")) < EXACT
    assert bases_of(checkpoint) == base
    assert hooks_of(checkpoint.model) == 0


@WIDE
def test_without_a_control_image_its_channels_count_as_zeros(
    host: Host, checkpoint: Checkpoint, make: Make, channels: int
) -> None:
    tensors, name, delta = make(channels)
    safetensors.torch.save_file(tensors, host.lora_dir / "control.safetensors")
    image = generate(host, "a cat<lora:control:0.8>")
    assert not image.comments
    weight = checkpoint.weight(name) + 0.8 * delta[:, : OWN[name]]
    assert distance(image, checkpoint.exact("a cat", {name: weight})) < EXACT


@pytest.mark.parametrize(
    ("make", "widths"), [(linear_lora, (9, 6, 5)), (conv_lora, (3, 4, 6)), (conv_diff, (4, 6, 3))]
)
def test_files_for_wider_equal_and_narrower_inputs_add_up(
    host: Host, checkpoint: Checkpoint, make: Make, widths: tuple[int, ...]
) -> None:
    base = bases_of(checkpoint)
    text, name, wide = "a cat", make(1)[1], max(widths)
    weight = with_channels(checkpoint.weight(name), wide)
    for channels, strength in zip(widths, (1.0, -0.7, 0.6), strict=True):
        tensors, _, delta = make(channels)
        safetensors.torch.save_file(tensors, host.lora_dir / f"of{channels}.safetensors")
        weight = weight + strength * with_channels(delta, wide)
        text += f"<lora:of{channels}:{strength}>"
    give_control_image(checkpoint, name)
    image = generate(host, text)
    assert not image.comments
    assert distance(image, checkpoint.exact("a cat", {name: weight})) < EXACT
    assert bases_of(checkpoint) == base


def test_a_file_whose_outputs_do_not_fit_an_input_layer_is_left_out(
    host: Host, checkpoint: Checkpoint
) -> None:
    up, down = values(7, 2), values(2, 9)
    tensors = {"lora_unet_img_in.lora_up.weight": up, "lora_unet_img_in.lora_down.weight": down}
    safetensors.torch.save_file(tensors, host.lora_dir / "control.safetensors")
    image = generate(host, "a cat<lora:control:1>")
    (comment,) = image.comments
    assert "layer diffusion_model.img_in.weight: the factors make a 7×9 matrix" in comment
    assert "8×6" in comment
    assert distance(image, exact_output(checkpoint, "a cat")) < EXACT
