"""The plan that can be asked for is the one that a generation then follows, and asking changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from lib_precision_lora.host import installation
from lib_precision_lora.host.loras.files import FileProblem
from lib_precision_lora.host.reservation.prospect import NoCheckpointError
from lib_precision_lora.ui.settings import TEXT_ENCODERS
from tests.host.card import Card, size_of
from tests.host.card_plans import (
    INFERENCE,
    PLENTY,
    POSITIONS,
    UNET,
    factor_bytes,
    layer_bytes,
    least_bytes,
    preserved,
    workspace_bytes,
)
from tests.host.checkpoints import TEXT_LAYER, Checkpoint
from tests.host.damage import DAMAGE
from tests.host.images import generate, load_checkpoint
from tests.host.lora_files import LAYERS, Active, make_lora, prompt, with_loha
from tests.host.observers import bases_of, hooks_of
from tests.host.webui import Host

TEXT_FACTORS = layer_bytes((8, 4), 8)
TEXT_WORKSPACE = 512 * 4 * 3 * 8


@pytest.fixture
def host(bare_host: Host, card: Card) -> Host:
    return bare_host


def plan_for(*loras: tuple[str, float]) -> Any:
    active = installation.active()
    assert active is not None
    return active.plan_for(loras, POSITIONS)


def test_what_is_foreseen_is_what_a_generation_then_asks_for_and_places(
    host: Host, card: Card, checkpoint: Checkpoint
) -> None:
    lora = make_lora("cats", 0, 8, (*UNET, TEXT_LAYER))
    lora.write(host)
    found = plan_for(("cats", 0.5))
    unet, text, both = found.diffusion_model.plan, found.text_encoder.plan, found.together.plan
    assert unet.placement == text.placement == both.placement == "resident"
    assert (unet.resident_bytes, unet.peak_bytes) == (
        factor_bytes(8),
        factor_bytes(8) + workspace_bytes(8),
    )
    assert (text.resident_bytes, text.peak_bytes) == (TEXT_FACTORS, TEXT_FACTORS + TEXT_WORKSPACE)
    assert both.resident_bytes == factor_bytes(8) + TEXT_FACTORS
    assert both.peak_bytes == both.resident_bytes + max(workspace_bytes(8), TEXT_WORKSPACE)
    assert both.reserve_bytes == max(unet.reserve_bytes, text.reserve_bytes)
    assert (both.streamed_bytes, both.offloaded_bytes, both.advice) == (0, 0, ())
    generate(host, prompt("a cat", Active(lora, 0.5)))
    assert preserved(card) == unet.reserve_bytes
    assert preserved(card, "JointTextEncoder") == text.reserve_bytes
    assert card.factors() == both.resident_bytes


def test_a_small_card_streams_and_a_smaller_one_leaves_out_what_the_plan_names(
    host: Host, card: Card, checkpoint: Checkpoint
) -> None:
    for seed, (name, rank) in enumerate({"small": 4, "large": 512}.items()):
        make_lora(name, seed, rank, UNET).write(host)
    card.total = INFERENCE + size_of(checkpoint.model) + least_bytes(512) + 4000
    found = plan_for(("large", 1.0)).diffusion_model
    assert (found.plan.placement, found.left_out) == ("streamed", ())
    assert found.plan.resident_bytes + found.plan.streamed_bytes == factor_bytes(512)
    assert found.plan.advice
    card.total = INFERENCE + size_of(checkpoint.model) + factor_bytes(4) + workspace_bytes(4) + 2000
    assert card.total - INFERENCE < least_bytes(512)
    alone, both = plan_for(("large", 1.0)), plan_for(("large", 1.0), ("small", 1.0))
    assert alone.together.plan.placement == "refused"
    assert alone.together.plan.peak_bytes == least_bytes(512)
    assert alone.together.left_out == both.together.left_out == ("large",)
    assert both.diffusion_model.plan.placement == "resident"
    assert both.diffusion_model.plan.resident_bytes == factor_bytes(4)
    assert both.diffusion_model.plan.advice == alone.diffusion_model.plan.advice != ()
    image = generate(host, "a cat<lora:large:1><lora:small:1>")
    assert len(image.comments) == 1
    assert "large" in image.comments[0]
    assert preserved(card) == both.diffusion_model.plan.reserve_bytes
    assert card.factors() == factor_bytes(4)


def state(host: Host, card: Card) -> dict[str, Any]:
    """All that a generation leaves behind, by identity where it is no plain value."""
    active, engine = installation.active(), host.current
    assert active is not None
    patchers = [
        patcher
        for objects in (engine.forge_objects, engine.forge_objects_after_applying_lora)
        for patcher in (objects.unet, objects.clip.patcher)
    ]
    return {
        "bases": bases_of(engine),
        "hooks": (hooks_of(engine.model), hooks_of(engine.encoder)),
        "patchers": [(id(each), str(active.host.patches(each))) for each in patchers],
        "hash": engine.current_lora_hash,
        "comments": list(engine.comments),
        "parameters": dict(engine.extra_generation_params),
        "sessions": {
            id(model): (id(session), session._signature, dict(session._division._made), session._sketched)
            for model, session in active.sessions().items()
        },
        "fitted": [dict(session._session._fitted._made) for session in active.sessions().values()],
        "plans": list(active.memory._plans.values()),
        "record": (active.record.present.number, tuple(active.record.present.reports())),
        "notices": {
            key: list(value) if isinstance(value, (list, dict, set)) else value
            for key, value in vars(active.notices).items()
        },
        "versions": active.loader.versions,
        "loaded": list(host.networks.loaded_networks),
        "on the card": {id(model): size for model, size in card.models.items()},
        "host": [id(each) for each in host.memory.current_loaded_models],
        "moves": (list(card.requests), list(card.freed), list(card.placements), list(card.evictions)),
    }


@pytest.mark.parametrize("generated", [False, True])
def test_asking_changes_nothing(host: Host, card: Card, checkpoint: Checkpoint, generated: bool) -> None:
    make_lora("cats", 0, 4).write(host)
    with_loha(make_lora("dogs", 1, 512)).write(host)
    text = "a cat<lora:cats:0.5><lora:nowhere:1>"
    before_image = generate(host, text) if generated else None
    card.total = INFERENCE + size_of(checkpoint.model) + least_bytes(4) + 2000
    before = state(host, card)
    assert bool(before["sessions"]) is generated
    for loras in ([("cats", 1.0)], [("dogs", 1.0), ("cats", -0.5), ("cats", 0.0)], [("cats", 0.5)]):
        plan_for(*loras)
        assert state(host, card) == before
    with pytest.raises(FileProblem):
        plan_for(("nowhere", 1.0))
    assert state(host, card) == before
    card.total = PLENTY
    if before_image is not None:
        card.forget()
        image = generate(host, text)
        assert image.values.equal(before_image.values)
        assert (card.placements, card.evictions) == ([], [])


def test_nothing_is_planned_for_text_encoders_that_are_left_alone(
    host: Host, card: Card, checkpoint: Checkpoint
) -> None:
    make_lora("cats", 0, 8, (*UNET, TEXT_LAYER)).write(host)
    host.set_option(TEXT_ENCODERS, False)
    found = plan_for(("cats", 1.0))
    assert (found.text_encoder.plan.peak_bytes, found.text_encoder.left_out) == (0, ())
    assert found.diffusion_model.plan.resident_bytes == factor_bytes(8)
    generate(host, "a cat<lora:cats:1>")
    assert card.factors() == factor_bytes(8)


def test_the_same_lora_twice_counts_twice(host: Host, card: Card, checkpoint: Checkpoint) -> None:
    make_lora("cats", 0, 8, UNET).write(host)
    twice = plan_for(("cats", 1.0), ("cats", 0.5)).diffusion_model.plan
    assert twice.resident_bytes > plan_for(("cats", 1.0)).diffusion_model.plan.resident_bytes
    generate(host, "a cat<lora:cats:1><lora:cats:0.5>")
    assert preserved(card) == twice.reserve_bytes
    assert card.factors() == twice.resident_bytes


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_applied_has_no_plan(
    host: Host, card: Card, checkpoint: Checkpoint, damage: str
) -> None:
    write, _ = DAMAGE[damage]
    write(host, "broken")
    with pytest.raises(FileProblem, match="broken") as caught:
        plan_for(("broken", 1.0))
    assert str(host.lora_dir) not in str(caught.value)


def test_a_checkpoint_without_a_text_encoder_has_a_plan_for_its_model_alone(host: Host, card: Card) -> None:
    load_checkpoint(host, lambda: Checkpoint(host, text_encoder=False))
    make_lora("cats", 0, 8, tuple(LAYERS)).write(host)
    found = plan_for(("cats", 1.0))
    assert found.text_encoder is None
    assert found.together.plan == found.diffusion_model.plan


def test_without_a_checkpoint_there_is_no_plan(host: Host, card: Card) -> None:
    make_lora("cats").write(host)
    with pytest.raises(NoCheckpointError, match="No checkpoint is loaded"):
        plan_for(("cats", 1.0))
