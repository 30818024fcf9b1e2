"""Law 5 for every step: whatever fails, there is an image, a true report, and the next one is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from lib_precision_lora.host.generation.notices import GenerationStopped
from lib_precision_lora.ui.settings import AUTOMATIC, ON_FAILURE, PLACEMENT, STOP, STREAMED
from tests.host.card import Card, card_with_us
from tests.host.card_plans import INFERENCE, PLENTY
from tests.host.checkpoints import Checkpoint
from tests.host.faults import (
    PLACING,
    REFRESHING,
    RUNNING,
    SETTING,
    STREAMING,
    failing,
    reported,
)
from tests.host.images import Image, distance, generate
from tests.host.lora_files import Active, LoraFile, exact_output, make_lora
from tests.host.observers import bases_of, branches, hooks_of
from tests.host.webui import Host

EXACT = 1e-5
TEXT = "<lora:cats:0.5:0.5><lora:dogs:-0.75:0.25>"
STRENGTHS = {"cats": (0.5, 0.5), "dogs": (0.25, -0.75)}
RANKS = {"cats": 2, "dogs": 3}


@pytest.fixture
def card(bare_host: Host) -> Iterator[Card]:
    with card_with_us(bare_host, PLENTY, INFERENCE) as card:
        yield card


@pytest.fixture
def files(host: Host) -> Mapping[str, LoraFile]:
    files = {name: make_lora(name, seed, RANKS[name]) for seed, name in enumerate(STRENGTHS)}
    for file in files.values():
        file.write(host)
    return files


def active(files: Mapping[str, LoraFile], *names: str) -> list[Active]:
    return [Active(files[name], *STRENGTHS[name]) for name in names]


def require_true(image: Image, report: Any, checkpoint: Checkpoint, files: Mapping[str, LoraFile]) -> None:
    """The image is that of the files that are said to be applied, and each other one is told by name."""
    applied = [file.name for file in report.applied]
    assert [file.name for file in report.files] == list(STRENGTHS)
    assert distance(image, exact_output(checkpoint, "a cat", active(files, *applied))) < EXACT, applied
    for file in report.left_out:
        assert file.problem is not None
        assert any(file.name in comment or "all of them" in comment for comment in image.comments)
    assert bool(report.left_out) == bool(image.comments)
    skipped = image.parameters.get("Precision LoRA skipped", "")
    assert bool(report.left_out) == bool(skipped)


def require_right(host: Host, checkpoint: Checkpoint, files: Mapping[str, LoraFile]) -> None:
    """A generation with all files, and one without any."""
    image, report = reported(host, f"a cat{TEXT}")
    assert not image.comments
    assert [file.name for file in report.applied] == list(STRENGTHS)
    require_true(image, report, checkpoint, files)
    assert distance(generate(host, "a cat"), exact_output(checkpoint, "a cat")) < EXACT


@pytest.mark.parametrize("step", [*SETTING, *REFRESHING])
@pytest.mark.parametrize("before", ["a cat<lora:dogs:1>", "a cat"], ids=["another set", "no set"])
def test_a_fault_while_loras_are_set_costs_at_most_the_loras(
    host: Host, checkpoint: Checkpoint, files: Mapping[str, LoraFile], step: str, before: str
) -> None:
    bases = bases_of(checkpoint)
    generate(host, before)
    with failing({**SETTING, **REFRESHING}[step]) as raised:
        for _ in range(2):
            image, report = reported(host, f"a cat{TEXT}")
            require_true(image, report, checkpoint, files)
        assert raised or before != "a cat", "of another set, some things are kept"
    require_right(host, checkpoint, files)
    assert bases_of(checkpoint) == bases
    assert hooks_of(checkpoint.model) == branches(checkpoint.model) == 0


@pytest.mark.parametrize("step", [*SETTING, *REFRESHING])
def test_a_fault_while_loras_are_set_stops_the_generation_where_that_is_set(
    host: Host, checkpoint: Checkpoint, files: Mapping[str, LoraFile], step: str
) -> None:
    generate(host, "a cat")
    host.set_option(ON_FAILURE, STOP)
    with failing({**SETTING, **REFRESHING}[step]) as raised:
        try:
            image, report = reported(host, f"a cat{TEXT}")
        except GenerationStopped as stopped:
            assert "no such luck" in str(stopped)  # noqa: PT017
        else:
            assert not report.left_out
            require_true(image, report, checkpoint, files)
        assert raised or (host.name, step) == ("neo", "trying again"), (
            "without LoRAs Neo's models have no session"
        )
    require_right(host, checkpoint, files)


@pytest.mark.parametrize("step", [*PLACING, *RUNNING])
def test_a_fault_while_factors_are_placed_or_run_costs_at_most_the_loras(
    host: Host, checkpoint: Checkpoint, files: Mapping[str, LoraFile], step: str
) -> None:
    bases = bases_of(checkpoint)
    with failing({**PLACING, **RUNNING}[step]) as raised:
        for _ in range(2):
            image, report = reported(host, f"a cat{TEXT}")
            require_true(image, report, checkpoint, files)
            assert raised
    require_right(host, checkpoint, files)
    assert bases_of(checkpoint) == bases
    assert hooks_of(checkpoint.model) == 0


@pytest.mark.parametrize("step", STREAMING)
def test_a_fault_while_factors_are_streamed_costs_at_most_the_loras(
    bare_host: Host, card: Card, checkpoint: Checkpoint, files: Mapping[str, LoraFile], step: str
) -> None:
    bare_host.set_option(PLACEMENT, STREAMED)
    bases = bases_of(checkpoint)
    with failing(STREAMING[step]) as raised:
        for _ in range(2):
            image, report = reported(bare_host, f"a cat{TEXT}")
            require_true(image, report, checkpoint, files)
            assert raised
    require_right(bare_host, checkpoint, files)
    assert bases_of(checkpoint) == bases


def rank_of(value: Any) -> int:
    """The rank of what an operand, a part of one, or a list of additions stands for."""
    if isinstance(value, list):
        return sum(addition.term.rank for addition in value)
    return int(value.down.shape[0])


def with_dogs(*args: Any, **kwargs: Any) -> bool:
    """Whether a call concerns more than the file of rank 2, among additions or operands."""
    found = next(arg for arg in args if isinstance(arg, list) or hasattr(arg, "down"))
    return rank_of(found) != RANKS["cats"]


ONE_FILE = {
    "a stack": PLACING["a stack"],
    "scales": PLACING["scales"],
    "the output side": RUNNING["the output side"],
    "copying": STREAMING["copying"],
    "setting out": STREAMING["setting out"],
    "arriving": STREAMING["arriving"],
}


@pytest.mark.parametrize("text", [TEXT, "<lora:dogs:-0.75:0.25><lora:cats:0.5:0.5>"])
@pytest.mark.parametrize("step", ["a stack", "scales", "the output side", "copying", "setting out"])
def test_a_fault_of_one_file_leaves_the_other_one_alone(
    bare_host: Host, card: Card, checkpoint: Checkpoint, files: Mapping[str, LoraFile], step: str, text: str
) -> None:
    """On a layer that both of them change, and in whichever order."""
    streamed = ONE_FILE[step] in STREAMING.values()
    bare_host.set_option(PLACEMENT, STREAMED if streamed else AUTOMATIC)
    for _ in range(2):
        with failing(ONE_FILE[step], with_dogs) as raised:
            image, report = reported(bare_host, f"a cat{text}")
        assert raised
        assert [file.name for file in report.applied] == ["cats"]
        assert [file.name for file in report.left_out] == ["dogs"]
        assert image.parameters["Precision LoRA skipped"] == "dogs"
        assert "no such luck" in "".join(image.comments)
        assert "cats" not in "".join(image.comments)
        assert distance(image, exact_output(checkpoint, "a cat", active(files, "cats"))) < EXACT
    require_right(bare_host, checkpoint, files)


def test_a_fault_in_the_middle_of_sampling_ends_with_its_file(
    host: Host, checkpoint: Checkpoint, files: Mapping[str, LoraFile]
) -> None:
    """In the second step, at its first layer: the first step has both files, as the message says."""
    begun: list[Any] = []

    def late(*args: Any, **kwargs: Any) -> bool:
        return bool(begun) and with_dogs(*args, **kwargs)

    with failing(RUNNING["the output side"], late) as raised:
        image, report = reported(host, f"a cat{TEXT}", between_steps=begun.append)
    assert raised
    assert [file.name for file in report.left_out] == ["dogs"]
    (comment,) = image.comments
    assert "dogs: layer diffusion_model" in comment
    assert "what was computed before that has it" in comment
    expected = [Active(files["cats"], 0.5), Active(files["dogs"], 0.0, te=-0.75)]
    assert distance(image, exact_output(checkpoint, "a cat", expected)) < EXACT
    require_right(host, checkpoint, files)


def test_a_fault_in_a_forward_stops_the_generation_where_that_is_set(
    host: Host, checkpoint: Checkpoint, files: Mapping[str, LoraFile]
) -> None:
    host.set_option(ON_FAILURE, STOP)
    for step in [step for step in (*RUNNING, *PLACING) if step != "where factors stay"]:
        with failing({**RUNNING, **PLACING}[step]) as raised:
            with pytest.raises(GenerationStopped, match="no such luck"):
                generate(host, f"a cat{TEXT}")
            assert raised
    require_right(host, checkpoint, files)


def test_factors_that_cannot_be_sent_ahead_come_when_it_is_their_turn(
    bare_host: Host, card: Card, checkpoint: Checkpoint, files: Mapping[str, LoraFile]
) -> None:
    """A fault that passes costs nothing: whatever failed is done again."""
    bare_host.set_option(PLACEMENT, STREAMED)
    for count in range(1, 5):
        calls: list[None] = []

        def once(*args: Any, count: int = count, calls: list[None] = calls, **kwargs: Any) -> bool:
            calls.append(None)
            return len(calls) == count

        with failing(STREAMING["copying"], once) as raised:
            image, report = reported(bare_host, f"a cat{TEXT}")
        assert raised
        assert not report.left_out
        require_true(image, report, checkpoint, files)


@pytest.mark.parametrize("text", [TEXT, "<lora:dogs:-0.75:0.25><lora:cats:0.5:0.5>"])
def test_a_file_that_fails_in_the_text_encoder_is_left_out_of_the_model_too(
    host: Host, checkpoint: Checkpoint, files: Mapping[str, LoraFile], text: str
) -> None:
    def in_the_encoder(model: Any, patches: Any, *args: Any, **kwargs: Any) -> bool:
        dogs = any("dogs" in patch.source for patch in patches)
        return dogs and not hasattr(model, "diffusion_model")

    for _ in range(2):
        with failing(REFRESHING["effective weights"], in_the_encoder) as raised:
            image, report = reported(host, f"a cat{text}")
        assert raised
        assert [file.name for file in report.left_out] == ["dogs"]
        assert len(image.comments) == 1
        assert distance(image, exact_output(checkpoint, "a cat", active(files, "cats"))) < EXACT
    require_right(host, checkpoint, files)


def test_a_file_that_fails_in_the_model_alone_is_said_to_have_acted_on_the_prompt(
    host: Host, checkpoint: Checkpoint, files: Mapping[str, LoraFile]
) -> None:
    """The conditioning is there before the model is loaded."""

    def in_the_model(model: Any, patches: Any, *args: Any, **kwargs: Any) -> bool:
        return hasattr(model, "diffusion_model") and any("dogs" in patch.source for patch in patches)

    with failing(REFRESHING["effective weights"], in_the_model):
        image, report = reported(host, f"a cat{TEXT}")
        (comment,) = image.comments
        assert comment.endswith("; its part for the text encoders has acted on the prompt")
        assert [file.name for file in report.left_out] == ["dogs"]
        there = [*active(files, "cats"), Active(files["dogs"], 0.0, te=-0.75)]
        assert distance(image, exact_output(checkpoint, "a cat", there)) < EXACT
        (comment,) = generate(host, "a cat<lora:dogs:0:1>").comments
        assert "has acted" not in comment, "it had nothing to do there"
    require_right(host, checkpoint, files)
