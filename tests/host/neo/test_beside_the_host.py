"""What other extensions put on Neo's patchers, and what Neo does with a model while ours is on it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lib_precision_lora.ui.settings import BESIDE, DENSE, ENABLED, MERGE
from tests.host.card import DEVICE, Card, size_of
from tests.host.card_plans import EXACT, INFERENCE, file_of, least_bytes, placed, workspace_bytes
from tests.host.checkpoints import Checkpoint
from tests.host.images import distance, generate
from tests.host.lora_files import Active, LoraFile, exact_output, exact_weights, make_lora, prompt, values
from tests.host.observers import branches, bytes_of_bases, count_loads, log_lines
from tests.host.webui import Host

pytestmark = pytest.mark.only_on("neo", "it is about Neo's own way with patches and models")
ATTN = "diffusion_model.blocks.0.attn.weight"


@pytest.fixture
def cats(host: Host) -> LoraFile:
    file = make_lora("cats")
    file.write(host)
    return file


def theirs(host: Host, online: bool = False) -> tuple[Callable[[Any], None], torch.Tensor]:
    """What another extension does before sampling, on a layer of ours, and its ΔW."""
    up, down = values(8, 3), values(3, 8)
    value = host.contract.patch_value(up=up, down=down)

    def before_sampling(checkpoint: Any) -> None:
        unet = checkpoint.forge_objects.unet.clone()
        unet.add_patches({ATTN: value}, 0.75, online_mode=online)
        checkpoint.forge_objects.unet = unet

    return before_sampling, 0.75 * up.double() @ down.double()


def exact_with(checkpoint: Checkpoint, active: list[Active], delta: torch.Tensor) -> torch.Tensor:
    """The image of ours and of theirs on one layer."""
    unet, te = exact_weights(checkpoint, active)
    return checkpoint.exact("a cat", {**unet, ATTN: unet.get(ATTN, checkpoint.weight(ATTN)) + delta}, te)


@pytest.mark.parametrize("online", [False, True])
def test_a_patch_of_another_extension_goes_neos_way_beside_ours_on_the_same_layer(
    host: Host, checkpoint: Checkpoint, cats: LoraFile, online: bool
) -> None:
    before_sampling, delta = theirs(host, online)
    active, base = [Active(cats, 0.5)], bytes_of_bases(checkpoint)
    for text, wanted in (("a cat", []), (prompt("a cat", *active), active), ("a cat", [])):
        image = generate(host, text, before_sampling=before_sampling)
        assert distance(image, exact_with(checkpoint, wanted, delta)) < EXACT
        assert host.contract.merged(checkpoint) == (set() if online else {ATTN})
        assert host.contract.online(checkpoint) == online
        assert branches(checkpoint.model) == (4 if wanted else 0)
    image = generate(host, prompt("a cat", *active))
    assert distance(image, exact_output(checkpoint, "a cat", active)) < EXACT, "their clone is gone"
    assert bytes_of_bases(checkpoint) == base


def test_ten_changes_of_strength_place_each_model_once(
    host: Host, checkpoint: Checkpoint, cats: LoraFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, base = count_loads(host, monkeypatch), bytes_of_bases(checkpoint)
    for step in range(10):
        active = [Active(cats, 0.1 * (step + 1))]
        image = generate(host, prompt("a cat", *active))
        assert distance(image, exact_output(checkpoint, "a cat", active)) < EXACT
    assert sorted(loads) == ["JointTextEncoder", "Model"]
    assert bytes_of_bases(checkpoint) == base


def test_off_gives_the_bytes_of_neo_without_us(host: Host, checkpoint: Checkpoint, cats: LoraFile) -> None:
    """Its own merge rounds by chance, and by the same chances."""
    from lib_precision_lora.host import install, uninstall

    text = prompt("a cat", Active(cats, 0.7))
    uninstall()
    stock = {each: generate(host, each).values for each in ("a cat", text)}
    assert install()
    for enabled in (True, False, True, False):
        host.set_option(ENABLED, enabled)
        for each, exact in stock.items():
            same = torch.equal(generate(host, each).values, exact)
            assert same is (not enabled or each == "a cat")


def test_a_patcher_that_is_gone_leaves_its_model_planned_and_ours_on_it(
    bare_host: Host, card: Card, checkpoint: Checkpoint
) -> None:
    """Neo holds patchers weakly; one without a parent is in its list, without a patcher, until it looks."""

    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

    other, cpu = Other(), torch.device("cpu")
    patcher = bare_host.base.ModelPatcher(other, load_device=DEVICE, offload_device=cpu)
    bare_host.memory.load_models_gpu([patcher])
    del patcher
    gc.collect()
    assert [each.model for each in bare_host.memory.current_loaded_models] == [None]
    active = Active(file_of(bare_host, "cats", 8))
    with log_lines() as lines:
        image = generate(bare_host, prompt("a cat", active))
    assert lines == []
    assert distance(image, exact_output(checkpoint, "a cat", [active])) < EXACT


@pytest.mark.parametrize("dense", [BESIDE, MERGE])
@pytest.mark.parametrize("patched", [False, True])
def test_a_model_that_gives_way_in_part_while_it_samples_keeps_our_loras(
    bare_host: Host, card: Card, checkpoint: Checkpoint, dense: str, patched: bool
) -> None:
    """What `free_memory` takes off is computed from RAM, theirs on the fly, and ours beside it."""
    bare_host.set_option(DENSE, dense)
    active, base = Active(file_of(bare_host, "cats", 8)), bytes_of_bases(checkpoint)
    before_sampling, delta = theirs(bare_host)
    freed: list[int] = []

    def give_way(checkpoint: Checkpoint) -> None:
        before = card.on(checkpoint.model)
        bare_host.memory.free_memory(card.free() + 300, DEVICE)
        freed.append(before - card.on(checkpoint.model))

    image = generate(
        bare_host,
        prompt("a cat", active),
        before_sampling=before_sampling if patched else None,
        between_steps=give_way,
    )
    assert 300 <= freed[0] < size_of(checkpoint.model)
    exact = exact_with(checkpoint, [active], delta if patched else torch.zeros(8, 8))
    assert distance(image, exact) < EXACT
    card.forget()
    image = generate(bare_host, prompt("a cat", active))
    assert distance(image, exact_output(checkpoint, "a cat", [active])) < EXACT
    assert card.on(checkpoint.model) == size_of(checkpoint.model)
    generate(bare_host, "a cat")
    assert bytes_of_bases(checkpoint) == base


def test_a_resident_model_gives_way_for_a_lora_and_comes_back(
    bare_host: Host, card: Card, checkpoint: Checkpoint
) -> None:
    active, base = Active(file_of(bare_host, "cats", 64)), size_of(checkpoint.model)
    card.total = INFERENCE + base + least_bytes(64) - 800
    generate(bare_host, "a cat")
    assert placed(card) == [base]
    card.forget()
    image = generate(bare_host, prompt("a cat", active))
    assert distance(image, exact_output(checkpoint, "a cat", [active])) < EXACT
    assert 0 < card.on(checkpoint.model) < base
    assert card.free() >= INFERENCE + workspace_bytes(64)
    image = generate(bare_host, "a cat")
    assert distance(image, exact_output(checkpoint, "a cat")) < EXACT
    assert card.evictions.count("Model") == 0
