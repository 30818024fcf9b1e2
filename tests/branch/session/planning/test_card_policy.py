"""What Automatic merges where a card makes images: launches and bytes count, not multiplications alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.card_layers import LAYERS, PASSES, Layer
from benchmarks.card_ways import Files, bare, counting, ours
from benchmarks.roofline import CARDS
from lib_precision_lora.branch import Patch, PatchSession
from lib_precision_lora.branch.session.planning.card_cost import branch_cost, layer_cost
from lib_precision_lora.branch.session.planning.policy import WORTH_A_MERGE_ON_A_CARD, process_device
from tests.branch.recipes import recipe

FP16 = torch.float16
RANK = 16
WIDTH = 320


class UNet(nn.Module):
    """One layer that Automatic merges on a card alone; part: the attribute that holds it."""

    def __init__(self, part: str, dtype: torch.dtype) -> None:
        super().__init__()
        layer = nn.Linear(WIDTH, WIDTH, dtype=dtype).requires_grad_(False)
        self.add_module(part, nn.ModuleDict({"layer": layer}))


def merged(
    part: str, dtype: torch.dtype, runs_on: Callable[[], torch.device] = process_device
) -> tuple[bool, bool]:
    """Whether the layer is planned to be merged, and whether it is. runs_on: what the host answers."""
    model = UNet(part, dtype)
    patch: Patch = recipe("lora-rank-16-bf16", (WIDTH, WIDTH)).patch(f"{part}.layer.weight")[0]
    with PatchSession(model, timed="diffusion_model", runs_on=runs_on) as session:
        planned = session.footprints([patch], "auto", torch.device("cpu"), dtype, "auto")
        session.apply_patches([patch], "auto", "auto")
        beside = not session.merged
    (footprint,) = planned.values()
    return not footprint.stages, not beside


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_one_lora_of_a_model_that_a_card_steps_is_merged_as_it_was_planned(dtype: torch.dtype) -> None:
    assert merged("diffusion_model", dtype) == (True, True)


@pytest.mark.usefixtures("card")
def test_bf16_stays_beside_its_weight() -> None:
    assert merged("diffusion_model", torch.bfloat16) == (False, False)


@pytest.mark.usefixtures("card")
def test_a_text_encoder_which_runs_once_stays_as_on_a_cpu() -> None:
    assert merged("transformer", FP16) == (False, False)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_a_host_that_runs_elsewhere_beside_a_card_counts_as_without_one(device: str) -> None:
    """As with the WebUI's `--always-cpu`."""
    assert merged("diffusion_model", FP16, lambda: torch.device(device)) == (False, False)


def test_without_a_card_multiplications_alone_count() -> None:
    assert merged("diffusion_model", FP16) == (False, False)


def share(layer: Layer) -> float:
    """Of the layer's own time, by the rule."""
    rows, channels, *_ = layer.weight
    columns = math.prod(layer.weight[1:])
    return branch_cost(RANK * (rows + columns), rows, channels, 0) / layer_cost(rows, columns, channels)


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_one_lora_costs_a_pass_of_a_full_precision_model_at_most_a_twentieth(name: str) -> None:
    """By the roofline, of these layers alone; the attention between them takes as much again."""
    with counting():
        for card in CARDS:
            own = beside = 0.0
            for layer in PASSES[name].layers():
                own += layer.count * card.seconds(bare(layer))
                if share(layer) <= WORTH_A_MERGE_ON_A_CARD:
                    beside += layer.count * card.seconds(ours(layer, Files(1, RANK, layer.dtype)))
            assert beside <= own / 20


def test_the_rule_is_within_three_times_the_roofline_of_the_card_that_it_names() -> None:
    (card,) = (card for card in CARDS if card.name == "RTX 4070")
    compared = [layer for layer in LAYERS if layer.dtype == FP16 and math.prod(layer.given) >= 2**21]
    assert len(compared) >= 4
    with counting():
        for layer in compared:
            counted = card.seconds(ours(layer, Files(1, RANK, FP16))) / card.seconds(bare(layer))
            assert counted / 3 <= share(layer) <= counted * 3, layer.name


def test_a_large_convolution_stays_beside_its_weight() -> None:
    layer = Layer("conv", (1280, 2560, 3, 3), (2, 2560, 32, 32), FP16)
    assert share(layer) < WORTH_A_MERGE_ON_A_CARD
