"""Families that Neo's own merge gets wrong or does not read: with us they are the formula's, on Neo's layers.

Measured as `‖ΔW − ΔW_exact‖ / ‖ΔW_exact‖` for Neo, whose merge is asked for the weight that it would store;
for us as the same of the effect on the model's output, through the binding and Neo's own placement.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_precision_lora.host.loras.matching import key_map_of, match_file
from tests.families import Family, family
from tests.neo.real_neo import Neo
from tests.neo.tiny_models import TINY_MODELS, Tiny

LARGEST_ERROR = 1e-4
"""Of the effect on the output, in fp32."""

WRONG_IN_NEO = 0.02
"""More than this is no rounding; Neo's exact families are at 1e-6."""

CPU = torch.device("cpu")
MODELS = ("SD 1.5", "Wan")
"""With convolutions of two and three dimensions."""

CASES: Mapping[str, tuple[str, float]] = {
    "DoRA on outputs": ("dora-out", 1.0),
    "LoHa with DoRA on outputs": ("loha-dora-out", 1.0),
    "LoKr with DoRA on outputs": ("lokr-dora-out", 1.0),
    "OFT": ("oft", 0.5),
    "OFT with constraint": ("oft-constraint", 1.0),
    "OFT with rescale": ("oft-rescale", 1.0),
    "BOFT": ("boft", 0.5),
    "BOFT with rescale": ("boft-rescale", 1.0),
    "GLoRA": ("glora", 1.0),
    "GLoRA, old": ("glora-old", 1.0),
    "GLoRA with a core": ("glora-tucker", 1.0),
    "LoKr with a core": ("lokr-tucker", 1.0),
    "(IA)³ on outputs": ("ia3-out", 1.0),
    "(IA)³ on inputs": ("ia3-in", 1.0),
    "PEFT's (IA)³ on outputs": ("ia3-peft-out", 1.0),
    "PEFT's OFT": ("oft-peft", 0.5),
    "PEFT's BOFT": ("boft-peft", 1.0),
}
"""Family and strength."""

EXACT_IN_NEO: Mapping[str, tuple[str, float]] = {"LoRA": ("lora", 0.5), "LoHa": ("loha", 1.0)}
"""So that the measure of Neo's merge is known to be right."""

RIGHT_IN_NEO = {
    *((case, shape) for case in ("GLoRA", "PEFT's OFT", "BOFT with rescale") for shape in ("linear", "conv")),
    ("GLoRA, old", "linear"),
}
"""Of CASES. BOFT with a rescale is so at strength 1 alone."""

SHAPES = {"linear": (32, 48), "conv": (32, 48, 3, 3)}


class Subject:
    """model: Neo's; exact: a copy into which files are merged in float64."""

    def __init__(self, tiny: Tiny) -> None:
        self.model, self.names, self._run = tiny.model, tiny.key_map, tiny.run
        self.exact = copy.deepcopy(tiny.model)
        self.layers = {
            name: tuple(parameter.shape)
            for name, parameter in self.exact.named_parameters()
            if name.endswith(".weight") and parameter.ndim > 1 and min(parameter.shape[:2]) >= 16
        }

    def run(self, model: Any) -> Tensor:
        with torch.inference_mode():
            return self._run(model).double()

    def file(self, name: str) -> tuple[dict[str, Tensor], Mapping[str, Family]]:
        """The family on every matrix and kernel, in kohya's names, and what it does with each."""
        made = {layer: family(name, shape, seed) for seed, (layer, shape) in enumerate(self.layers.items())}
        state = {
            f"{flat(layer)}.{ending}": tensor
            for layer, adapter in made.items()
            for ending, tensor in adapter.tensors.items()
        }
        return state, made

    def merged_output(self, made: Mapping[str, Family], strength: float) -> Tensor:
        merged = copy.deepcopy(self.exact)
        for name, adapter in made.items():
            parameter = merged.get_parameter(name)
            parameter.data = adapter.change(parameter.data.double(), strength).float()
            bias = merged.get_submodule(name.removesuffix(".weight"))._parameters.get("bias")
            if bias is not None and "ia3_l" in adapter.tensors:  # PEFT scales what the layer puts out
                factor = 1.0 + strength * (adapter.tensors["ia3_l"].double().flatten() - 1.0)
                bias.data = (bias.data.double() * factor).float()
        return self.run(merged)


def flat(layer: str) -> str:
    return "lora_unet_" + layer.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")


@pytest.fixture(scope="module", params=MODELS)
def subject(neo: Neo, request: pytest.FixtureRequest) -> Subject:
    return Subject(TINY_MODELS[request.param](neo))


@pytest.fixture(autouse=True)
def _unload(neo: Neo) -> Iterator[None]:
    yield
    neo.memory_management.unload_all_models()


@pytest.mark.parametrize("case", CASES)
def test_our_effect_is_that_of_the_float64_merge(
    neo: Neo, precision_lora: Any, subject: Subject, case: str
) -> None:
    name, strength = CASES[case]
    state, made = subject.file(name)
    host = precision_lora.host
    match = match_file(case, state, key_map_of(subject.model, subject.names), None, host.parse)
    assert match.unmatched == ()
    assert len(match.unet) >= len(subject.layers)
    engine = engine_of(neo, subject)
    base = placed_output(neo, subject, engine)
    kept = host.keep(engine)
    kept.put(kept.unet, case, match.unet, strength)
    host.use(engine, kept)
    actual = placed_output(neo, subject, engine) - base
    expected = subject.merged_output(made, strength) - base
    assert expected.norm() > 0.01 * base.norm()
    assert float((actual - expected).norm() / expected.norm()) <= LARGEST_ERROR
    host.use(engine, None)
    assert torch.equal(placed_output(neo, subject, engine), base)


def engine_of(neo: Neo, subject: Subject) -> Any:
    """A checkpoint that has this model alone."""
    from backend.diffusion_engine.base import ForgeObjects

    objects = ForgeObjects(neo.patcher.ModelPatcher(subject.model, CPU, CPU), None, None, None)
    return SimpleNamespace(forge_objects_original=objects, forge_objects=objects.shallow_copy())


def placed_output(neo: Neo, subject: Subject, engine: Any) -> Tensor:
    neo.memory_management.load_models_gpu([engine.forge_objects.unet])
    return subject.run(subject.model)


@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("case", {**CASES, **EXACT_IN_NEO})
def test_neos_own_merge_is_wrong_or_reads_nothing(neo: Neo, case: str, layer: str) -> None:
    name, strength = {**CASES, **EXACT_IN_NEO}[case]
    shape = SHAPES[layer]
    made = family(name, shape)
    weight = 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact = made.change(weight.double(), strength) - weight.double()
    error = error_of_neos_merge(neo, made, weight, strength, exact)
    if case in EXACT_IN_NEO or (case, layer) in RIGHT_IN_NEO:
        assert error <= LARGEST_ERROR
    else:
        assert error >= WRONG_IN_NEO


def error_of_neos_merge(neo: Neo, made: Family, weight: Tensor, strength: float, exact: Tensor) -> float:
    """Relative to ΔW; infinite where it raises, and 1 where it reads nothing, as where it has no effect."""
    from modules_forge.packages.comfy.weight_adapter import WeightAdapterBase

    state = {f"layer.{ending}": tensor for ending, tensor in made.tensors.items()}
    patches, _ = neo.lora.load_lora(dict(state), {"layer": "layer.weight"})
    if not patches:
        return 1.0
    (value,) = patches.values()
    assert isinstance(value, WeightAdapterBase)
    try:
        merged = value.calculate_weight(
            weight.clone(), "layer.weight", strength, 1.0, None, lambda a: a, intermediate_dtype=torch.float32
        )
    except RuntimeError:
        return math.inf
    return float((merged.double() - weight.double() - exact).norm() / exact.norm())
