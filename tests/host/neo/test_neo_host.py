"""What Neo's functions are given and asked, by stand-ins for them; `tests/neo` runs a real one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lib_precision_lora.host.generation.generations import products
from lib_precision_lora.host.interface import LoadRequest
from lib_precision_lora.host.loras.matching import FileMatch
from lib_precision_lora.host.neo.host import NeoHost
from lib_precision_lora.host.neo.patches import KeptPatches

TOTAL, RESERVED, LEAST = 8000, 400, 1200


class LoadedModel:
    """gone: what a model's unloading answers."""

    gone = True

    def __init__(self, patcher: Any) -> None:
        self.model = patcher

    def model_memory(self) -> int:
        return 1000

    def model_load(self, lowvram_model_memory: float = 0, force_patch_weights: bool = False) -> None:
        pass

    def model_unload(self, memory_to_free: Any = None, unpatch_weights: bool = True) -> bool:
        return self.gone


class Follower:
    """Keeps what it is told. merged: whether a model has merged layers; reserve: bytes that it asks for."""

    enabled = True

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.merged, self.reserve = False, 0.0

    def bring(self, model: nn.Module, patches: Any, merge: Any) -> None:
        self.told.append(("bring", model, patches))

    def stand_back_from(self, model: nn.Module) -> bool:
        self.told.append(("stand back", model))
        return True

    def load(self, request: LoadRequest, place: Callable[[float, float], None]) -> None:
        place(request.required, self.reserve)

    def release(self, model: Any) -> None:
        self.told.append(("release", model))

    def unmerge(self, model: Any) -> bool:
        self.told.append(("unmerge", model))
        return self.merged


@pytest.fixture
def neo(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """host, follower, model; requests: the arguments that reached Neo's `load_models_gpu`."""
    memory = ModuleType("backend.memory_management")
    requests: list[tuple[Any, ...]] = []
    values: dict[str, Any] = {
        "LoadedModel": type("LoadedModel", (LoadedModel,), dict(vars(LoadedModel))),
        "load_models_gpu": lambda *args, **kwargs: requests.append((args, kwargs)),
        "get_total_memory": lambda device: TOTAL,
        "get_torch_device": lambda: torch.device("cpu"),
        "extra_reserved_memory": lambda: RESERVED,
        "minimum_inference_memory": lambda: LEAST,
    }
    for name, value in values.items():
        setattr(memory, name, value)
    args = ModuleType("backend.args")
    args.dynamic_args = SimpleNamespace(nunchaku=False)  # type: ignore[attr-defined]
    stand_ins = {"backend.memory_management": memory, "backend.args": args}
    names = ("backend.patcher.lora", *(f"modules.sd_samplers_{part}" for part in SAMPLERS))
    stand_ins |= {name: ModuleType(name) for name in names}
    for name, module in stand_ins.items():
        parent, _, last = name.rpartition(".")
        if parent not in stand_ins:
            stand_in = sys.modules.get(parent) or ModuleType(parent)
            monkeypatch.setitem(sys.modules, parent, stand_in)
        monkeypatch.setattr(sys.modules[parent], last, module, raising=False)
        monkeypatch.setitem(sys.modules, name, module)
    host, follower = NeoHost(), Follower()
    for replacement in host.replacements(follower):
        assert getattr(replacement.owner, replacement.name) is not replacement.original
    model = nn.Linear(2, 2)
    return SimpleNamespace(host=host, follower=follower, model=model, memory=memory, requests=requests)


SAMPLERS = ("common", "kdiffusion", "timesteps")


def engine_of(model: nn.Module) -> Any:
    patcher = SimpleNamespace(model=model, load_device=torch.device("cpu"), patches_uuid=1)
    objects = SimpleNamespace(unet=patcher, clip=None)
    objects.shallow_copy = lambda: SimpleNamespace(unet=objects.unet, clip=objects.clip)
    return SimpleNamespace(forge_objects=objects, forge_objects_original=objects)


def match_of(value: object) -> FileMatch:
    return FileMatch({"weight": value, ("bias", (0, 1, 1)): value}, {}, (), (), "")


@pytest.mark.parametrize("least", [None, 300.0])
def test_a_reserve_counts_in_both_of_the_memory_arguments(neo: Any, least: float | None) -> None:
    """Beside what Neo keeps free for any image, where that is more than what this one needs."""
    neo.follower.reserve = 500.0
    neo.memory.load_models_gpu([], 1000.0, minimum_memory_required=least, force_full_load=True)
    (((models, required, force, minimum), named),) = neo.requests
    assert (models, required, force, named) == ([], 1500.0, False, {"force_full_load": True})
    assert minimum == (None if least is None else LEAST - RESERVED + 500.0)
    neo.follower.reserve = 0.0
    neo.memory.load_models_gpu([], 1000.0, minimum_memory_required=least)
    assert neo.requests[1][0] == ([], 1000.0, False, least)


def test_no_request_is_larger_than_the_card(neo: Any) -> None:
    neo.follower.reserve = float(TOTAL - LEAST)
    neo.memory.load_models_gpu([], float(TOTAL), minimum_memory_required=float(TOTAL))
    (((_, required, _, minimum), _),) = neo.requests
    assert required + RESERVED == TOTAL
    assert minimum + RESERVED == TOTAL


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("gone", [False, True])
def test_of_a_model_that_leaves_in_part_nothing_is_missing(neo: Any, gone: bool, merged: bool) -> None:
    """An image may be in the making, and Neo does not load the model again for its next step."""
    neo.host.use(engine := engine_of(neo.model), neo.host.keep(engine_of(neo.model)))
    neo.follower.merged = merged
    loaded = neo.memory.LoadedModel(engine.forge_objects.unet)
    neo.memory.LoadedModel.gone = gone
    assert loaded.model_unload(100) is gone
    steps = [step[0] for step in neo.follower.told]
    assert steps == ["unmerge", *(["release"] if gone else ["bring"] if merged else [])]


def test_layers_are_unmerged_only_where_a_model_is_placed_in_part_or_patched_anew(neo: Any) -> None:
    loaded = neo.memory.LoadedModel(engine_of(neo.model).forge_objects.unet)
    neo.model.current_weight_patches_uuid = loaded.model.patches_uuid
    loaded.model_load(5000)
    loaded.model_load()
    assert neo.follower.told == []
    loaded.model_load(500)
    assert neo.follower.told == [("unmerge", neo.model)]
    neo.model.current_weight_patches_uuid = "another one"
    loaded.model_load()
    assert neo.follower.told == [("unmerge", neo.model)] * 2


def test_loras_lie_beside_the_patchers_by_model(neo: Any) -> None:
    engine, value = engine_of(neo.model), object()
    kept = neo.host.keep(engine)
    assert isinstance(kept, KeptPatches)
    assert kept.add("cats", match_of(value), 0.5, 1.0) == "cats"
    assert kept.add("cats", match_of(value), 0.25, 1.0) == "cats (2)"
    patcher = engine.forge_objects.unet
    assert not neo.host.takes_loras(patcher)
    neo.host.use(engine, kept)
    assert neo.host.takes_loras(patcher)
    assert neo.host.patches(patcher) == {
        (source, strength): {
            "weight": [[strength, value, 1.0, None, None]],
            "bias": [[strength, value, 1.0, (0, 1, 1), None]],
        }
        for source, strength in (("cats", 0.5), ("cats (2)", 0.25))
    }
    assert vars(patcher).keys() == {"model", "load_device", "patches_uuid"}, "the patcher stays as it is"
    neo.host.use(engine, None)
    assert neo.host.patches(patcher) == {}
    neo.host.forget(neo.model)
    assert not neo.host.takes_loras(patcher)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, True),
        ({"_full_precision_mm": True}, False),
        ({"weight_function": [print]}, False),
        ({"bias_function": [print]}, False),
        ({"forge_force_cast_weights": True}, False),
        ({"layout_type": None}, None),
    ],
)
def test_a_layer_multiplies_quantized_while_nothing_changes_its_weight(
    neo: Any, attributes: dict[str, Any], expected: bool | None
) -> None:
    layer = nn.Linear(2, 2)
    vars(layer).update({"_full_precision_mm": False, "layout_type": "TensorCoreFP8Layout", **attributes})
    assert neo.host.quantized_product(layer) is expected
    assert neo.host.quantized_product(nn.Linear(2, 2)) is None
    both = nn.ModuleList([layer, layer, nn.Linear(2, 2)])  # a module counts once
    names = {True: {"quantized": 1}, False: {"dequantized": 1}, None: {}}
    assert products(neo.host, both) == names[expected]
    assert products(neo.host, None) == {}


def test_a_nunchaku_model_keeps_the_loras_of_its_host(neo: Any) -> None:
    assert neo.host.leaves_to_host(engine_of(neo.model)) is None
    sys.modules["backend.args"].dynamic_args.nunchaku = True
    assert "Nunchaku" in neo.host.leaves_to_host(engine_of(neo.model))
