"""Law 5 where the card runs out of memory after all: streamed, else left out, and the generation goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lib_precision_lora.branch import PatchSession
from lib_precision_lora.host import installation
from tests.host.card import Card, card_with_us
from tests.host.checkpoints import Checkpoint
from tests.host.images import generate
from tests.host.lora_files import Active, make_lora, prompt, values
from tests.host.observers import bases_of, hooks_of, log_lines
from tests.host.webui import Host
from tests.no_memory import FOREVER, NoMemory

PLENTY = 10**7


@pytest.fixture
def card(bare_host: Host) -> Iterator[Card]:
    with card_with_us(bare_host, PLENTY) as card:
        yield card


@pytest.fixture
def host(bare_host: Host, card: Card) -> Host:
    return bare_host


def without_memory(patch: pytest.MonkeyPatch, name: str, memory: NoMemory) -> None:
    """This method of every session runs where memory fails."""
    method: Callable[..., Any] = getattr(PatchSession, name)

    def run(session: PatchSession, *args: Any, **kwargs: Any) -> Any:
        with memory:
            return method(session, *args, **kwargs)

    patch.setattr(PatchSession, name, run)


@pytest.mark.parametrize("times", [1, FOREVER], ids=["once", "from then on"])
@pytest.mark.parametrize("method", ["apply_patches", "place"])
def test_memory_that_runs_out_costs_at_most_the_loras_of_one_generation(
    host: Host, card: Card, checkpoint: Checkpoint, method: str, times: int
) -> None:
    """With a DoRA, whose norms are read when it is attached, and with changes of a norm and a bias."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lora_unet_low.dora_scale"] = values(8, 1).abs()
        tensors["lora_unet_blocks_0_norm.diff"] = values(8)
        tensors["lora_unet_blocks_1_mlp.diff_b"] = values(8)

    lora = make_lora("cats", rank=4).with_tensors(change)
    lora.write(host)
    active, base = Active(lora), bases_of(checkpoint)
    exact = generate(host, prompt("a cat", active)).values
    pristine = generate(host, "a cat").values
    host.memory.unload_all_models()
    first, failed = 0, True
    while failed:
        first += 1
        memory = NoMemory(first, times)
        with pytest.MonkeyPatch.context() as patch, log_lines() as lines:
            without_memory(patch, method, memory)
            image = generate(host, prompt("a cat", active))
        failed = memory.failed
        if times == 1:
            assert torch.equal(image.values, exact), "tried once more, streamed"
            assert not image.comments
        elif failed:
            assert not torch.equal(image.values, exact)
            assert all("cats" in comment and "no memory for its" in comment for comment in image.comments)
            assert image.comments
            assert "cats" in image.parameters["Precision LoRA skipped"]
            assert any("trying once more" in line for line in lines)
        image = generate(host, prompt("a cat", active))
        assert torch.equal(image.values, exact), "memory is there"
        assert not image.comments
        image = generate(host, "a cat")
        assert torch.equal(image.values, pristine)
        assert bases_of(checkpoint) == base
        assert hooks_of(checkpoint.model) == 0
        host.memory.unload_all_models()
    assert first > 10


def test_a_card_that_is_full_at_placement_leaves_nothing_of_the_set_on_it(
    host: Host, card: Card, checkpoint: Checkpoint
) -> None:
    lora = make_lora("cats", rank=4)
    lora.write(host)
    with pytest.MonkeyPatch.context() as patch:
        without_memory(patch, "place", NoMemory(1, FOREVER))
        image = generate(host, prompt("a cat", Active(lora)))
    assert card.factors() == 0
    assert torch.equal(image.values, generate(host, "a cat").values)
    assert all(not session.attached for session in installation.active().sessions().values())
