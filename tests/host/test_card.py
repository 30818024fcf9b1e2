"""Law 4 on a card of any size: the plan is told before anything moves, holds, and costs no generation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib_precision_lora.host import binding
from lib_precision_lora.host import memory as planning
from lib_precision_lora.host.generations import Generations, make_report
from lib_precision_lora.host.notices import GenerationStopped
from lib_precision_lora.memory.meter import ByteMeter
from lib_precision_lora.ui.settings import MARGIN, ON_FAILURE, PLACEMENT, STOP, STREAMED
from tests.host.card import Card, card_with_us, size_of
from tests.host.checkpoints import PICTURE, TEXT_LAYER, TOKENS, Checkpoint
from tests.host.generation import Image, distance, generate, load_checkpoint
from tests.host.loras import LAYERS, Active, LoraFile, exact_output, make_lora, prompt, values
from tests.host.observers import bases_of, hooks_of, log_lines
from tests.host.webui import Host

EXACT = 1e-5
INFERENCE = 1000
PLENTY = 10**7
UNET = tuple(layer for layer in LAYERS if layer != TEXT_LAYER)
LINEAR, CONV = (8, 8), (4, 36)
POSITIONS = 4 * 4


def allocated(*sizes: int) -> int:
    return sum(-(-size // 512) * 512 for size in sizes)


def layer_bytes(shape: tuple[int, int], rank: int) -> int:
    """An fp32 LoRA of one layer: up, down, and two numbers per rank."""
    return allocated(4 * shape[0] * rank, 4 * rank * shape[1], 4 * rank, 4 * rank)


def factor_bytes(rank: int) -> int:
    """Of a file on the four layers of UNET."""
    return 3 * layer_bytes(LINEAR, rank) + layer_bytes(CONV, rank)


def workspace_bytes(rank: int) -> int:
    """The larger of a linear layer's input and hidden states, and a convolution's hidden states."""
    return POSITIONS * 4 * max(8 + 3 * rank, 4 * rank)


def streaming_bytes(rank: int) -> int:
    """The two largest layers."""
    return layer_bytes(LINEAR, rank) + layer_bytes(CONV, rank)


def least_bytes(rank: int) -> int:
    return streaming_bytes(rank) + workspace_bytes(rank)


@pytest.fixture
def card(bare_host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """A card with room for everything, and us in the host; tests make it smaller."""
    monkeypatch.setattr(planning, "WORTH_A_MOVE", 1024)
    with card_with_us(bare_host, PLENTY, INFERENCE) as card:
        yield card


@pytest.fixture
def host(bare_host: Host, card: Card) -> Host:
    return bare_host


@pytest.fixture
def checkpoint(host: Host) -> Checkpoint:
    return load_checkpoint(host, lambda: Checkpoint(host))


def file_of(host: Host, name: str, rank: int, modules: tuple[str, ...] = UNET, seed: int = 0) -> LoraFile:
    lora = make_lora(name, seed, rank, modules)
    lora.write(host)
    return lora


def preserved(card: Card, model: str = "Model") -> float:
    """What the host was asked to keep free in the first request for this model."""
    return next(kept for names, _, kept in card.requests if names == model)


def placed(card: Card, model: str = "Model") -> list[int]:
    return [size for name, size in card.placements if name == model]


def plain(image: Image, checkpoint: Checkpoint) -> bool:
    return distance(image, exact_output(checkpoint, "a cat")) < EXACT


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


def test_a_text_encoder_is_planned_as_a_model_is(host: Host, card: Card, checkpoint: Checkpoint) -> None:
    active = Active(file_of(host, "cats", 64, (TEXT_LAYER,)))
    image = generate(host, prompt("a cat", active))
    factors, workspace = layer_bytes((8, 4), 64), 512 * 4 * (4 + 3 * 64)
    assert preserved(card, "JointTextEncoder") == factors + workspace
    assert preserved(card) == 0
    assert card.factors() == factors
    assert distance(image, exact_output(checkpoint, "a cat", [active])) < EXACT


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


def test_small_steps_down_add_up_to_one_worth_a_move(
    host: Host, card: Card, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = (64, 56, 48, 40)
    monkeypatch.setattr(planning, "WORTH_A_MOVE", 3000)
    files = {rank: Active(file_of(host, f"cats{rank}", rank)) for rank in ranks}
    base = size_of(checkpoint.model)
    card.total = INFERENCE + base + least_bytes(64) - 800
    wanted = []
    for rank in ranks:
        image = generate(host, prompt("a cat", files[rank]))
        assert distance(image, exact_output(checkpoint, "a cat", [files[rank]])) < EXACT
        wanted.append(binding.active().memory._plans[checkpoint.model].plan.reserve_bytes)
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
    report = make_report(binding.active(), [])
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
    report = make_report(binding.active(), [])
    assert report.streamed_bytes == factor_bytes(64) - card.factors()
    assert report.measured_bytes == card.factors()
    assert report.extra_bytes == least_bytes(64) + more
    assert torch.equal(streamed.values, resident.values)
    assert placed(card) == [base], "no layer of the checkpoint gives way to factors that can be streamed"
    (session,) = [each for each in binding.active().sessions().values() if each.attached]
    assert card.factors() <= more
    assert (card.factors() > 0) == (kind == "a part")
    assert len(session._session.streamed) == (3 if kind == "a part" else 4)
    assert preserved(card) <= least_bytes(64) + more
    with torch.inference_mode(), ByteMeter() as meter:
        checkpoint.model.diffusion_model(TOKENS, PICTURE, context)
    assert beside.peak < meter.peak <= beside.peak + streaming_bytes(64)
    assert any("streamed from RAM" in line and "planned" in line for line in lines)


def test_a_card_that_is_too_small_is_said_before_anything_moves(
    host: Host, card: Card, checkpoint: Checkpoint
) -> None:
    """And the generation goes on without the file, and the next ones without it or with a smaller one."""
    huge, small = Active(file_of(host, "huge", 512)), Active(file_of(host, "small", 4))
    base = bases_of(checkpoint)
    card.total = INFERENCE + size_of(checkpoint.model) + least_bytes(4) + 2000
    assert card.total - INFERENCE < least_bytes(512)
    image = generate(host, prompt("a cat", huge))
    assert plain(image, checkpoint)
    assert preserved(card) == 0
    assert card.factors() == 0
    (comment,) = image.comments
    assert re.search(r"huge.* does not fit on the card.*\d+ MB are needed.*What helps: .+; .+", comment)
    assert image.parameters["Precision LoRA skipped"] == "huge"
    assert str(host.lora_dir) not in comment
    assert plain(generate(host, "a cat"), checkpoint)
    image = generate(host, prompt("a cat", small))
    assert distance(image, exact_output(checkpoint, "a cat", [small])) < EXACT
    assert not image.comments
    generate(host, "a cat")
    assert bases_of(checkpoint) == base
    assert hooks_of(checkpoint.model) == 0


def test_files_that_fit_are_kept_in_the_order_of_the_prompt(
    host: Host, card: Card, checkpoint: Checkpoint
) -> None:
    cats, dogs = (Active(file_of(host, name, 4, UNET, seed)) for seed, name in enumerate(("cats", "dogs")))
    huge = Active(file_of(host, "huge", 512))
    card.total = INFERENCE + size_of(checkpoint.model) + factor_bytes(8) + workspace_bytes(8) + 2000
    image = generate(host, prompt("a cat", cats, huge, dogs))
    assert distance(image, exact_output(checkpoint, "a cat", [cats, dogs])) < EXACT
    (comment,) = image.comments
    assert "huge" in comment


def test_set_to_stop_nothing_of_the_model_moves(host: Host, card: Card, checkpoint: Checkpoint) -> None:
    huge = Active(file_of(host, "huge", 512))
    host.set_option(ON_FAILURE, STOP)
    card.total = INFERENCE + size_of(checkpoint.model) + 2000
    with pytest.raises(GenerationStopped, match=r"huge.* MB"):
        generate(host, prompt("a cat", huge))
    assert placed(card) == []
    assert plain(generate(host, "a cat"), checkpoint)
    card.total = PLENTY
    image = generate(host, prompt("a cat", huge))
    assert distance(image, exact_output(checkpoint, "a cat", [huge])) < EXACT


def test_conditioning_without_a_file_that_did_not_fit_is_not_used_once_it_does(
    host: Host, card: Card, checkpoint: Checkpoint
) -> None:
    active = Active(file_of(host, "cats", 64, (TEXT_LAYER,)))
    card.total = INFERENCE + size_of(checkpoint.model) + size_of(checkpoint.encoder)
    assert plain(generate(host, prompt("a cat", active)), checkpoint)
    card.total = PLENTY
    image = generate(host, prompt("a cat", active))
    assert distance(image, exact_output(checkpoint, "a cat", [active])) < EXACT


def test_other_programs_on_the_card_count(host: Host, card: Card, checkpoint: Checkpoint) -> None:
    active = Active(file_of(host, "cats", 64))
    card.others = PLENTY - INFERENCE - size_of(checkpoint.model) - least_bytes(64) + 1
    image = generate(host, prompt("a cat", active))
    assert distance(image, exact_output(checkpoint, "a cat", [active])) < EXACT
    assert placed(card)[-1] < size_of(checkpoint.model)
    host.memory.unload_all_models()
    card.others = PLENTY - INFERENCE - least_bytes(64) + 1
    assert generate(host, prompt("a cat", active)).comments


@pytest.mark.parametrize("size", [float("nan"), float("inf"), 1e30, 2.0**60])
def test_no_request_is_above_the_card_whatever_is_asked(
    host: Host, card: Card, checkpoint: Checkpoint, size: float, capsys: pytest.CaptureFixture[str]
) -> None:
    active = Active(file_of(host, "cats", 64))
    generate(host, prompt("a cat", active))
    card.total = 500 * 2**20
    card.inference = 100 * 2**20
    unet = checkpoint.forge_objects.unet
    card.forget()
    capsys.readouterr()
    for ask in (
        lambda: host.memory.load_models_gpu([unet], size, size),
        lambda: host.memory.load_models_gpu([unet], memory_required=size),
        lambda: host.memory.load_models_gpu([unet.clone()], hard_memory_preservation=size),
        lambda: host.memory.free_memory(size, host.memory.get_torch_device()),
        host.memory.unload_all_models,
        lambda: host.memory.load_models_gpu([unet], size, size),
    ):
        ask()
    assert len(card.freed) > 4
    assert all(0 <= freed <= card.total for freed in card.freed)
    assert all(kept <= card.total - card.inference for _, _, kept in card.requests)
    printed = capsys.readouterr().out
    numbers = [
        float(n) for n in re.findall(r"(?:Trying to free|Inference Require:) ([\d.e+na]+) MB", printed)
    ]
    assert all(number <= 500 for number in numbers)
    assert bool(numbers) == (host.kind == "forge")


@pytest.mark.parametrize(
    "broken",
    [
        "lib_precision_lora.host.budgeting.plan_budget",
        "lib_precision_lora.host.budgeting.Budgeting.footprints",
        "lib_precision_lora.host.memory.MemoryPlanner._make_room",
        "lib_precision_lora.branch.PatchSession.place",
        "lib_precision_lora.host.memory.MemoryPlanner._log",
    ],
)
def test_no_fault_of_the_plan_costs_a_generation(
    host: Host, card: Card, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    active = Active(file_of(host, "cats", 8))
    with monkeypatch.context() as patch, log_lines() as lines:
        patch.setattr(broken, fail)
        for strength in (1.0, 0.5):
            image = generate(host, prompt("a cat", Active(active.file, strength)))
            exact = exact_output(checkpoint, "a cat", [Active(active.file, strength)])
            assert distance(image, exact) < EXACT
        assert any("please report" in line for line in lines)
    image = generate(host, prompt("a cat", active))
    assert distance(image, exact_output(checkpoint, "a cat", [active])) < EXACT
    assert card.factors() == factor_bytes(8)


def test_factors_leave_the_card_with_the_model_and_come_back_with_it(
    host: Host, card: Card, checkpoint: Checkpoint
) -> None:
    active = Active(file_of(host, "cats", 8, tuple(LAYERS)))
    first = generate(host, prompt("a cat", active))
    assert card.factors() == factor_bytes(8) + layer_bytes((8, 4), 8)
    host.memory.unload_all_models()
    assert card.factors() == 0
    assert card.free() == PLENTY
    again = generate(host, prompt("a cat", active))
    assert torch.equal(again.values, first.values)
    assert card.factors() >= factor_bytes(8)


def test_a_file_that_does_not_fit_beside_one_model_is_left_out_of_the_other_too(
    host: Host, card: Card, checkpoint: Checkpoint
) -> None:
    """Also where the text encoder's part fits, or was computed when there was still room."""
    huge = Active(file_of(host, "huge", 512, tuple(LAYERS)))
    card.total = PLENTY
    with_it = generate(host, prompt("a cat", huge))
    assert distance(with_it, exact_output(checkpoint, "a cat", [huge])) < EXACT
    host.memory.unload_all_models()
    card.total = INFERENCE + least_bytes(512) - 512
    card.inference = 0
    for _ in range(2):
        card.total = least_bytes(512) - 512
        image = generate(host, prompt("a cat", huge))
        assert plain(image, checkpoint)
        assert len(image.comments) == 1
        card.total = PLENTY
        again = generate(host, prompt("a cat", huge))
        assert distance(again, exact_output(checkpoint, "a cat", [huge])) < EXACT
        host.memory.unload_all_models()


def test_the_report_of_a_generation_knows_what_did_not_fit(
    host: Host, card: Card, checkpoint: Checkpoint
) -> None:
    huge, small = Active(file_of(host, "huge", 512)), Active(file_of(host, "small", 4))
    card.inference, card.total = 0, least_bytes(512) - 512
    generations, p = Generations(), SimpleNamespace()
    generations.begin(p)
    generate(host, prompt("a cat", small, huge))
    report = generations.end(p, "Automatic")
    assert report is not None
    assert [file.name for file in report.applied] == ["small"]
    (left_out,) = report.left_out
    assert left_out.name == "huge"
    assert "does not fit on the card" in str(left_out.problem)
    assert str(host.lora_dir) not in str(left_out.problem)
