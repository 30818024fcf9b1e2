"""From the LoRAs of a prompt to what the models compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lib_precision_lora.host import installation
from lib_precision_lora.ui.settings import CACHE
from tests.host.checkpoints import TEXT_LAYER, Checkpoint
from tests.host.images import Image, distance, generate
from tests.host.lora_files import Active, LoraFile, exact_output, make_lora, prompt
from tests.host.observers import bases_of, branches, count_loads, log_lines, stacks
from tests.host.webui import Host

EXACT = 1e-5


@pytest.fixture
def loras(host: Host) -> tuple[LoraFile, LoraFile]:
    files = make_lora("cats", seed=0), make_lora("dogs", seed=1, rank=3)
    for file in files:
        file.write(host)
    return files


def assert_exact(image: Image, checkpoint: Checkpoint, *active: Active) -> None:
    assert distance(image, exact_output(checkpoint, "a cat", active)) < EXACT


def test_several_loras_with_strengths_of_any_sign(
    host: Host, checkpoint: Checkpoint, loras: tuple[LoraFile, LoraFile]
) -> None:
    cats, dogs = loras
    for active in (
        [Active(cats, 0.7), Active(dogs, -0.4)],
        [Active(dogs, -1.0), Active(cats, 0.25)],
        [Active(cats, 0.5, te=-0.25), Active(dogs, 0.0, te=1.0)],
        [Active(cats, 1.0, te=0.0)],
        [Active(cats, -2.0)],
    ):
        assert_exact(generate(host, prompt("a cat", *active)), checkpoint, *active)


def test_te_and_unet_are_understood_by_name(
    host: Host, checkpoint: Checkpoint, loras: tuple[LoraFile, LoraFile]
) -> None:
    image = generate(host, "a cat<lora:cats:te=0.25:unet=0.75><lora:dogs:0.5:unet=-0.5>")
    assert_exact(image, checkpoint, Active(loras[0], 0.75, te=0.25), Active(loras[1], -0.5, te=0.5))


def test_zero_strength_is_the_base_exactly(
    host: Host, checkpoint: Checkpoint, loras: tuple[LoraFile, LoraFile]
) -> None:
    base = generate(host, "a cat").values
    assert torch.equal(generate(host, "a cat<lora:cats:0>").values, base)
    assert branches(checkpoint.model) == branches(checkpoint.encoder) == 0


@pytest.mark.parametrize("strengths", [(0.5, 0.5), (1.0, 1.0, 1.0), (0.75, -0.25), (0.5, -0.5)])
def test_the_same_file_twice_adds_up(
    host: Host, checkpoint: Checkpoint, loras: tuple[LoraFile, LoraFile], strengths: tuple[float, ...]
) -> None:
    active = [Active(loras[0], strength) for strength in strengths]
    assert_exact(generate(host, prompt("a cat", *active)), checkpoint, *active)
    assert_exact(generate(host, prompt("a cat", *active)), checkpoint, Active(loras[0], sum(strengths)))


def test_an_unknown_name_is_told_and_the_rest_applied(
    host: Host, checkpoint: Checkpoint, loras: tuple[LoraFile, LoraFile]
) -> None:
    generate(host, "a cat<lora:cats:1>")
    with log_lines() as lines:
        image = generate(host, "a cat<lora:nobody:0.5><lora:dogs:0.5>")
    assert len(lines) == 1
    assert "nobody" in lines[0]
    assert list(image.comments) == lines
    assert image.parameters["Precision LoRA skipped"] == "nobody"
    assert_exact(image, checkpoint, Active(loras[1], 0.5))
    assert [net.name for net in host.networks.loaded_networks] == ["dogs"]
    assert not generate(host, "a cat<lora:dogs:0.5>").comments


def test_a_file_that_appears_later_is_found(host: Host, checkpoint: Checkpoint) -> None:
    assert generate(host, "a cat<lora:cats:1>").comments
    cats = make_lora("cats")
    cats.write(host)
    image = generate(host, "a cat<lora:cats:1>")
    assert not image.comments
    assert_exact(image, checkpoint, Active(cats))


def test_a_change_of_strength_reloads_moves_and_rebuilds_nothing(
    host: Host, checkpoint: Checkpoint, loras: tuple[LoraFile, LoraFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    active = [Active(loras[0], 0.5), Active(loras[1], 0.25)]
    generate(host, prompt("a cat", *active))
    loads, moves = count_loads(host, monkeypatch), checkpoint.model.moves
    patcher, text_patcher = checkpoint.forge_objects.unet, checkpoint.forge_objects.clip.patcher
    before = stacks(checkpoint.model) + stacks(checkpoint.encoder)
    reads = read_calls(monkeypatch)
    for strengths in ((0.75, -0.5), (1.0, 0.125)):
        active = [Active(file, value) for file, value in zip(loras, strengths, strict=True)]
        assert_exact(generate(host, prompt("a cat", *active)), checkpoint, *active)
    after = stacks(checkpoint.model) + stacks(checkpoint.encoder)
    assert before
    assert all(now is then for now, then in zip(after, before, strict=True))
    assert checkpoint.forge_objects.unet is patcher
    assert checkpoint.forge_objects.clip.patcher is text_patcher
    assert (loads, checkpoint.model.moves, reads) == ([], moves, [])


def read_calls(patch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a name for every LoRA file that is matched with the model anew."""
    from lib_precision_lora.host.loras import loading

    calls: list[str] = []
    match_file = loading.match_file

    def counting(name: str, *args: Any) -> Any:
        calls.append(name)
        return match_file(name, *args)

    patch.setattr(loading, "match_file", counting)
    return calls


def test_another_lora_loads_and_moves_nothing(
    host: Host, checkpoint: Checkpoint, loras: tuple[LoraFile, LoraFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(host, prompt("a cat", Active(loras[0])))
    loads, moves = count_loads(host, monkeypatch), checkpoint.model.moves
    assert_exact(generate(host, prompt("a cat", Active(loras[1]))), checkpoint, Active(loras[1]))
    assert_exact(generate(host, "a cat"), checkpoint)
    assert_exact(generate(host, prompt("a cat", Active(loras[0]))), checkpoint, Active(loras[0]))
    assert (loads, checkpoint.model.moves) == ([], moves)


def test_a_file_that_is_written_anew_is_read_anew(host: Host, checkpoint: Checkpoint) -> None:
    for seed in range(3):
        cats = make_lora("cats", seed=seed)
        cats.write(host)
        encodes = checkpoint.encodes
        assert_exact(generate(host, "a cat<lora:cats:0.5>"), checkpoint, Active(cats, 0.5))
        assert checkpoint.encodes > encodes, "its text encoder part is another one"


def test_without_a_lora_after_one_is_the_base_exactly(
    host: Host, checkpoint: Checkpoint, loras: tuple[LoraFile, LoraFile]
) -> None:
    parameters = bases_of(checkpoint)
    base = generate(host, "a cat").values
    for _ in range(2):
        assert not torch.equal(generate(host, "a cat<lora:cats:1>").values, base)
        assert torch.equal(generate(host, "a cat").values, base)
        assert branches(checkpoint.model) == branches(checkpoint.encoder) == 0
    assert bases_of(checkpoint) == parameters


def test_a_file_for_the_text_encoder_alone_leaves_the_model_alone(host: Host, checkpoint: Checkpoint) -> None:
    words = make_lora("words", modules=[TEXT_LAYER])
    words.write(host)
    assert_exact(generate(host, "a cat<lora:words:1>"), checkpoint, Active(words))
    assert branches(checkpoint.model) == 0
    assert branches(checkpoint.encoder) == 1


def test_a_generation_that_reads_no_loras_keeps_the_last_ones(
    host: Host, checkpoint: Checkpoint, loras: tuple[LoraFile, LoraFile]
) -> None:
    """As the host has it where extra networks are disabled for one generation."""
    generate(host, "a cat<lora:cats:1>")
    assert_exact(generate(host, "a cat", activate=False), checkpoint, Active(loras[0]))


def test_many_generations_keep_as_much_as_one(host: Host, checkpoint: Checkpoint) -> None:
    """Nothing is kept for LoRAs that no prompt mentions any more, but for files within their bound of RAM."""
    host.set_option(CACHE, 0.003)
    for seed in range(8):
        make_lora(f"file{seed}", seed=seed).write(host)
        generate(host, f"a cat<lora:file{seed}:1>")
    active = installation.active()
    assert active is not None
    assert len(active.sessions()) == 2
    (kept,) = active.loader._matches.values()
    assert len(kept) == 1
    assert 1 <= len(active.loader._files._kept) < 8
    assert active.loader._files.kept_bytes <= 0.003 * 2**20
    assert branches(checkpoint.model) == 4
