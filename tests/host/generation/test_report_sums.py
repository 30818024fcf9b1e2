"""What the report says of a file's strength and layers is what the image was made with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import fsum
from typing import Any

import pytest

from lib_precision_lora.host.generation.generations import log_report
from lib_precision_lora.host.generation.notices import INFOTEXT_SKIPPED
from lib_precision_lora.host.loras.hosted import HostedSession
from lib_precision_lora.ui.settings import ENABLED, ON_FAILURE, STOP
from tests.host.checkpoints import Checkpoint
from tests.host.images import distance, generate
from tests.host.lora_files import LAYERS, Active, exact_output, exact_weights, make_lora
from tests.host.observers import log_lines
from tests.host.reports import report_of, reported
from tests.host.webui import Host

HELD_BY_PATCHERS = pytest.mark.only_on(
    "forge", "Neo's patchers do not hold the prompt's LoRAs, so no extension finds them there"
)
EXACT = 1e-5
UNET_LAYERS = 4
UNET = [name for name in LAYERS if name.startswith("diffusion_model.")]


@pytest.mark.parametrize(
    ("parts", "unet", "te"),
    [
        (["cats:0.05"] * 10, 0.5, 0.5),
        (["cats:0.1:0.7", "cats:0.2:-0.1"], 0.6, 0.1 + 0.2),
        (["cats:0.3", "dogs:1", "cats:0.2"], 0.5, 0.5),
        (["cats:1:0.5", "cats:1:-0.5"], 0.0, 2.0),
    ],
)
def test_a_file_that_is_there_more_than_once_is_told_once_with_the_sum(
    host: Host, checkpoint: Checkpoint, parts: list[str], unet: float, te: float
) -> None:
    cats, dogs = make_lora("cats"), make_lora("dogs", seed=3)
    cats.write(host)
    dogs.write(host)
    text = "".join(f"<lora:{part}>" for part in parts)
    report = report_of(host, f"a cat{text}")
    found = {file.name: file for file in report.files}
    assert list(found) == list(dict.fromkeys(part.split(":")[0] for part in parts))
    assert found["cats"].strength == pytest.approx(unet, abs=1e-15)
    assert found["cats"].text_strength == pytest.approx(te, abs=1e-15)
    assert (found["cats"].unet_layers, found["cats"].text_layers) == (UNET_LAYERS, 1)
    assert (found["cats"].unet_strengths, found["cats"].text_strengths) == ((), ())
    told = [Active(cats, found["cats"].strength, found["cats"].text_strength)]
    told += [Active(dogs)] if "dogs" in found else []
    image = generate(host, f"a cat{text}")
    assert distance(image, exact_output(checkpoint, "a cat", told)) < EXACT


def test_ten_times_a_twentieth_is_half_to_the_last_digit(host: Host, checkpoint: Checkpoint) -> None:
    make_lora("cats").write(host)
    (cats,) = report_of(host, "<lora:cats:0.05>" * 10).files
    assert sum([0.05] * 10) != 0.5, "naively"
    assert cats.strength == cats.text_strength == 0.5 == fsum([0.05] * 10)


def test_what_the_webui_applies_is_told(host: Host, checkpoint: Checkpoint) -> None:
    """Forge knows an entry by its file and strength: an equal one takes the former one's place. In Neo they
    add up."""
    cats = make_lora("cats")
    cats.write(host)
    host.set_option(ENABLED, False)
    adds = host.contract.same_twice_adds
    for entries, once in (((0.5,) * 3, 0.5), ((0.25, 0.5, 0.25), 0.75)):
        strength, other = (sum(entries), once) if adds else (once, sum(entries))
        text = "".join(f"<lora:cats:{each}>" for each in entries)
        (told,) = report_of(host, f"a cat{text}").files
        assert (told.strength, told.text_strength) == (strength, strength)
        image = generate(host, f"a cat{text}")
        exact = exact_output(checkpoint, "a cat", [Active(cats, strength)], stored=True)
        assert distance(image, exact) < 0.05
        wrong = exact_output(checkpoint, "a cat", [Active(cats, other)], stored=True)
        assert distance(image, wrong) > 0.05


def test_an_entry_that_was_left_out_is_no_part_of_the_sum(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib_precision_lora.branch import PatchError, PatchSession

    make_lora("cats").write(host)
    second = f"{host.lora_dir / 'cats.safetensors'} (2)"
    attach = PatchSession.apply_patches

    def fail(session: Any, patches: Any, *args: Any, **kwargs: Any) -> Any:
        if any(patch.source == second for patch in patches):
            raise PatchError(f"{second}: layer x does not fit", second)
        return attach(session, patches, *args, **kwargs)

    monkeypatch.setattr(PatchSession, "apply_patches", fail)
    report = report_of(host, "<lora:cats:0.25><lora:cats:0.5><lora:cats:0.125>")
    assert [(file.name, file.strength, file.problem is None) for file in report.files] == [
        ("cats", 0.375, True),
        ("cats", 0.5, False),
    ]


def with_strengths(change: Callable[[str, float], float | None]) -> Callable[[Any], None]:
    """What a block-weight extension does before sampling: another strength for each layer; None: no patch."""

    def before_sampling(checkpoint: Any) -> None:
        unet = checkpoint.forge_objects.unet.clone()
        unet.lora_patches = {
            identifier: {
                name: [[changed, *entry[1:]] for entry in stack]
                for name, stack in patches.items()
                if (changed := change(name, stack[0][0])) is not None
            }
            for identifier, patches in unet.lora_patches.items()
        }
        checkpoint.forge_objects.unet = unet

    return before_sampling


@HELD_BY_PATCHERS
@pytest.mark.parametrize(
    "by_layer",
    [(0.25, 1.0, 0.5, 0.5), (0.0, 1.0, 0.0, 0.5), (0.25, 0.25, 0.25, 0.25), (None, 0.8, None, 0.8)],
)
def test_strengths_that_another_extension_has_changed_are_told_by_layer(
    host: Host, checkpoint: Checkpoint, by_layer: tuple[float | None, ...]
) -> None:
    cats = make_lora("cats")
    cats.write(host)
    wanted = {f"{name}.weight": strength for name, strength in zip(UNET, by_layer, strict=True)}
    text, change = "a cat<lora:cats:0.5:0.8>", with_strengths(lambda name, _: wanted[name])
    (told,) = report_of(host, text, before_sampling=change).files
    there = sorted({strength for strength in by_layer if strength})
    assert told.strength == 0.8, "that was asked for"
    assert told.unet_strengths == (() if there == [0.8] else tuple(there))
    assert told.unet_layers == sum(1 for strength in by_layer if strength)
    assert (told.text_strength, told.text_strengths, told.text_layers) == (0.5, (), 1)
    image = generate(host, text, before_sampling=change)
    _, te = exact_weights(checkpoint, [Active(cats, 0.8, 0.5)])
    unet = {
        name: checkpoint.weight(name) + (strength or 0.0) * cats.deltas[name]
        for name, strength in wanted.items()
    }
    assert distance(image, checkpoint.exact("a cat", unet, te)) < EXACT
    (told,) = report_of(host, text).files
    assert (told.unet_strengths, told.unet_layers) == ((), UNET_LAYERS)


@HELD_BY_PATCHERS
def test_the_log_tells_strengths_that_another_extension_has_changed(
    host: Host, checkpoint: Checkpoint
) -> None:
    make_lora("cats").write(host)
    change = with_strengths(lambda name, strength: 0.25 if ".low." in name else strength)
    text = "LoRA cats: layers of the model have strengths of 0.25 to 0.8, as another extension has set them"
    for before_sampling, count in ((change, 1), (None, 0)):
        report = report_of(host, "<lora:cats:0.8>", before_sampling=before_sampling)
        with log_lines(logging.INFO) as lines:
            log_report(report)
        assert lines.count(text) == count


@HELD_BY_PATCHERS
def test_a_file_that_another_extension_takes_out_has_no_layers(host: Host, checkpoint: Checkpoint) -> None:
    make_lora("cats").write(host)

    def take_out(target: Any) -> None:
        target.forge_objects.unet = unet = target.forge_objects.unet.clone()
        unet.lora_patches = {}

    (told,) = report_of(host, "<lora:cats:1:1>", before_sampling=take_out).files
    assert (told.unet_layers, told.text_layers) == (0, 1)


@HELD_BY_PATCHERS
def test_the_same_file_twice_with_other_strengths_by_layer_is_summed_by_layer(
    host: Host, checkpoint: Checkpoint
) -> None:
    make_lora("cats").write(host)
    change = with_strengths(lambda name, strength: 2 * strength if ".low." in name else strength)
    (told,) = report_of(host, "<lora:cats:0.25><lora:cats:0.5>", before_sampling=change).files
    assert (told.strength, told.unet_strengths, told.unet_layers) == (0.75, (0.75, 1.5), UNET_LAYERS)


def failing(patch: pytest.MonkeyPatch, times: int) -> list[str]:
    """Following the prompt's LoRAs fails so often; grows with each failure."""
    follow, failures = HostedSession.follow, []

    def fail(session: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if len(failures) < times and hasattr(model, "diffusion_model"):
            failures.append(type(model).__name__)
            raise RuntimeError("injected")
        return follow(session, model, *args, **kwargs)

    patch.setattr(HostedSession, "follow", fail)
    return failures


@pytest.mark.only_on("forge", "Neo follows a prompt once for each load of a model")
@pytest.mark.parametrize("stop", [False, True])
def test_a_set_that_fails_and_then_succeeds_before_the_model_runs_is_applied(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, stop: bool
) -> None:
    cats = make_lora("cats")
    cats.write(host)
    if stop:
        host.set_option(ON_FAILURE, STOP)
    failures = failing(monkeypatch, 1)
    report, image = reported(host, "a cat<lora:cats:1>")
    assert len(failures) == 1
    assert distance(image, exact_output(checkpoint, "a cat", [Active(cats)])) < EXACT
    assert [file.problem for file in report.files] == [None]
    assert report.problems == ()
    assert not image.comments
    assert INFOTEXT_SKIPPED not in image.parameters


def test_a_set_that_fails_each_time_is_left_out_and_said_so_once(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    cats = make_lora("cats")
    cats.write(host)
    assert len(failing(monkeypatch, 10**6)) == 0
    report, image = reported(host, "a cat<lora:cats:1>")
    (problem,) = report.problems
    assert "injected" in problem
    assert [file.problem for file in report.files] == [problem]
    assert list(image.comments) == [problem]
    text_only = exact_output(checkpoint, "a cat", [Active(cats, 0.0, 1.0)])
    assert distance(image, text_only) < EXACT
