"""What is reported of a generation is what happened in it: in this one, and whatever ended it."""

from __future__ import annotations

import hashlib
import logging
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib_precision_lora.branch.session import overhead
from lib_precision_lora.host import installation
from lib_precision_lora.host.generation.generations import GENERATIONS, KEPT_TASKS, Generations, log_report
from lib_precision_lora.host.generation.notices import GenerationStopped
from lib_precision_lora.host.generation.report import FileReport, GenerationReport
from lib_precision_lora.host.page import script
from lib_precision_lora.ui.settings import (
    COMPUTE,
    DETAILED,
    ENABLED,
    LOG_DETAIL,
    ON_FAILURE,
    STOP,
    TEXT_ENCODERS,
)
from tests.host.checkpoints import Checkpoint
from tests.host.damage import DAMAGE, cats_and_dogs
from tests.host.images import generate
from tests.host.lora_files import make_lora, values
from tests.host.observers import branches, log_lines
from tests.host.reports import report_of
from tests.host.webui import Host

LAYERS = 4
"""Of the diffusion model that the files of these tests change; one more is the text encoder's."""


@pytest.fixture
def tasks(host: Host, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the WebUI be at a task of this name."""
    from modules import progress

    return lambda name: monkeypatch.setattr(progress, "current_task", name)


def test_each_file_is_told_with_what_it_does(host: Host, checkpoint: Checkpoint) -> None:
    path = make_lora("cats", rank=2).write(host)
    report = report_of(host, "a cat<lora:cats:0.5:0.8>")
    (cats,) = report.files
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert cats == FileReport("cats", 0.8, 0.5, "5 × lora rank 2", (2,), (1.0,), LAYERS, 1, digest=digest)
    assert report.patcher == "Precision LoRA"
    assert (report.compute, report.low_bits) == ("Automatic", "Automatic")
    assert cats.unet_layers == branches(checkpoint.model)
    assert cats.text_layers == branches(checkpoint.encoder)
    assert 0 < report.attach_seconds < 60
    assert report.stored["fp8-e4m3fn"] == 1
    assert report.problems == ()


def test_layers_that_a_setting_leaves_alone_are_not_said_to_be_changed(
    host: Host, checkpoint: Checkpoint
) -> None:
    make_lora("cats", rank=2).write(host)
    host.set_option(TEXT_ENCODERS, False)
    report = report_of(host, "a cat<lora:cats:0.5:0.8>")
    (cats,) = report.files
    assert (cats.text_strength, cats.unet_layers, cats.text_layers) == (0.0, LAYERS, 0)
    assert not report.text_encoders
    host.set_option(TEXT_ENCODERS, True)
    report = report_of(host, "a cat<lora:cats:0.5:0>")
    assert (report.files[0].unet_layers, report.files[0].text_layers) == (0, 1)
    assert report.text_encoders


def test_a_report_tells_of_its_own_generation_alone(host: Host, checkpoint: Checkpoint) -> None:
    cats_and_dogs(host)
    names = [
        [file.name for file in report_of(host, prompt).files]
        for prompt in ("<lora:cats:1>", "<lora:dogs:1><lora:cats:0.5>", "nothing", "<lora:dogs:1>")
    ]
    assert names == [["cats"], ["dogs", "cats"], [], ["dogs"]]


def test_a_second_pass_is_part_of_its_generation(host: Host, checkpoint: Checkpoint) -> None:
    cats_and_dogs(host)
    both = report_of(host, "<lora:cats:1>", hires_prompt="<lora:dogs:0.5><lora:nobody:1>")
    assert [(file.name, file.strength) for file in both.files] == [("cats", 1), ("dogs", 0.5), ("nobody", 1)]
    same = report_of(host, "<lora:cats:1>", hires_prompt="<lora:cats:1>")
    assert [file.name for file in same.files] == ["cats"]
    twice = report_of(host, "<lora:cats:1>", hires_prompt="<lora:cats:0.5>")
    assert [file.strength for file in twice.files] == [1, 0.5]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_was_left_out_is_told_with_its_reason_and_without_its_place(
    host: Host, checkpoint: Checkpoint, damage: str
) -> None:
    DAMAGE[damage][0](host, "broken")
    cats_and_dogs(host)
    for _ in range(2):
        report = report_of(host, "<lora:cats:1><lora:broken:1>")
        assert [file.name for file in report.applied] == ["cats"]
        (broken,) = report.left_out
        assert broken.name == "broken"
        assert broken.problem is not None
        assert report.problems == (broken.problem,)
        assert str(host.lora_dir) not in broken.problem


def test_a_file_that_fails_while_it_is_attached_is_left_out_in_the_report_too(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib_precision_lora.branch import PatchError, PatchSession

    cats_and_dogs(host)
    cats = str(host.lora_dir / "cats.safetensors")
    attach = PatchSession.apply_patches

    def fail(session: Any, patches: Any, *args: Any, **kwargs: Any) -> Any:
        if any(patch.source == cats for patch in patches):
            raise PatchError(f"{cats}: layer x does not fit", cats)
        return attach(session, patches, *args, **kwargs)

    monkeypatch.setattr(PatchSession, "apply_patches", fail)
    report = report_of(host, "<lora:cats:1><lora:dogs:1>")
    assert [file.name for file in report.applied] == ["dogs"]
    assert [file.problem for file in report.left_out] == ["A LoRA was left out: cats: layer x does not fit"]


@pytest.mark.only_on("forge", "patches of other extensions go Neo's own way, beside ours on a layer")
def test_layers_that_go_the_hosts_own_way_are_counted(host: Host, checkpoint: Checkpoint) -> None:
    """Another extension's patch of an unknown kind takes its whole layer to the host."""
    make_lora("cats").write(host)

    def foreign(target: Any) -> None:
        unet = target.forge_objects.unet.clone()
        value = "diff", (values(8, 8), {"pad_weight": True})
        parameter = "diffusion_model.blocks.0.attn.weight"
        unet.add_patches(
            filename="theirs", patches={parameter: value}, strength_patch=1.0, strength_model=1.0
        )
        target.forge_objects.unet = unet

    (cats,) = report_of(host, "<lora:cats:1>", before_sampling=foreign).files
    assert cats.host_layers == LAYERS - branches(checkpoint.model) == 1
    (cats,) = report_of(host, "<lora:cats:1>").files
    assert cats.host_layers == 0


def test_keys_without_a_layer_are_named(host: Host, checkpoint: Checkpoint) -> None:
    key = "lora_unet_nowhere.lora_up.weight"
    make_lora("cats").with_tensors(lambda tensors: tensors.update({key: torch.ones(2, 2)})).write(host)
    (cats,) = report_of(host, "<lora:cats:1>").files
    assert cats.unmatched == (key,)
    assert cats.problem is None


def test_while_off_the_webui_is_said_to_apply_them(host: Host, checkpoint: Checkpoint) -> None:
    make_lora("cats").write(host)
    host.set_option(ENABLED, False)
    report = report_of(host, "<lora:cats:0.5:0.8>")
    assert report.patcher == "WebUI"
    assert report.files == (FileReport("cats", 0.8, 0.5),)
    host.set_option(ENABLED, True)
    assert report_of(host, "<lora:cats:1>").patcher == "Precision LoRA"


def test_the_compute_mode_is_that_of_the_generation(host: Host, checkpoint: Checkpoint) -> None:
    make_lora("cats").write(host)
    for mode in ("fp16", "fp32", "Automatic"):
        host.set_option(COMPUTE, mode)
        assert report_of(host, "<lora:cats:1>").compute == mode


def test_memory_is_what_stands_there_and_what_was_planned_for_it(host: Host, checkpoint: Checkpoint) -> None:
    """Planned as the allocator rounds: up to 511 bytes more for each of the few tensors of a layer."""
    make_lora("cats").write(host)
    report = report_of(host, "<lora:cats:1>")
    active: Any = installation.active()
    placed = sum(session.placed_bytes for session in active.sessions().values())
    assert report.measured_bytes == placed > 0
    assert report.planned_bytes is not None
    assert 0 <= report.planned_bytes - placed <= 511 * 4 * (LAYERS + 1)
    assert report_of(host, "nothing").planned_bytes is None


@pytest.fixture
def _ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by one second whenever a step or a branch looks at it."""
    monkeypatch.setattr(overhead, "time", SimpleNamespace(perf_counter=count(1.0).__next__))


def step_with(branches: int) -> tuple[float | None, float | None]:
    """On that clock: each branch looks twice, the step before and after all of them."""
    return 1.0 + 2.0 * branches, 1.0 * branches


def step_of(report: GenerationReport) -> tuple[float | None, float | None]:
    return report.step_seconds, report.overhead_seconds


@pytest.mark.usefixtures("_ticks")
def test_the_cost_per_step_is_that_of_the_generation_and_of_its_last_pass(
    host: Host, checkpoint: Checkpoint
) -> None:
    make_lora("all").write(host)
    make_lora("one", modules=("diffusion_model.blocks.0.attn",)).write(host)
    for _ in range(2):
        assert step_of(report_of(host, "<lora:all:1>")) == step_with(branches=LAYERS)
        assert step_of(report_of(host, "<lora:one:1>")) == step_with(branches=1)
        assert step_of(report_of(host, "nothing")) == (None, None)
        report = report_of(host, "<lora:all:1>", hires_prompt="<lora:one:1>", between_steps=lambda _: None)
        assert step_of(report) == step_with(branches=1)
        assert step_of(report_of(host, "<lora:all:1>", hires_prompt="nothing")) == (None, None)


@pytest.mark.usefixtures("_ticks")
def test_the_cost_per_step_is_no_other_generations(host: Host, checkpoint: Checkpoint, tasks: Any) -> None:
    make_lora("all").write(host)
    generations, p = Generations(), SimpleNamespace()
    tasks("stopped")
    generations.begin(p)
    generate(host, "<lora:all:1>")
    assert step_of(report_of(host, "", activate=False)) == (None, None)
    assert "Time per model pass" in generations.html("stopped")
    generate(host, "<lora:all:0.5>")
    last = generations.end(p)
    assert last is not None
    assert step_of(last) == step_with(branches=LAYERS)


@pytest.mark.usefixtures("_ticks")
def test_what_the_webui_applies_has_no_cost_of_ours(host: Host, checkpoint: Checkpoint) -> None:
    make_lora("all").write(host)
    assert step_of(report_of(host, "<lora:all:1>")) == step_with(branches=LAYERS)
    host.set_option(ENABLED, False)
    assert step_of(report_of(host, "<lora:all:1>")) == (None, None)


@pytest.mark.usefixtures("_ticks")
def test_the_log_names_the_cost_per_step(host: Host, checkpoint: Checkpoint) -> None:
    make_lora("all").write(host)
    with log_lines(logging.INFO) as lines:
        log_report(report_of(host, "<lora:all:1>"))
    assert ", 9.00 s per model pass, of them 4.00 s (44.4 %) for LoRAs, " in lines[-1]


def test_a_page_gets_the_report_of_its_own_task(host: Host, checkpoint: Checkpoint, tasks: Any) -> None:
    cats_and_dogs(host)
    generations = Generations()
    for name in ("cats", "dogs"):
        tasks(f"task({name})")
        p = SimpleNamespace()
        generations.begin(p)
        generate(host, f"<lora:{name}:1>")
        generations.end(p)
    for name, other in (("cats", "dogs"), ("dogs", "cats")):
        assert f"<h4>{name}</h4>" in generations.html(f"task({name})")
        assert other not in generations.html(f"task({name})")
    assert generations.html("task(nobody's)") == ""
    assert [file.name for file in generations.last.files] == ["dogs"]


def test_a_generation_without_loras_leaves_nothing_on_the_page(
    host: Host, checkpoint: Checkpoint, tasks: Any
) -> None:
    tasks("task")
    generations, p = Generations(), SimpleNamespace()
    generations.begin(p)
    generate(host, "a cat")
    generations.end(p)
    assert generations.html("task") == ""


def test_a_generation_that_was_stopped_says_how_far_it_came(
    host: Host, checkpoint: Checkpoint, tasks: Any
) -> None:
    DAMAGE["truncated"][0](host, "broken")
    cats_and_dogs(host)
    host.set_option(ON_FAILURE, STOP)
    generations = Generations()
    tasks("stopped")
    generations.begin(SimpleNamespace())
    with pytest.raises(GenerationStopped):
        generate(host, "<lora:broken:1>")
    for _ in range(2):
        html = generations.html("stopped")
        assert "The generation did not finish." in html
        assert "<h4>broken</h4>" in html
        tasks("next")
        p = SimpleNamespace()
        generations.begin(p)
        generate(host, "<lora:dogs:1>")
        generations.end(p)
        assert "dogs" not in generations.html("stopped"), "that is the next generation's"


def test_an_interrupted_generation_is_said_to_be_unfinished(
    host: Host, checkpoint: Checkpoint, tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has images, of fewer steps than were asked for; what it applied until then is told."""
    make_lora("cats").write(host)
    for interrupted in (False, True, False):
        monkeypatch.setattr(host.shared.state, "interrupted", interrupted)
        tasks("task")
        p = SimpleNamespace()
        script.request_override(p, ())
        generate(host, "<lora:cats:1>")
        script.report(p)
        html = GENERATIONS.html("task")
        assert "<h4>cats</h4>" in html
        assert ("The generation did not finish." in html) is interrupted


def test_a_generation_that_was_interrupted_before_its_loras_has_none_of_the_former_ones(
    host: Host, checkpoint: Checkpoint, tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it is pressed while the checkpoint is loaded."""
    make_lora("cats").write(host)
    generate(host, "<lora:cats:1>")
    tasks("task")
    for interrupted in (True, False):
        monkeypatch.setattr(host.shared.state, "interrupted", interrupted)
        p = SimpleNamespace()
        script.request_override(p, ())
        script.report(p)
        assert GENERATIONS.last is not None
        assert GENERATIONS.last.finished is not interrupted
        assert [file.name for file in GENERATIONS.last.files] == ([] if interrupted else ["cats"])
        assert ("cats" in GENERATIONS.html("task")) is not interrupted


def test_a_nested_generation_does_not_end_the_outer_one(
    host: Host, checkpoint: Checkpoint, tasks: Any
) -> None:
    cats_and_dogs(host)
    tasks("task")
    generations, outer, inner = Generations(), SimpleNamespace(), SimpleNamespace()
    generations.begin(outer)
    generate(host, "<lora:cats:1>")
    generations.begin(inner)
    generate(host, "<lora:dogs:1>")
    nested, whole = generations.end(inner), generations.end(outer)
    assert nested is not None
    assert whole is not None
    assert [file.name for file in nested.files] == ["dogs"]
    assert [file.name for file in whole.files] == ["cats", "dogs"]
    assert "<h4>cats</h4>" in generations.html("task")


def test_old_reports_are_forgotten(host: Host, checkpoint: Checkpoint, tasks: Any) -> None:
    make_lora("cats").write(host)
    generations = Generations()
    for number in range(KEPT_TASKS + 1):
        tasks(f"task {number}")
        p = SimpleNamespace()
        generations.begin(p)
        if number in (0, KEPT_TASKS):
            generate(host, "<lora:cats:1>")
        generations.end(p)
    assert generations.html("task 0") == ""
    assert "cats" in generations.html(f"task {KEPT_TASKS}")


def test_the_log_has_a_line_of_the_whole(host: Host, checkpoint: Checkpoint) -> None:
    make_lora("cats").write(host)
    report = report_of(host, "<lora:cats:1><lora:nobody:1>")
    with log_lines(logging.INFO) as lines:
        log_report(report)
        log_report(report_of(host, "nothing"))
    (line,) = lines
    assert line.startswith("1 of 2 LoRAs applied: compute mode Automatic, ")


def test_a_detailed_log_names_every_key_without_a_layer(host: Host, checkpoint: Checkpoint) -> None:
    keys = {f"lora_unet_nowhere_{number:02}.lora_up.weight": torch.ones(2, 2) for number in range(20)}
    make_lora("cats").with_tensors(lambda tensors: tensors.update(keys)).write(host)
    for detail, named in (("Normal", 8), (DETAILED, 20)):
        host.set_option(LOG_DETAIL, detail)
        with log_lines(logging.INFO) as lines:
            generate(host, "<lora:cats:1>")
        (line,) = [line for line in lines if "cats" in line]
        assert "20 keys belong to no layer" in line
        assert sum(key in line for key in keys) == named
