"""A patch of another extension makes a layer of Neo wider: files are judged by the checkpoint's own."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib_precision_lora.host.loras.matching import key_map_of, match_file
from tests.neo.real_neo import Neo
from tests.neo.tiny_models import TINY_MODELS

NAME = "diffusion_model.txt_in.weight"
CPU = torch.device("cpu")


@pytest.fixture
def widened(neo: Neo) -> Iterator[SimpleNamespace]:
    """A Flux whose layer of the prompt has twice its columns, by a LoRA that Neo has merged."""
    from modules_forge.packages.comfy.weight_adapter.lora import LoRAAdapter

    tiny = TINY_MODELS["Flux"](neo)
    own = tiny.model.get_parameter(NAME)
    rows, columns = own.shape
    up, down = torch.ones(rows, 2), torch.ones(2, 2 * columns)
    patcher = neo.patcher.ModelPatcher(tiny.model, CPU, CPU)
    wider = LoRAAdapter(set(), (up, down, 2.0, None, None, (rows, 2 * columns)))
    patcher.add_patches({NAME: wider}, 1.0, 1.0, filename="another", online_mode=False)
    neo.memory_management.load_models_gpu([patcher])
    assert tiny.model.get_parameter(NAME).shape == (rows, 2 * columns)
    yield SimpleNamespace(model=tiny.model, names=tiny.key_map, own=own.clone(), patcher=patcher)
    neo.memory_management.unload_all_models()


def file_for(shape: torch.Size) -> dict[str, torch.Tensor]:
    return {
        "lora_unet_txt_in.lora_up.weight": torch.ones(shape[0], 2),
        "lora_unet_txt_in.lora_down.weight": torch.ones(2, shape[1]),
    }


def test_the_checkpoints_own_weight_is_found(precision_lora: Any, widened: SimpleNamespace) -> None:
    for model in (widened.model, weakref.proxy(widened.model)):
        aside = precision_lora.host.put_aside(model, NAME)
        assert torch.equal(aside, widened.own)
        assert precision_lora.host.put_aside(model, "diffusion_model.img_in.weight") is None


def test_a_file_is_judged_by_it(precision_lora: Any, widened: SimpleNamespace) -> None:
    host = precision_lora.host
    keys = key_map_of(weakref.proxy(widened.model), widened.names, host.put_aside)
    match = match_file("ours", file_for(widened.own.shape), keys, None, host.parse)
    assert set(match.unet) == {NAME}
