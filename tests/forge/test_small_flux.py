"""A small Flux in every low-bit format, inside the host: LoRA files act on it as on exact arithmetic.

The measure is the error of the LoRA's effect on the output,
`‖(y − y₀) − (y_merged − y₀)‖ / ‖y_merged − y₀‖`. y_merged comes from a dense fp32 model over the very values
with which the host's forward computes (of GGUF, it rounds them to fp16 even when it computes in fp32), into
which the file was merged in float64; y₀ is the same for both models, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lib_precision_lora.host.loras.matching import KeyMap, match_file
from tests.forge import small_flux
from tests.forge.lora_files import DIFFUSERS, KOHYA, LAYOUTS, make_file, merge
from tests.forge.real_forge import Forge
from tests.tiny import Tiny
from tests.traces import attributes_of, bytes_of, hooks_of, kept_objects, parameters_of

LARGEST_ERROR = 5e-4
"""Measured: 4e-5 in every format, which is the noise of fp32 under an effect of 1 to 2 % of the output."""

SMALLEST_STOCK_ERROR = 0.3
"""Measured: 0.47 for Q8_0, 0.94 for FP8, 1.0 for FP8 with scales, 1.08 for Q4_0 and Q5_0."""

CPU = torch.device("cpu")

Reader = Callable[[Forge, Any, str, float], Any]
"""Gives a patcher with a file's patches at a strength, from one that has none."""


def read_as_the_host(forge: Forge, patcher: Any, path: str, strength: float) -> Any:
    state = forge.networks.load_lora_state_dict(path)
    patched, _ = forge.networks.load_lora_for_models(patcher, None, state, strength, 0.0, filename=path)
    assert patched is not patcher
    return patched


def read_as_we_do(forge: Forge, patcher: Any, path: str, strength: float) -> Any:
    keys = KeyMap(patcher.model, forge.lora.model_lora_keys_unet(patcher.model, {}))
    match = match_file(path, safetensors.torch.load_file(path), keys, None, forge.lora.load_lora)
    assert match.unmatched == ()
    patched = patcher.clone()
    patched.add_patches(filename=path, patches=match.unet, strength_patch=strength)
    return patched


@pytest.fixture(scope="module")
def files(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Layout → path of a file in it, made for the model before it was quantized."""
    tiny = small_flux.dense(forge, small_flux.stored(forge, "FP8"))
    paths = {layout: str(tmp_path_factory.mktemp("lora") / f"{layout}.safetensors") for layout in LAYOUTS}
    for seed, (layout, path) in enumerate(paths.items()):
        safetensors.torch.save_file(make_file(layout, tiny.model, tiny.key_map, seed), path)
    return paths


@pytest.fixture(autouse=True)
def _unload(forge: Forge) -> Iterator[None]:
    """The host forgets the models of a test at its end."""
    yield
    forge.memory_management.unload_all_models()


@pytest.fixture(params=small_flux.FORMATS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny(forge: Forge, kind: str) -> Tiny:
    return small_flux.stored(forge, kind)


def patcher_of(forge: Forge, tiny: Tiny) -> Any:
    return forge.patcher.ModelPatcher(tiny.model, CPU, CPU)


def placed_output(forge: Forge, patcher: Any) -> Tensor:
    forge.memory_management.load_models_gpu([patcher])
    return small_flux.run(patcher.model)


def merged_effect(forge: Forge, tiny: Tiny, base: Tensor, files: Mapping[str, tuple[str, float]]) -> Tensor:
    """The effect of files, layout → (path, strength), merged in float64 into a dense model."""
    exact = small_flux.dense(forge, tiny)
    assert torch.equal(small_flux.run(exact.model), base)
    for layout, (path, strength) in files.items():
        merge(layout, safetensors.torch.load_file(path), strength, exact.model, exact.key_map)
    return small_flux.run(exact.model) - base


def error_of(effect: Tensor, expected: Tensor) -> float:
    return float((effect - expected).norm() / expected.norm())


@pytest.mark.usefixtures("precision_lora")
@pytest.mark.parametrize("read", [read_as_the_host, read_as_we_do])
@pytest.mark.parametrize("layout", [KOHYA, DIFFUSERS])
def test_a_lora_file_acts_as_on_exact_arithmetic(
    forge: Forge, tiny: Tiny, files: Mapping[str, str], layout: str, read: Reader, kind: str
) -> None:
    base = placed_output(forge, patcher_of(forge, tiny))
    expected = merged_effect(forge, tiny, base, {layout: (files[layout], 0.8)})
    actual = placed_output(forge, read(forge, patcher_of(forge, tiny), files[layout], 0.8)) - base
    assert error_of(actual, expected) <= LARGEST_ERROR


@pytest.mark.usefixtures("precision_lora")
def test_two_files_act_as_their_sum_and_leave_nothing(
    forge: Forge, tiny: Tiny, files: Mapping[str, str], kind: str
) -> None:
    patcher = patcher_of(forge, tiny)
    base = placed_output(forge, patcher)
    before = bytes_of(tiny.model)
    both = {KOHYA: (files[KOHYA], 1.0), DIFFUSERS: (files[DIFFUSERS], -0.5)}
    expected = merged_effect(forge, tiny, base, both)
    patched = patcher
    for path, strength in both.values():
        patched = read_as_the_host(forge, patched, path, strength)
    actual = placed_output(forge, patched) - base
    assert error_of(actual, expected) <= LARGEST_ERROR
    assert bytes_of(tiny.model) == before
    assert torch.equal(placed_output(forge, patcher), base)
    assert hooks_of(tiny.model) == 0


def test_two_hundred_generations_leave_what_they_leave_without_us(
    forge: Forge, tiny: Tiny, files: Mapping[str, str], kind: str, request: pytest.FixtureRequest
) -> None:
    twin = small_flux.stored(forge, kind)
    before, before_twin = parameters_of(tiny.model), parameters_of(twin.model)
    generations(forge, patcher_of(forge, twin), [])
    request.getfixturevalue("precision_lora")
    paths = [files[KOHYA], files[DIFFUSERS]]
    patcher = patcher_of(forge, tiny)
    loras = [read_as_we_do(forge, patcher, path, 1.0).lora_patches for path in paths]
    generations(forge, patcher, [next(iter(patches.values())) for patches in loras])
    assert hooks_of(tiny.model) == 0
    assert bytes_of(tiny.model) == bytes_of(twin.model)
    assert attributes_of(tiny.model) == attributes_of(twin.model)
    kept_without_us = kept_objects(twin.model, before_twin)
    assert kept_without_us
    assert kept_objects(tiny.model, before) >= kept_without_us
    assert torch.equal(small_flux.run(tiny.model), small_flux.run(twin.model))


def generations(forge: Forge, patcher: Any, loras: Sequence[Mapping[str, Any]]) -> None:
    """200 times: another set of LoRAs (none, one, the other, both) at another of seven strengths, sometimes
    after the model was unloaded, sometimes with a forward; the last one without LoRAs."""
    outputs = set()
    for number in range(200):
        patched = patcher.clone()
        for index, patches in enumerate(loras):
            if number % 4 in (index + 1, 3):
                identifier = f"file {index}", 0.1 * (number % 7 - 3), 1.0, False
                patched.lora_patches[identifier] = with_strength(patches, identifier[1])
        if number % 3 == 0:
            forge.memory_management.unload_all_models()
        forge.memory_management.load_models_gpu([patched])
        if number % 5 == 0:
            outputs.add(float(small_flux.run(patched.model).sum()))
    forge.memory_management.load_models_gpu([patcher])
    distinct = 1 + (2 ** len(loras) - 1) * 6
    assert len(outputs) == distinct, "the same set has the same output, and any other set another one"


def with_strength(patches: Mapping[str, Any], strength: float) -> dict[str, Any]:
    return {name: [[strength, *entry[1:]] for entry in stack] for name, stack in patches.items()}


def test_stock_forge_loses_the_lora(forge: Forge, tiny: Tiny, files: Mapping[str, str], kind: str) -> None:
    """What all this is for. The host has no requantizer for Q4_K, and takes 4-bit weights apart by CUDA."""
    base = placed_output(forge, patcher_of(forge, tiny))
    patched = read_as_the_host(forge, patcher_of(forge, tiny), files[KOHYA], 1.0)
    failure: Any = NotImplementedError if kind == "Q4_K" else None
    if kind == "NF4" and not torch.cuda.is_available():
        failure = AssertionError, RuntimeError
    if failure is not None:
        with pytest.raises(failure):
            forge.memory_management.load_models_gpu([patched])
        return
    expected = merged_effect(forge, tiny, base, {KOHYA: (files[KOHYA], 1.0)})
    error = error_of(placed_output(forge, patched) - base, expected)
    assert error > SMALLEST_STOCK_ERROR
