"""OFT, BOFT and (IA)³ files: stock Forge reads none of their keys, ours have the exact effect.

Measured as for LoRA: `‖(y − y₀) − (y_merged − y₀)‖ / ‖y_merged − y₀‖`, y_merged from a model of the same
values into which the file was merged in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_precision_lora.host.loras.matching import key_map_of, match_file
from tests.families import Family, family
from tests.forge import small_flux
from tests.forge.real_forge import Forge
from tests.forge.tiny_models import TINY_MODELS
from tests.tiny import Run, Tiny

FAMILIES = ("oft", "oft-constraint", "boft", "boft-rescale", "ia3-out", "ia3-in", "ia3-peft-out")
LARGEST_ERROR = 1e-4
"""Measured: at most 1.7e-5 (the constrained OFT, whose effect is smallest): the noise of fp32."""

READ_BY_BOTH = (".alpha",)
"""The host takes an alpha off the list of unknown keys, and does nothing with it."""

CPU = torch.device("cpu")


class Subject:
    """model: as the host stores it; exact: the same values, dense in fp32."""

    def __init__(self, stored: Tiny, exact: Tiny, run: Run) -> None:
        self.model, self.names, self.run = stored.model, stored.key_map, run
        self.exact = exact.model
        self.layers = {
            name: parameter.shape
            for name, parameter in self.exact.named_parameters()
            if name.endswith(".weight") and parameter.ndim > 1
        }

    def file(self, name: str) -> tuple[dict[str, Tensor], Mapping[str, Family]]:
        """The family on every matrix and kernel, in kohya's names, and what it does with each."""
        made = {
            layer: family(name, tuple(shape), seed) for seed, (layer, shape) in enumerate(self.layers.items())
        }
        state = {}
        for layer, adapter in made.items():
            key = "lora_unet_" + layer.removeprefix("diffusion_model.").removesuffix(".weight").replace(
                ".", "_"
            )
            state |= {f"{key}.{ending}": tensor for ending, tensor in adapter.tensors.items()}
        return state, made


def subject_of(forge: Forge, name: str) -> Subject:
    if name == "SD 1.5":
        tiny = TINY_MODELS[name](forge)

        def run(model: Any) -> Tensor:
            with torch.inference_mode():
                return tiny.run(model).double()

        return Subject(tiny, Tiny(copy.deepcopy(tiny.model), tiny.run, tiny.key_map), run)
    stored = small_flux.stored(forge, name.removeprefix("Flux "))
    forge.memory_management.load_models_gpu([forge.patcher.ModelPatcher(stored.model, CPU, CPU)])
    return Subject(stored, small_flux.dense(forge, stored), small_flux.run)


@pytest.fixture(scope="module", params=["SD 1.5", "Flux FP8", "Flux Q8_0"])
def subject(forge: Forge, request: pytest.FixtureRequest) -> Subject:
    return subject_of(forge, request.param)


@pytest.fixture(autouse=True)
def _unload(forge: Forge) -> Iterator[None]:
    yield
    forge.memory_management.unload_all_models()


def placed_output(forge: Forge, subject: Subject, patcher: Any) -> Tensor:
    forge.memory_management.load_models_gpu([patcher])
    return subject.run(patcher.model)


def merged_output(subject: Subject, made: Mapping[str, Family]) -> Tensor:
    merged = copy.deepcopy(subject.exact)
    for name, adapter in made.items():
        parameter = merged.get_parameter(name)
        parameter.data = adapter.full(parameter.data.double()).float()
        bias = merged.get_submodule(name.removesuffix(".weight"))._parameters.get("bias")
        if bias is not None and "ia3_l" in adapter.tensors:  # PEFT scales what the layer puts out
            bias.data = (bias.data.double() * adapter.tensors["ia3_l"].flatten()).float()
    return subject.run(merged)


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_forge_leaves_every_key_over(forge: Forge, subject: Subject, name: str) -> None:
    state, _ = subject.file(name)
    patches, left = forge.lora.load_lora(dict(state), dict(subject.names))
    assert not patches
    assert left.keys() == {key for key in state if not key.endswith(READ_BY_BOTH)}
    patcher = forge.patcher.ModelPatcher(subject.model, CPU, CPU)
    patched, _ = forge.networks.load_lora_for_models(patcher, None, dict(state), 1.0, 0.0, filename=name)
    assert patched is patcher, "so that the image is the one without it"


@pytest.mark.usefixtures("precision_lora")
@pytest.mark.parametrize("name", FAMILIES)
def test_our_effect_is_that_of_the_float64_merge(forge: Forge, subject: Subject, name: str) -> None:
    state, made = subject.file(name)
    match = match_file(name, state, key_map_of(subject.model, subject.names), None, forge.lora.load_lora)
    assert match.unmatched == ()
    assert len(match.unet) >= len(subject.layers)
    patcher = forge.patcher.ModelPatcher(subject.model, CPU, CPU)
    base = placed_output(forge, subject, patcher)
    assert torch.equal(base, subject.run(subject.exact))
    patched = patcher.clone()
    patched.add_patches(filename=name, patches=match.unet, strength_patch=1.0)
    expected = merged_output(subject, made) - base
    assert expected.norm() > 0.01 * base.norm()
    actual = placed_output(forge, subject, patched) - base
    assert float((actual - expected).norm() / expected.norm()) <= LARGEST_ERROR
    assert torch.equal(placed_output(forge, subject, patcher), base)
