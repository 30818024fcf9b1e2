"""Control LoRAs (Flux Canny, Flux Depth) on a small Flux in every low-bit format, inside the host.

The measure is the error of their effect, `‖(y − y₀) − (y_merged − y₀)‖ / ‖y_merged − y₀‖`; y_merged comes
from a dense fp32 model with a wider input layer, into which the file was merged in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lib_precision_lora.host.loras.matching import KeyMap, match_file
from tests.forge import small_flux
from tests.forge.control_lora import CONTROL, RANK, make_file, merge, sample
from tests.forge.real_forge import Forge
from tests.forge.tiny_models import UNET_SIZES, unet
from tests.tiny import Tiny, values
from tests.traces import bytes_of, hooks_of

LARGEST_ERROR = 5e-5
"""Measured: at most 8.4e-6, the noise of fp32."""

SMALLEST_STOCK_ERROR = 0.2
"""Measured: 0.37 for FP8, with a control image."""

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _unload(forge: Forge) -> Iterator[None]:
    """The host forgets the models of a test at its end."""
    yield
    forge.memory_management.unload_all_models()


def patcher_of(forge: Forge, tiny: Tiny) -> Any:
    return forge.patcher.ModelPatcher(tiny.model, CPU, CPU)


def with_file(forge: Forge, patcher: Any, path: str, strength: float) -> Any:
    keys = KeyMap(patcher.model, forge.lora.model_lora_keys_unet(patcher.model, {}))
    match = match_file(path, safetensors.torch.load_file(path), keys, None, forge.lora.load_lora)
    assert match.unmatched == ()
    assert "1 × lora rank 4 (other input channels)" in match.summary
    patched = patcher.clone()
    patched.add_patches(filename=path, patches=match.unet, strength_patch=strength)
    return patched


def error_of(effect: Tensor, expected: Tensor) -> float:
    return float((effect - expected).norm() / expected.norm())


@pytest.mark.usefixtures("precision_lora")
@pytest.mark.parametrize("kind", small_flux.FORMATS)
def test_a_control_lora_acts_as_on_exact_arithmetic_with_its_image_and_without(
    forge: Forge, kind: str, tmp_path: Path
) -> None:
    tiny = small_flux.stored(forge, kind)
    patcher, path = patcher_of(forge, tiny), str(tmp_path / "flux1-canny-dev-lora.safetensors")
    forge.memory_management.load_models_gpu([patcher])
    base, before = sample(tiny.model, None), bytes_of(tiny.model.diffusion_model)
    file = make_file(tiny.model.diffusion_model)
    safetensors.torch.save_file(file, path)
    image = torch.randn(CONTROL, generator=torch.Generator().manual_seed(1))
    effects = []
    for strength in (1.0, 0.6):
        exact = small_flux.dense(forge, tiny)
        merge(file, strength, exact.model.diffusion_model)
        forge.memory_management.load_models_gpu([with_file(forge, patcher, path, strength)])
        for control in (image, None):
            given = torch.zeros(CONTROL) if control is None else control
            expected = sample(exact.model, given) - base
            effects.append(sample(tiny.model, control) - base)
            assert error_of(effects[-1], expected) <= LARGEST_ERROR
    assert error_of(effects[0], effects[1]) > 0.01, "the control image counts"
    assert bytes_of(tiny.model.diffusion_model) == before
    forge.memory_management.load_models_gpu([patcher])
    assert torch.equal(sample(tiny.model, None), base)
    assert hooks_of(tiny.model) == 0


@pytest.mark.usefixtures("precision_lora")
@torch.inference_mode()
def test_the_first_convolution_of_a_unet_takes_the_channels_that_a_file_adds(
    forge: Forge, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(4)
    tiny, exact = (unet(forge, UNET_SIZES) for _ in range(2))
    conv = exact.model.diffusion_model.input_blocks[0][0]
    up = 0.1 * torch.randn(64, RANK, 1, 1, generator=generator)
    down = 0.1 * torch.randn(RANK, 9, 3, 3, generator=generator)
    delta = (up.double().flatten(1) @ down.double().flatten(1)).reshape(64, 9, 3, 3)
    merged = torch.nn.functional.pad(conv.weight.data.double(), (0, 0, 0, 0, 0, 5)) + 0.8 * delta
    conv.weight.data, key = merged.float(), "lora_unet_input_blocks_0_0"
    path = str(tmp_path / "concat.safetensors")
    safetensors.torch.save_file({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, path)

    def run(model: Any, x: Tensor) -> Tensor:
        times, context = torch.tensor([800.0, 20.0]), values(2, 5, 24)
        return model.diffusion_model(x, times, context=context).double()

    x, image = values(2, 4, 6, 4), torch.randn(2, 5, 6, 4, generator=generator)
    patcher = patcher_of(forge, tiny)
    forge.memory_management.load_models_gpu([patcher])
    base = run(tiny.model, x)
    forge.memory_management.load_models_gpu([with_file(forge, patcher, path, 0.8)])
    for given, whole in ((torch.cat([x, image], 1),) * 2, (x, torch.cat([x, torch.zeros_like(image)], 1))):
        expected = run(exact.model, whole) - base
        assert error_of(run(tiny.model, given) - base, expected) <= LARGEST_ERROR
    forge.memory_management.load_models_gpu([patcher])
    assert torch.equal(run(tiny.model, x), base)
    assert hooks_of(tiny.model) == 0


def test_stock_forge_fails_without_a_control_image_and_loses_the_lora_with_it(
    forge: Forge, tmp_path: Path
) -> None:
    """Its merge makes the input layer wider, and nothing of its own gives it that much."""
    tiny = small_flux.stored(forge, "FP8")
    patcher, path = patcher_of(forge, tiny), str(tmp_path / "flux1-canny-dev-lora.safetensors")
    forge.memory_management.load_models_gpu([patcher])
    base, file = sample(tiny.model, None), make_file(tiny.model.diffusion_model)
    safetensors.torch.save_file(file, path)
    exact = small_flux.dense(forge, tiny)
    merge(file, 1.0, exact.model.diffusion_model)
    state = forge.networks.load_lora_state_dict(path)
    patched, _ = forge.networks.load_lora_for_models(patcher, None, state, 1.0, 0.0, filename=path)
    forge.memory_management.load_models_gpu([patched])
    assert tiny.model.diffusion_model.img_in.weight.shape == (256, 128)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        sample(tiny.model, None)
    image = torch.randn(CONTROL, generator=torch.Generator().manual_seed(1))
    assert (
        error_of(sample(tiny.model, image) - base, sample(exact.model, image) - base) > SMALLEST_STOCK_ERROR
    )
