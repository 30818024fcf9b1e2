"""Strengths of a prompt that are no strengths: an image, and a word about that LoRA."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch

from lib_precision_lora.host.generation.notices import GenerationStopped
from lib_precision_lora.ui.settings import ENABLED, ON_FAILURE, STOP, TEXT_ENCODERS
from tests.host.checkpoints import Checkpoint
from tests.host.damage import cats_and_dogs
from tests.host.faults import failing, reported
from tests.host.images import distance, generate
from tests.host.lora_files import Active, LoraFile, exact_output, make_lora
from tests.host.observers import bases_of
from tests.host.webui import Host

EXACT = 1e-5

WRONG: Mapping[str, str] = {
    "1e39": "it must lie within",
    "-1e39": "it must lie within",
    "-1e300": "it must lie within",
    "1e39:0": "it must lie within",
    "0:1e39": "it must lie within",
    "nan": "it must be a finite number",
    "inf": "it must be a finite number",
    "-inf": "it must be a finite number",
    "1e999": "it must be a finite number",
    "te=nan:unet=1": "it must be a finite number",
    "te=1:unet=inf": "it must be a finite number",
    "abc": "'abc', it must be a number",
    "": "'', it must be a number",
    "1,5": "'1,5', it must be a number",
    "1:abc": "'abc', it must be a number",
    "te=abc": "'abc', it must be a number",
    "unet=abc": "'abc', it must be a number",
}
"""What stands behind a name → what is said of it."""


@pytest.fixture
def files(host: Host) -> tuple[LoraFile, LoraFile]:
    return cats_and_dogs(host)


@pytest.mark.parametrize("given", WRONG)
@pytest.mark.parametrize("text", ["<lora:cats:{}><lora:dogs:0.5>", "<lora:dogs:0.5><lora:cats:{}>"])
def test_a_strength_that_is_none_leaves_out_its_lora_alone(
    host: Host, checkpoint: Checkpoint, files: tuple[LoraFile, LoraFile], text: str, given: str
) -> None:
    _, dogs = files
    bases = bases_of(checkpoint)
    generate(host, "a cat<lora:cats:1>")
    for _ in range(2):
        image, report = reported(host, "a cat" + text.format(given))
        (comment,) = image.comments
        assert comment.startswith("LoRA cats was left out: ")
        assert WRONG[given] in comment
        assert image.parameters["Precision LoRA skipped"] == "cats"
        assert [file.name for file in report.applied] == ["dogs"]
        assert [file.problem for file in report.left_out] == [comment]
        json.dumps(report.to_json(), allow_nan=False)
        assert distance(image, exact_output(checkpoint, "a cat", [Active(dogs, 0.5)])) < EXACT
    image = generate(host, "a cat<lora:cats:1>")
    assert not image.comments
    assert distance(image, exact_output(checkpoint, "a cat", [Active(files[0])])) < EXACT
    generate(host, "a cat")
    assert bases_of(checkpoint) == bases


@pytest.mark.parametrize("given", ["1e39", "nan", "abc"])
def test_a_strength_that_is_none_stops_the_generation_where_that_is_set(
    host: Host, checkpoint: Checkpoint, files: tuple[LoraFile, LoraFile], given: str
) -> None:
    host.set_option(ON_FAILURE, STOP)
    with pytest.raises(GenerationStopped, match="LoRA cats was left out: its strength is"):
        generate(host, f"a cat<lora:cats:{given}>")
    assert not generate(host, "a cat<lora:cats:1>").comments


@pytest.mark.parametrize("given", ["0.5", "+.5", " 0.5 ", "5e-1", "te=0.5:unet=0.5", "0.5:0.5"])
def test_what_the_webui_can_read_is_a_strength(
    host: Host, checkpoint: Checkpoint, files: tuple[LoraFile, LoraFile], given: str
) -> None:
    image = generate(host, f"a cat<lora:cats:{given}>")
    assert not image.comments
    assert distance(image, exact_output(checkpoint, "a cat", [Active(files[0], 0.5)])) < EXACT


def test_a_strength_for_text_encoders_that_are_left_alone_is_not_looked_at(
    host: Host, checkpoint: Checkpoint, files: tuple[LoraFile, LoraFile]
) -> None:
    host.set_option(TEXT_ENCODERS, False)
    image = generate(host, "a cat<lora:cats:te=nan:unet=0.5>")
    assert not image.comments
    assert distance(image, exact_output(checkpoint, "a cat", [Active(files[0], 0.5, te=0.0)])) < EXACT


def test_a_lora_without_a_name_is_said(
    host: Host, checkpoint: Checkpoint, files: tuple[LoraFile, LoraFile]
) -> None:
    image = generate(host, "a cat<lora:te=1:unet=1><lora:dogs:0.5>")
    assert any("it has no name" in comment for comment in image.comments)
    assert distance(image, exact_output(checkpoint, "a cat", [Active(files[1], 0.5)])) < EXACT


@pytest.mark.parametrize(
    ("alpha", "strength"), [(1e300, 1.0), (-1e300, 0.5), (3e38, 20.0)], ids=["1e300", "-1e300", "3e38 at 20"]
)
def test_an_alpha_beyond_fp32_leaves_out_its_file(
    host: Host, checkpoint: Checkpoint, alpha: float, strength: float
) -> None:
    _, dogs = cats_and_dogs(host)
    key = "lora_unet_blocks_0_attn.alpha"
    number = torch.tensor(alpha, dtype=torch.float64)
    huge = make_lora("huge").with_tensors(lambda tensors: tensors.update({key: number}))
    huge.write(host)
    for _ in range(2):
        image, report = reported(host, f"a cat<lora:huge:te=0:unet={strength}><lora:dogs:0.5>")
        assert [file.name for file in report.left_out] == ["huge"]
        assert any("huge: layer" in comment for comment in image.comments)
        assert distance(image, exact_output(checkpoint, "a cat", [Active(dogs, 0.5)])) < EXACT


def test_a_fault_before_the_loras_of_a_prompt_are_read_is_said(
    host: Host, checkpoint: Checkpoint, files: tuple[LoraFile, LoraFile]
) -> None:
    """The WebUI would go on with those of the former prompt."""
    generate(host, "a cat<lora:dogs:1>")
    with failing("lib_precision_lora.host.binding:unreadable"):
        image, report = reported(host, "a cat<lora:cats:1>")
    assert [file.name for file in report.left_out] == ["cats"]
    assert any("LoRA cats was left out" in comment for comment in image.comments)
    assert distance(image, exact_output(checkpoint, "a cat")) < EXACT
    image, report = reported(host, "a cat<lora:cats:1>")
    assert not image.comments
    assert [file.name for file in report.applied] == ["cats"]


def test_while_off_the_webui_reads_its_prompt_itself(
    host: Host, checkpoint: Checkpoint, files: tuple[LoraFile, LoraFile]
) -> None:
    host.set_option(ENABLED, False)
    image = generate(host, "a cat<lora:cats:abc>")
    assert not image.comments
    assert distance(image, exact_output(checkpoint, "a cat")) < EXACT
