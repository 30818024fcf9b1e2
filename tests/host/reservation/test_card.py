"""Law 4 on a card of any size: the plan is told before anything moves, holds, and costs no generation."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from lib_precision_lora.branch import PatchSession
from lib_precision_lora.host import installation
from lib_precision_lora.host.reservation import memory as planning
from lib_precision_lora.memory.meter import ByteMeter
from lib_precision_lora.ui.settings import MARGIN, PLACEMENT, STREAMED
from tests.host.card import Card, size_of
from tests.host.card_plans import (
    EXACT,
    INFERENCE,
    LINEAR,
    factor_bytes,
    file_of,
    layer_bytes,
    least_bytes,
    placed,
    plain,
    preserved,
    streaming_bytes,
    workspace_bytes,
)
from tests.host.checkpoints import PICTURE, TEXT_LAYER, TOKENS, Checkpoint
from tests.host.images import distance, generate
from tests.host.lora_files import Active, exact_output, prompt, values
from tests.host.observers import log_lines
from tests.host.webui import Host


@pytest.fixture
def host(bare_host: Host, card: Card) -> Host:
    return bare_host


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("margin", [0, 4096])
def test_the_host_is_asked_for_factors_workspace_and_margin_and_nothing_twice(
    host: Host, card: Card, checkpoint: Checkpoint, rank: int, margin: int
) -> None:
    host.set_option(MARGIN, margin / 2**20)
    active = Active(file_of(host, "cats", rank))
    factors, workspace = factor_bytes(rank), workspace_bytes(rank)
    image = generate(host, prompt("a cat", active))
    assert preserved(card) == factors + workspace + margin
    assert placed(card) == [size_of(checkpoint.model)]
    assert card.factors() == factors
    assert distance(image, exact_output(checkpoint, "a cat", [active])) < EXACT
    for strength in (1.0, 0.5):
        card.forget()
        generate(host, prompt("a cat", Active(active.file, strength)))
        assert preserved(card) == workspace + margin
        assert (card.placements, card.evictions) == ([], [])
        assert card.factors() == factors


def test_what_is_told_to_stand_on_the_card_is_never_that_of_the_former_files(
    host: Host, card: Card, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    cats, dogs = file_of(host, "cats", 8), file_of(host, "dogs", 4)
    generate(host, prompt("a cat", Active(cats)))
    assert installation.active().memory_report.measured_bytes == factor_bytes(8)

    def fail(*_: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(PatchSession, "place", fail)
    image = generate(host, prompt("a cat", Active(dogs)))
    assert distance(image, exact_output(checkpoint, "a cat", [Active(dogs)])) < EXACT
    assert installation.active().memory_report.measured_bytes == 0, "the first forward has placed them, later"


def test_a_text_encoder_is_planned_as_a_model_is(host: Host, card: Card, checkpoint: Checkpoint) -> None:
    active = Active(file_of(host, "cats", 64, (TEXT_LAYER,)))
    image = generate(host, prompt("a cat", active))
    factors, workspace = layer_bytes((8, 4), 64), 512 * 4 * 3 * 64
    assert preserved(card, "JointTextEncoder") == factors + workspace
    assert preserved(card) == 0
    assert card.factors() == factors
    assert distance(image, exact_output(checkpoint, "a cat", [active])) < EXACT


@pytest.mark.only_on("forge", "patches of other extensions go Neo's own way, which counts its online ones")
def test_online_loras_of_another_extension_are_counted_once_and_all_patches_stay_as_they_are(
    host: Host, card: Card, checkpoint: Checkpoint
) -> None:
    """The host would count every factor again, and cast each to the model's type, in our tuples too."""
    checkpoint.model.computation_dtype = torch.float16
    active = Active(file_of(host, "cats", 8))
    theirs = ("lora", (values(8, 3), values(3, 8), None, None, None))
    name, asked, images = "diffusion_model.blocks.1.attn.weight", [], []
    for online in (False, True):
        seen = []

        def patches_of(unet: Any) -> list[object]:
            return [
                entry[1] for each in unet.lora_patches.values() for stack in each.values() for entry in stack
            ]

        def before_sampling(checkpoint: Checkpoint, online: bool = online, seen: list[Any] = seen) -> None:
            unet = checkpoint.forge_objects.unet.clone()
            unet.add_patches(
                filename="theirs", patches={name: theirs}, strength_patch=0.5, online_mode=online
            )
            seen += [unet, *patches_of(unet)]
            checkpoint.forge_objects.unet = unet

        host.memory.unload_all_models()
        card.forget()
        images.append(generate(host, prompt("a cat", active), before_sampling=before_sampling))
        asked.append(preserved(card))
        assert all(now is then for now, then in zip(patches_of(seen[0]), seen[1:], strict=True))
        assert theirs[1][0].dtype == torch.float32
    assert asked[0] == asked[1] > 0
    assert torch.equal(images[0].values, images[1].values)


@pytest.mark.only_on("forge", "a model of Neo gives way by itself: tests/host/neo")
@pytest.mark.parametrize("ours", [True, False])
def test_a_resident_model_is_placed_anew_where_the_host_would_ignore_a_larger_reserve(
    host: Host, card: Card, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    if not ours:
        monkeypatch.setattr(planning.MemoryPlanner, "_make_room", lambda *_: None)
    active = Active(file_of(host, "cats", 64))
    base = size_of(checkpoint.model)
    card.total = INFERENCE + base + least_bytes(64) - 800
    generate(host, "a cat")
    assert placed(card) == [base]
    card.forget()
    image = generate(host, prompt("a cat", active))
    assert distance(image, exact_output(checkpoint, "a cat", [active])) < EXACT
    if not ours:
        assert card.on(checkpoint.model) == base
        assert card.free() < INFERENCE + least_bytes(64)
        return
    assert card.evictions.count("Model") == 1
    assert len(placed(card)) == 1
    assert placed(card)[0] < base
    assert card.free() >= INFERENCE + workspace_bytes(64)
    for _ in range(2):
        card.forget()
        generate(host, prompt("a cat", active))
        assert placed(card) == []
    card.forget()
    assert plain(generate(host, "a cat"), checkpoint)
    assert placed(card) == [base]
    card.forget()
    generate(host, "a cat")
    assert placed(card) == []


@pytest.mark.only_on("forge", "a model of Neo gives way by itself: tests/host/neo")
def test_small_steps_down_add_up_to_one_worth_a_move(
    host: Host, card: Card, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = (64, 56, 48, 33)
    monkeypatch.setattr(planning, "WORTH_A_MOVE", 3000)
    files = {rank: Active(file_of(host, f"cats{rank}", rank)) for rank in ranks}
    base = size_of(checkpoint.model)
    card.total = INFERENCE + base + least_bytes(64) - 800
    wanted = []
    for rank in ranks:
        image = generate(host, prompt("a cat", files[rank]))
        assert distance(image, exact_output(checkpoint, "a cat", [files[rank]])) < EXACT
        wanted.append(installation.active().memory._plans[checkpoint.model].plan.reserve_bytes)
    assert all(before - after < 3000 for before, after in pairwise(wanted))
    assert wanted[0] - wanted[-1] > 3000
    assert [size == base for size in placed(card)] == [False, True]


@pytest.mark.parametrize("kind", ["as set", "all of it", "a part"])
def test_streamed_factors_make_the_same_image(
    host: Host, card: Card, checkpoint: Checkpoint, kind: str
) -> None:
    active = Active(file_of(host, "cats", 64))
    base, context = size_of(checkpoint.model), torch.zeros(8)
    resident = generate(host, prompt("a cat", active))
    report = installation.active().memory_report
    assert report.streamed_bytes == 0
    assert report.extra_bytes == factor_bytes(64) + workspace_bytes(64)
    with torch.inference_mode(), ByteMeter() as beside:
        checkpoint.model.diffusion_model(TOKENS, PICTURE, context)
    host.memory.unload_all_models()
    if kind == "as set":
        host.set_option(PLACEMENT, STREAMED)
    more = {"as set": 0, "all of it": 0, "a part": layer_bytes(LINEAR, 64) + 100}[kind]
    if kind != "as set":
        card.total = INFERENCE + base + least_bytes(64) + more
    card.forget()
    with log_lines(20) as lines:
        streamed = generate(host, prompt("a cat", active))
    report = installation.active().memory_report
    assert report.streamed_bytes == factor_bytes(64) - card.factors()
    assert report.measured_bytes == card.factors()
    assert report.extra_bytes == least_bytes(64) + more
    assert torch.equal(streamed.values, resident.values)
    if host.name == "forge" or kind == "as set":  # to the byte: Neo wants one more, or goes layer by layer
        assert placed(card) == [base], "no layer of the checkpoint gives way to factors that can be streamed"
    (session,) = [each for each in installation.active().sessions().values() if each.attached]
    assert card.factors() <= more
    assert (card.factors() > 0) == (kind == "a part")
    assert len(session._session.streamed) == (3 if kind == "a part" else 4)
    assert preserved(card) <= least_bytes(64) + more
    with torch.inference_mode(), ByteMeter() as meter:
        checkpoint.model.diffusion_model(TOKENS, PICTURE, context)
    assert beside.peak < meter.peak <= beside.peak + streaming_bytes(64)
    assert any("streamed from RAM" in line and "planned" in line for line in lines)
