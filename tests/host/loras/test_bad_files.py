"""Files that cannot be applied: left out whole, told about in one sentence, and nothing else changes."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

from lib_precision_lora.host.generation.notices import GenerationStopped
from lib_precision_lora.ui.settings import CONTINUE, ENABLED, ON_FAILURE, STOP
from tests.host.checkpoints import Checkpoint
from tests.host.damage import DAMAGE, cats_and_dogs
from tests.host.images import distance, generate, load_checkpoint
from tests.host.lora_files import Active, exact_output, make_lora
from tests.host.observers import bases_of, branches, log_lines
from tests.host.webui import Host

EXACT = 1e-5


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_file_is_told_about_and_the_others_applied(
    host: Host, checkpoint: Checkpoint, damage: str
) -> None:
    write, reason = DAMAGE[damage]
    cats, dogs = cats_and_dogs(host)
    base = bases_of(checkpoint)
    generate(host, "a cat<lora:cats:1>")
    write(host, "broken")
    for _ in range(2):
        with log_lines() as lines:
            image = generate(host, "a cat<lora:broken:0.7><lora:dogs:0.5>")
        assert len(lines) == 1, lines
        assert "broken" in lines[0]
        assert re.search(reason, lines[0])
        assert "\n" not in lines[0]
        assert list(image.comments) == checkpoint.comments == lines
        assert image.parameters["Precision LoRA skipped"] == "broken"
        assert "broken" not in image.parameters.get("Lora hashes", "")
        assert distance(image, exact_output(checkpoint, "a cat", [Active(dogs, 0.5)])) < EXACT
    with log_lines() as lines:
        image = generate(host, "a cat<lora:broken:0.7>")
    assert len(lines) == 1, lines
    assert distance(image, exact_output(checkpoint, "a cat")) < EXACT, "nor is a former LoRA still active"
    assert branches(checkpoint.model) == branches(checkpoint.encoder) == 0
    assert bases_of(checkpoint) == base
    image = generate(host, "a cat<lora:cats:1>")
    assert not image.comments
    assert "Precision LoRA skipped" not in image.parameters
    assert distance(image, exact_output(checkpoint, "a cat", [Active(cats)])) < EXACT


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_file_stops_the_generation_where_that_is_set(
    host: Host, checkpoint: Checkpoint, damage: str
) -> None:
    write, reason = DAMAGE[damage]
    _, dogs = cats_and_dogs(host)
    write(host, "broken")
    host.set_option(ON_FAILURE, STOP)
    for _ in range(2):
        with pytest.raises(GenerationStopped, match="broken") as stopped:
            generate(host, "a cat<lora:broken:0.7><lora:dogs:0.5>")
        assert re.search(reason, str(stopped.value))
    image = generate(host, "a cat<lora:dogs:0.5>")
    assert not image.comments
    assert distance(image, exact_output(checkpoint, "a cat", [Active(dogs, 0.5)])) < EXACT


def test_a_bad_file_in_the_second_pass_stops_there(host: Host, checkpoint: Checkpoint) -> None:
    DAMAGE["truncated"][0](host, "broken")
    host.set_option(ON_FAILURE, STOP)
    with pytest.raises(GenerationStopped, match="broken"):
        generate(host, "a cat", hires_prompt="a cat<lora:broken:1>")
    assert not generate(host, "a cat").comments


def test_a_bad_file_in_the_second_pass_is_told_about(host: Host, checkpoint: Checkpoint) -> None:
    DAMAGE["truncated"][0](host, "broken")
    _, dogs = cats_and_dogs(host)
    image = generate(host, "a cat<lora:nobody:1>", hires_prompt="a cat<lora:broken:1><lora:dogs:0.5>")
    assert len(image.comments) == 2
    assert "nobody" in image.comments[0]
    assert "broken" in image.comments[1]
    assert image.parameters["Precision LoRA skipped"] == "nobody, broken"
    assert distance(image, exact_output(checkpoint, "a cat", [Active(dogs, 0.5)])) < EXACT


def test_a_former_generations_problem_stops_no_other(host: Host, checkpoint: Checkpoint) -> None:
    """An image is encoded before the prompt's LoRAs are read; what that loads must not stop it."""
    DAMAGE["truncated"][0](host, "broken")
    generate(host, "a cat<lora:broken:1>")
    host.set_option(ON_FAILURE, STOP)
    checkpoint.comments, checkpoint.extra_generation_params = [], {}
    host.memory.load_model_gpu(checkpoint.forge_objects.clip.patcher)
    assert not generate(host, "a cat").comments


def test_off_stops_nothing(host: Host, checkpoint: Checkpoint) -> None:
    cats_and_dogs(host)
    host.set_option(ON_FAILURE, STOP)
    DAMAGE["truncated"][0](host, "broken")
    with pytest.raises(GenerationStopped):
        generate(host, "a cat<lora:broken:1>")
    host.set_option(ENABLED, False)
    assert not generate(host, "a cat<lora:cats:1>").comments


def test_a_mended_file_is_read_again(host: Host, checkpoint: Checkpoint) -> None:
    DAMAGE["truncated"][0](host, "broken")
    assert generate(host, "a cat<lora:broken:1>").comments
    mended = make_lora("broken")
    mended.write(host)
    image = generate(host, "a cat<lora:broken:1>")
    assert not image.comments
    assert distance(image, exact_output(checkpoint, "a cat", [Active(mended)])) < EXACT


def test_a_file_that_vanishes_is_told_about(host: Host, checkpoint: Checkpoint) -> None:
    path = make_lora("cats").write(host)
    generate(host, "a cat<lora:cats:1>")
    os.unlink(path)
    image = generate(host, "a cat<lora:cats:1>")
    assert len(image.comments) == 1
    assert "cats" in image.comments[0]
    assert distance(image, exact_output(checkpoint, "a cat")) < EXACT


def test_a_few_unmatched_keys_are_listed_and_not_fatal(host: Host, checkpoint: Checkpoint) -> None:
    cats = make_lora("cats")
    extra = {
        f"lora_unet_nowhere_{index}.lora_{end}.weight": torch.ones(2, 2)
        for index in range(20)
        for end in ("up", "down")
    }
    cats.with_tensors(lambda tensors: tensors.update(extra)).write(host)
    with log_lines(level=20) as lines:
        image = generate(host, "a cat<lora:cats:1>")
    assert any("40 keys" in line and "lora_unet_nowhere_" in line for line in lines), lines
    assert not image.comments
    assert distance(image, exact_output(checkpoint, "a cat", [Active(cats)])) < EXACT


def test_bundled_embeddings_are_left_to_the_host(host: Host, checkpoint: Checkpoint) -> None:
    cats = make_lora("cats")
    bundled = {f"bundle_emb.cat.{name}": torch.full((2, 4), torch.nan) for name in ("clip_l", "clip_g")}
    cats.with_tensors(lambda tensors: tensors.update(bundled)).write(host)
    with log_lines(level=20) as lines:
        image = generate(host, "a cat<lora:cats:1>")
    assert not image.comments
    assert not any("bundle_emb" in line or "belong to no layer" in line for line in lines), lines
    assert distance(image, exact_output(checkpoint, "a cat", [Active(cats)])) < EXACT


def test_a_file_of_embeddings_alone_is_told_about(host: Host, checkpoint: Checkpoint) -> None:
    cats = make_lora("cats")

    def only_embeddings(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        tensors["bundle_emb.cat.clip_l"] = torch.ones(2, 4)

    cats.with_tensors(only_embeddings).write(host)
    image = generate(host, "a cat<lora:cats:1>")
    assert len(image.comments) == 1
    assert "textual inversions" in image.comments[0]


def test_keys_of_an_encoder_that_is_not_loaded_are_told_apart(host: Host, checkpoint: Checkpoint) -> None:
    """The checkpoint has CLIP-L: what is for T5 and CLIP-G is no mismatch, but is not applied either."""
    cats = make_lora("cats")
    names = (
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    )
    extra = {f"{name}.lora_{end}.weight": torch.ones(2, 2) for name in names for end in ("up", "down")}
    cats.with_tensors(lambda tensors: tensors.update(extra)).write(host)
    with log_lines(level=20) as lines:
        image = generate(host, "a cat<lora:cats:1>")
    assert any("4 keys are for what is not loaded: text encoder CLIP-G" in line for line in lines), lines
    assert not any("belong to no layer" in line for line in lines), lines
    assert not image.comments
    assert distance(image, exact_output(checkpoint, "a cat", [Active(cats)])) < EXACT


def test_text_encoder_keys_count_for_nothing_where_there_is_no_such_encoder(host: Host) -> None:
    checkpoint = load_checkpoint(host, lambda: Checkpoint(host, text_encoder=False))
    cats = make_lora("cats")
    cats.write(host)
    with log_lines(level=20) as lines:
        image = generate(host, "a cat<lora:cats:1>")
    assert not image.comments
    assert not any("belong to no layer" in line for line in lines), lines
    unet = {name: value for name, value in cats.deltas.items() if not name.startswith("clip_l.")}
    merged = {name: checkpoint.weight(name) + value for name, value in unet.items()}
    assert distance(image, checkpoint.exact("a cat", merged)) < EXACT


def test_a_reader_that_fails_unexpectedly_is_no_reason_to_keep_former_loras(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host swallows what is raised while LoRAs are activated, and would sample with the last ones."""
    from lib_precision_lora.host.loras import loading

    _, dogs = cats_and_dogs(host)
    generate(host, "a cat<lora:cats:1>")
    match_file = loading.match_file

    def failing(name: str, *args: Any) -> Any:
        if name == "weird":
            raise MemoryError("no room")
        return match_file(name, *args)

    monkeypatch.setattr(loading, "match_file", failing)
    make_lora("weird", seed=3).write(host)
    image = generate(host, "a cat<lora:weird:1><lora:dogs:0.5>")
    assert len(image.comments) == 1
    assert "weird" in image.comments[0]
    assert "no room" in image.comments[0]
    assert distance(image, exact_output(checkpoint, "a cat", [Active(dogs, 0.5)])) < EXACT


def test_conditioning_of_a_file_that_was_good_is_not_used_when_it_is_left_out(
    host: Host, checkpoint: Checkpoint
) -> None:
    """The host's own key for cached conditioning knows nothing of files, and the prompt is the same."""
    cats, _ = cats_and_dogs(host)
    for enabled in (False, True):
        cats.write(host)
        host.set_option(ENABLED, enabled)
        generate(host, "a cat<lora:cats:1>")
        DAMAGE["truncated"][0](host, "cats")
        host.set_option(ENABLED, True)
        image = generate(host, "a cat<lora:cats:1>")
        assert len(image.comments) == 1
        assert distance(image, exact_output(checkpoint, "a cat")) < EXACT


def test_the_choice_to_go_on_is_the_default(host: Host, checkpoint: Checkpoint) -> None:
    DAMAGE["truncated"][0](host, "broken")
    assert generate(host, "a cat<lora:broken:1>").comments
    host.set_option(ON_FAILURE, CONTINUE)
    assert generate(host, "a cat<lora:broken:1>").comments
