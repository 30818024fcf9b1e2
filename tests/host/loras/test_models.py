"""Checkpoints that come and go, and memory."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch

from lib_precision_lora.host import installation, uninstall
from lib_precision_lora.ui.settings import DENSE, ENABLED, MERGE
from tests.host.checkpoints import PICTURE, Checkpoint
from tests.host.damage import cats_and_dogs
from tests.host.images import distance, generate, load_checkpoint
from tests.host.lora_files import Active, exact_output, prompt
from tests.host.observers import bases_of, branches, count_loads, hooks_of, stacks
from tests.host.webui import Host

EXACT = 1e-5


def test_another_checkpoint_gets_the_same_prompts_loras(host: Host, checkpoint: Checkpoint) -> None:
    cats, dogs = cats_and_dogs(host)
    active = [Active(cats, 0.5), Active(dogs, -0.25)]
    for seed in (1, 2, 1):
        second = load_checkpoint(host, lambda seed=seed: Checkpoint(host, seed))
        image = generate(host, prompt("a cat", *active))
        assert distance(image, exact_output(second, "a cat", active)) < EXACT


def test_two_checkpoints_in_memory_keep_apart(host: Host, checkpoint: Checkpoint) -> None:
    """Another extension may hold a second one and switch without unloading."""
    cats, dogs = cats_and_dogs(host)
    second = Checkpoint(host, seed=1)
    loras = {checkpoint: [Active(cats, 0.5)], second: [Active(dogs, 0.75)]}
    for engine in (checkpoint, second, checkpoint, second):
        host.sd_models.model_data.set_sd_model(engine)
        image = generate(host, prompt("a cat", *loras[engine]))
        assert distance(image, exact_output(engine, "a cat", loras[engine])) < EXACT


def test_nothing_of_ours_keeps_a_checkpoint_alive(host: Host) -> None:
    cats, _ = cats_and_dogs(host)
    load_checkpoint(host, lambda: Checkpoint(host))
    generate(host, prompt("a cat", Active(cats)), hires_prompt="a cat<lora:dogs:1>")
    engine = host.current
    unet = engine.forge_objects.unet
    references = [
        weakref.ref(kept)
        for kept in (engine, engine.model, engine.encoder, unet, engine.forge_objects.clip.patcher)
    ]
    hooks = [
        weakref.ref(hook) for module in engine.model.modules() for hook in module._forward_hooks.values()
    ]
    assert hooks
    del engine, unet
    load_checkpoint(host, lambda: Checkpoint(host, seed=1))
    gc.collect()
    assert [reference() for reference in references] == [None] * 5
    assert [hook() for hook in hooks] == [None] * len(hooks)
    active = installation.active()
    assert active is not None
    assert len(active.sessions()) == 0


def references(host: Host) -> list[tuple[str, int]]:
    """How often each loaded patcher is referred to, as the host counts it."""
    return sorted(
        (type(loaded.model.model).__name__, sys.getrefcount(loaded.model))
        for loaded in host.memory.current_loaded_models
    )


@pytest.mark.only_on("forge", "Neo holds its patchers weakly, and counts no references")
def test_an_abandoned_clone_counts_as_abandoned(host: Host, checkpoint: Checkpoint) -> None:
    """The host unloads a patcher that nobody but itself refers to: a reference of ours would keep it."""
    cats, _ = cats_and_dogs(host)

    def before_sampling(checkpoint: Any) -> None:
        checkpoint.forge_objects.unet = checkpoint.forge_objects.unet.clone()

    def counts() -> list[tuple[str, int]]:
        generate(host, prompt("a cat", Active(cats)), before_sampling=before_sampling)
        checkpoint.forge_objects = checkpoint.forge_objects_original.shallow_copy()
        gc.collect()
        return references(host)

    ours = counts()
    loaded = [found.model.model for found in host.memory.current_loaded_models]
    assert checkpoint.model in loaded
    host.memory.free_memory(0, torch.device("cpu"))
    assert checkpoint.model not in [found.model.model for found in host.memory.current_loaded_models]
    uninstall()
    without = counts()
    assert dict(ours)["Model"] == dict(without)["Model"] == 2


@pytest.mark.parametrize("prompt_after", ["a cat", "a cat<lora:cats:1>"])
def test_a_model_that_is_unloaded_in_between_is_right_again(
    host: Host, checkpoint: Checkpoint, prompt_after: str
) -> None:
    cats, _ = cats_and_dogs(host)
    generate(host, "a cat<lora:cats:1>")
    host.memory.unload_all_models()
    active = [Active(cats)] if "lora" in prompt_after else []
    image = generate(host, prompt_after)
    assert distance(image, exact_output(checkpoint, "a cat", active)) < EXACT


def test_factors_leave_the_device_with_the_model(host: Host, checkpoint: Checkpoint) -> None:
    cats, dogs = cats_and_dogs(host)
    active = [Active(cats, 0.5), Active(dogs, -0.25)]
    exact = exact_output(checkpoint, "a cat", active)
    for _ in range(2):
        assert distance(generate(host, prompt("a cat", *active)), exact) < EXACT
        factors = [weakref.ref(factor) for factor in stacks(checkpoint.model)]
        assert factors
        host.memory.unload_all_models()
        assert stacks(checkpoint.model) == stacks(checkpoint.encoder) == []
        assert [factor() for factor in factors] == [None] * len(factors)
        assert branches(checkpoint.model) > 0, "the branches themselves stay"


def test_factors_stay_where_the_model_stays(host: Host, checkpoint: Checkpoint) -> None:
    """Another patcher of the same model takes over: the host forgets the former without moving anything."""
    cats, _ = cats_and_dogs(host)
    generate(host, prompt("a cat", Active(cats)))
    before = stacks(checkpoint.model)
    host.memory.load_models_gpu([checkpoint.forge_objects.unet.clone()])
    after = stacks(checkpoint.model)
    assert before
    assert all(mine is its for mine, its in zip(before, after, strict=True))


def test_a_host_that_keeps_to_the_cpu_beside_a_card_merges_as_without_one(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `--always-cpu`; a process with a card would merge dense layers of this model."""
    cats, _ = cats_and_dogs(host)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for tidied in ("synchronize", "ipc_collect"):  # Neo does so with any card that is there
        monkeypatch.setattr(torch.cuda, tidied, lambda: None)
    generate(host, prompt("a cat", Active(cats)))
    active = installation.active()
    assert active is not None
    assert not active.sessions()[checkpoint.model].merged


@pytest.mark.only_on("forge", "tests/host/neo has what Neo does where a model is placed in part")
def test_a_host_that_places_layers_one_by_one_finds_its_own_parameters(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In low-memory mode it makes new parameters of what it finds, which would then be its base."""
    cats, _ = cats_and_dogs(host)
    base = bases_of(checkpoint)
    host.set_option(DENSE, MERGE)
    active = [Active(cats)]
    exact = exact_output(checkpoint, "a cat", active)
    generate(host, prompt("a cat", *active))
    patcher, found = checkpoint.forge_objects.unet, []
    place = patcher.forge_patch_model

    def placing(*args: Any, **kwargs: Any) -> Any:
        found.append({name: image for name, image in bases_of(checkpoint).items() if name in ours})
        return place(*args, **kwargs)

    ours = {name for name, _ in checkpoint.model.named_parameters()}
    monkeypatch.setattr(patcher, "forge_patch_model", placing)
    loaded = host.memory.LoadedModel(patcher)
    for swapped_bytes in (10**9, -1):
        with torch.inference_mode():
            loaded.model_load(swapped_bytes)
        assert distance(generate(host, prompt("a cat", *active)), exact) < EXACT
        assert bases_of(checkpoint) != base
    assert found[0] == {name: image for name, image in base.items() if name in ours}
    assert found[1] != found[0], "moved as a whole, merged layers stay"


def test_a_second_pass_with_other_loras(host: Host, checkpoint: Checkpoint) -> None:
    cats, dogs = cats_and_dogs(host)
    base = bases_of(checkpoint)
    first, second = [Active(cats, 0.5)], [Active(dogs, 0.75), Active(cats, -0.25)]
    for _ in range(2):
        image = generate(host, prompt("a cat", *first), hires_prompt=prompt("a cat", *second))
        for values, active in zip(image.passes, (first, second), strict=True):
            exact = exact_output(checkpoint, "a cat", active)
            assert float((values.double() - exact).norm() / exact.norm()) < EXACT
    assert bases_of(checkpoint) == base


def test_a_refiner_gets_the_loras_too(host: Host, checkpoint: Checkpoint) -> None:
    cats, _ = cats_and_dogs(host)
    active = [Active(cats, 0.5)]
    first = [exact_output(checkpoint, "a cat", active)]
    del checkpoint
    for _ in range(2):
        image = generate(host, prompt("a cat", *active), refiner=lambda: Checkpoint(host, seed=1))
        exact = [first[0], exact_output(host.current, "a cat", active)]
        for values, expected in zip(image.passes, exact, strict=True):
            assert float((values.double() - expected).norm() / expected.norm()) < EXACT
        host_again = load_checkpoint(host, lambda: Checkpoint(host))
        assert branches(host_again.model) == 0


def test_a_weight_that_lies_elsewhere_is_not_needed(host: Host, checkpoint: Checkpoint) -> None:
    """In low-memory mode the forward fetches it; the branch follows its input."""
    cats, _ = cats_and_dogs(host)
    low = checkpoint.model.diffusion_model.low
    low.away, low.weight = low.weight.detach(), torch.nn.Parameter(low.weight.to("meta"), requires_grad=False)
    meta = low.weight
    for strength in (0.5, -0.25):
        active = [Active(cats, strength)]
        image = generate(host, prompt("a cat", *active))
        assert not image.comments
        assert distance(image, exact_output(checkpoint, "a cat", active)) < EXACT
    assert low.weight is meta
    image = generate(host, "a cat")
    assert distance(image, exact_output(checkpoint, "a cat")) < EXACT
    assert low.weight is meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_computes_in_half_precision(
    host: Host, checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    cats, _ = cats_and_dogs(host)
    low = checkpoint.model.diffusion_model.low
    generate(host, prompt("a cat", Active(cats)))
    with torch.inference_mode():
        x = torch.randn(5, 8).to(dtype)
        y = low(x)
    name = "diffusion_model.low"
    weight = checkpoint.weight(f"{name}.weight") + cats.deltas[f"{name}.weight"]
    exact = torch.nn.functional.linear(x.double(), weight, checkpoint.weight(f"{name}.bias"))
    assert y.dtype == dtype
    assert float((y.double() - exact).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps


def test_other_models_are_none_of_our_business(host: Host, checkpoint: Checkpoint) -> None:
    """A VAE or an upscaler that goes through the same functions, also one that takes no LoRAs."""

    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

    cats, _ = cats_and_dogs(host)
    cpu = torch.device("cpu")
    patcher = host.base.ModelPatcher(Other(), load_device=cpu, offload_device=cpu)
    before = {name: id(value) for name, value in patcher.model.named_parameters()}
    generate(host, prompt("a cat", Active(cats)))
    host.memory.load_models_gpu([patcher, checkpoint.forge_objects.unet], 1024)
    assert {name: id(value) for name, value in patcher.model.named_parameters()} == before
    assert hooks_of(patcher.model) == 0


def test_a_repeated_prompt_loads_once(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    cats_and_dogs(host)
    loads = count_loads(host, monkeypatch)
    for _ in range(3):
        generate(host, "a cat<lora:cats:1>")
    assert sorted(loads) == sorted(["JointTextEncoder", "Model"])


def test_sampling_after_a_toggle_off_and_on_without_a_generation(host: Host, checkpoint: Checkpoint) -> None:
    """Another extension may load the model between: what it gets fits the setting at that moment. Neo's
    patchers have never had the LoRAs; they have them at the next prompt."""
    cats, _ = cats_and_dogs(host)
    generate(host, prompt("a cat", Active(cats)))
    unet = checkpoint.forge_objects.unet
    for enabled in (False, True, False):
        host.set_option(ENABLED, enabled)
        host.sampling.sampling_prepare(unet, x=PICTURE)
        assert bool(branches(checkpoint.model)) is enabled
        assert bool(host.contract.merged(checkpoint)) is (host.name == "forge" and not enabled)
