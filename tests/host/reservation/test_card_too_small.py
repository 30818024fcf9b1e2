"""Law 4 on a card without room for what is asked: it is said before anything moves, and no request is larger
than the card."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from lib_precision_lora.host.generation.generations import Generations
from lib_precision_lora.host.generation.notices import GenerationStopped
from lib_precision_lora.ui.settings import ON_FAILURE, STOP
from tests.host.card import Card, size_of
from tests.host.card_plans import (
    EXACT,
    INFERENCE,
    PLENTY,
    UNET,
    factor_bytes,
    file_of,
    layer_bytes,
    least_bytes,
    placed,
    plain,
    preserved,
    workspace_bytes,
)
from tests.host.checkpoints import TEXT_LAYER, Checkpoint
from tests.host.images import distance, generate
from tests.host.lora_files import LAYERS, Active, exact_output, prompt
from tests.host.observers import bases_of, hooks_of, log_lines
from tests.host.webui import Host


@pytest.fixture
def host(bare_host: Host, card: Card) -> Host:
    return bare_host


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
        lambda: host.memory.load_models_gpu([unet], size, **{host.contract.kept: size}),
        lambda: host.memory.load_models_gpu([unet], memory_required=size),
        lambda: host.memory.load_models_gpu([unet.clone()], **{host.contract.kept: size}),
        lambda: host.memory.free_memory(size, host.memory.get_torch_device()),
        host.memory.unload_all_models,
        lambda: host.memory.load_models_gpu([unet], size, **{host.contract.kept: size}),
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
    assert bool(numbers) == (host.name == "forge" and not host.double), "Neo prints none"


@pytest.mark.parametrize(
    "broken",
    [
        "lib_precision_lora.host.reservation.budgeting.plan_budget",
        "lib_precision_lora.host.reservation.budgeting.Budgeting.footprints",
        "lib_precision_lora.host.reservation.memory.MemoryPlanner._make_room",
        "lib_precision_lora.branch.PatchSession.place",
        "lib_precision_lora.host.reservation.memory.MemoryPlanner._log",
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
