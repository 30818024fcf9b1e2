"""A user who interrupts, or skips, while LoRAs are read and attached, at whichever tick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lib_precision_lora.host import installation
from lib_precision_lora.host.generation import progress
from lib_precision_lora.host.generation.notices import GenerationStopped
from lib_precision_lora.host.loras.hosted import HostedSession
from lib_precision_lora.host.page.settings import Arithmetic
from lib_precision_lora.ui.settings import ON_FAILURE, STOP
from tests.host.buttons import INTERRUPT, SKIP, job
from tests.host.checkpoints import Checkpoint
from tests.host.damage import cats_and_dogs
from tests.host.images import distance, generate, load_checkpoint
from tests.host.jobs import E4M3, FIRST, FP8, SECOND, Jobs
from tests.host.lora_files import Active, LoraFile, exact_output
from tests.host.loras.test_failures import failing_at
from tests.host.loras.test_hosted import entry, identifier, ours, small_model
from tests.host.observers import bases_of, branches, hooks_of, log_lines
from tests.host.webui import Host

EXACT = 1e-5
PROMPT = "a cat<lora:cats:1><lora:dogs:0.5>"
Files = tuple[LoraFile, LoraFile]


@pytest.fixture
def files(host: Host) -> Files:
    """cats and dogs."""
    return cats_and_dogs(host)


def active(files: Files) -> list[Active]:
    return [Active(files[0]), Active(files[1], 0.5)]


def outcomes(checkpoint: Checkpoint, files: Files) -> list[torch.Tensor]:
    """What may be computed where an image is given up: each model has all of its LoRAs that were read in
    time, or none."""
    both = active(files)
    return [
        exact_output(
            checkpoint, "a cat", [Active(each.file, unet * each.unet, te * each.unet) for each in on]
        )
        for on in (both, both[:1], both[1:], [])
        for unet in (0.0, 1.0)
        for te in (0.0, 1.0)
    ]


@pytest.mark.parametrize(("button", "each"), [(INTERRUPT, 4), (SKIP, 11)])
def test_whenever_it_is_pressed_each_model_has_all_or_nothing_and_the_next_image_has_it_all(
    host: Host, files: Files, button: str, each: int
) -> None:
    presses, shown = 0, set()
    checkpoint = load_checkpoint(host, lambda: Checkpoint(host))
    possible, whole = outcomes(checkpoint, files), exact_output(checkpoint, "a cat", active(files))
    while True:
        checkpoint = load_checkpoint(host, lambda: Checkpoint(host))
        installation.active().loader.stand_back()  # type: ignore[union-attr]
        base = bases_of(checkpoint)
        with job(host, button, presses) as user:
            image = generate(host, PROMPT)
        shown.update(user.seen)
        assert min(distance(image, exact) for exact in possible) < EXACT
        skipped = image.parameters.get("Precision LoRA skipped", "")
        left_out = [comment for comment in image.comments if "was interrupted while it was being" in comment]
        assert bool(left_out) is bool(skipped)
        assert len(left_out) == len(image.comments)
        if not left_out:
            assert distance(image, whole) < EXACT
        with job(host):
            image = generate(host, PROMPT)
        assert not image.comments
        assert "Precision LoRA skipped" not in image.parameters
        assert distance(image, whole) < EXACT
        generate(host, "a cat")
        assert bases_of(checkpoint) == base
        if not user.pressed:
            break
        presses += each
    assert presses > 20
    for part in ("cats: reading", "dogs: reading", "cats: checking", "attaching", "placing"):
        assert any(part in str(text) for text in shown), part


@pytest.mark.parametrize("at", ["reading", "attaching"])
def test_the_former_loras_are_not_left_on_where_the_new_ones_are_given_up(
    host: Host, checkpoint: Checkpoint, files: Files, at: str
) -> None:
    with job(host):
        generate(host, "a cat<lora:dogs:1>")
    assert branches(checkpoint.model)
    with job(host, at=at):
        image = generate(host, "a cat<lora:cats:te=0:unet=1>")
    assert len(image.comments) == 1
    assert "the generation was interrupted while it was being" in image.comments[0]
    assert distance(image, exact_output(checkpoint, "a cat")) < EXACT
    assert hooks_of(checkpoint.model) == 0


def test_what_was_read_and_encoded_before_is_used_again(
    host: Host, checkpoint: Checkpoint, files: Files
) -> None:
    with job(host) as user:
        generate(host, PROMPT)
        whole = user.seen.copy()
    encodes = checkpoint.encodes
    with job(host, at=0) as user:
        image = generate(host, PROMPT)
    assert not image.comments, "nothing was left to be given up"
    assert len(user.seen) < len(whole)
    assert checkpoint.encodes == encodes
    assert distance(image, exact_output(checkpoint, "a cat", active(files))) < EXACT


def test_text_that_was_encoded_without_what_was_given_up_is_encoded_anew(
    host: Host, checkpoint: Checkpoint, files: Files
) -> None:
    text = "a cat<lora:cats:te=1:unet=0>"
    for _ in range(2):
        with job(host, at="attaching"):
            image = generate(host, text)
        assert len(image.comments) == 1
        assert "while it was being attached" in image.comments[0]
        assert distance(image, exact_output(checkpoint, "a cat")) < EXACT
    image = generate(host, text)
    assert not image.comments
    assert distance(image, exact_output(checkpoint, "a cat", [Active(files[0], 0.0, te=1.0)])) < EXACT
    encodes = checkpoint.encodes
    generate(host, text)
    assert checkpoint.encodes == encodes


def test_a_lora_that_fails_on_the_diffusion_model_alone_has_no_text_encoded_anew(
    host: Host, checkpoint: Checkpoint, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing_at(1, patch)
        text = "a cat<lora:cats:te=0:unet=1>"
        for _ in range(3):
            image = generate(host, text)
            assert any("no such luck" in comment for comment in image.comments)
            encodes = checkpoint.encodes
        generate(host, text)
        assert checkpoint.encodes == encodes
    image = generate(host, text)
    assert not image.comments
    assert checkpoint.encodes == encodes
    assert distance(image, exact_output(checkpoint, "a cat", [Active(files[0], te=0.0)])) < EXACT


@pytest.mark.parametrize("at", [0, 8, 12])
def test_an_interruption_is_no_failure_that_stops_the_generation_with_an_error(
    host: Host, checkpoint: Checkpoint, files: Files, at: int
) -> None:
    host.set_option(ON_FAILURE, STOP)
    with job(host, at=at):
        image = generate(host, PROMPT)
    assert image.comments
    with job(host, at=at), pytest.raises(GenerationStopped, match=r"nobody.*The generation") as stopped:
        generate(host, "a hill<lora:nobody:1><lora:cats:1>")
    assert "interrupted" not in str(stopped.value)
    with job(host):
        image = generate(host, PROMPT)
    assert not image.comments
    assert distance(image, exact_output(checkpoint, "a cat", active(files))) < EXACT


def test_the_image_after_a_skipped_one_has_its_loras_and_says_so(jobs: Jobs, files: Files) -> None:
    """The WebUI takes the flag back where the next image of the batch begins."""
    host, seen = jobs.host, []

    def during(p: Any) -> None:
        active = installation.active()
        assert active is not None
        active.notices.show(p.comment, p.extra_generation_params)
        report = active.record.present
        seen.append(([file.problem for file in report.reports()], dict(p.extra_generation_params)))

    with job(host, SKIP, at=0):
        p = jobs.run(PROMPT, during=during, n_iter=2)
    first, second = seen
    assert ["was interrupted" in str(problem) for problem in first[0]] == [True, True]
    assert first[1]["Precision LoRA skipped"] == "cats, dogs"
    assert second[0] == [None, None]
    assert "Precision LoRA skipped" not in second[1]
    exact = [exact_output(host.current, "a cat", each) for each in ([], active(files))]
    for output, wanted in zip(p.outputs, exact, strict=True):
        assert (output.double() - wanted).norm() / wanted.norm() < EXACT


def test_a_stale_flag_interrupts_no_plan(host: Host, checkpoint: Checkpoint, files: Files) -> None:
    """As the API leaves it: no job runs, and the flag stands."""
    active = installation.active()
    assert active is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.shared.state, "interrupted", True)
        patch.setattr(host.shared.state, "job_count", 0)
        found = active.plan_for([("cats", 1.0), ("dogs", 0.5)], 4096)
    assert found.diffusion_model.left_out == ()
    assert found.diffusion_model.plan.resident_bytes > 0


def test_what_the_host_has_merged_of_a_file_that_was_given_up_it_takes_out_again() -> None:
    model = small_model()
    session, merged, reached = HostedSession(model), [], 0
    patches = {
        identifier("both"): {
            "words.weight": [entry(("fooocus", (torch.ones(1),)))],
            "linear.weight": [entry(ours("lora", (16, 8)))],
        }
    }
    theirs = {identifier("both"): {"words.weight": patches[identifier("both")]["words.weight"]}}

    def ticking(last: int | None) -> Callable[[int, int], None]:
        def tick(done: int, total: int) -> None:
            nonlocal reached
            reached = done
            if done == last:
                raise progress.Interrupted("attaching")

        return tick

    for last in range(3):
        merged.clear()
        problems = session.follow(model, patches, Arithmetic(), merged.append, ticking(last))
        assert reached == last
        assert [problem.source for problem in problems] == ["both"]
        assert merged == [theirs, {}]
        assert session.attached == ()
        assert session.host_layers == {}
        assert session.follow(model, patches, Arithmetic(), merged.append, ticking(None)) == problems
        assert merged == [theirs, {}], "until it is to be tried again"
        session.try_again()
    merged.clear()
    assert session.follow(model, patches, Arithmetic(), merged.append) == []
    assert merged == [theirs]
    assert session.attached == ("linear",)


def test_the_bar_says_which_checkpoint_is_loaded_and_why(jobs: Jobs) -> None:
    shown = []
    load = jobs.load

    def loading(*args: Any, **kwargs: Any) -> Checkpoint:
        shown.append(jobs.host.shared.state.textinfo)
        return load(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, job(jobs.host), log_lines(20) as lines:
        patch.setattr(jobs.host.sd_models, "forge_loader", loading)
        for override in (E4M3, E4M3, None):
            jobs.run(override=override)
    expected = [
        "loading the checkpoint in float8-e4m3fn for this generation",
        "loading the checkpoint as set",
    ]
    assert shown == expected
    assert [line for line in lines if line.startswith("loading the checkpoint")] == expected


def test_a_checkpoint_is_not_loaded_for_a_generation_that_was_interrupted_before(jobs: Jobs) -> None:
    host = jobs.host
    for override, stored in ((E4M3, FP8), (None, torch.float32)):
        before = host.current
        with job(host):
            host.shared.state.interrupted = True
            p = jobs.run(override=override)
        assert (p.outputs, jobs.loads) == ([], [])
        assert host.current is before
        with job(host):
            p = jobs.run(override=override)
        assert p.storage == [stored]
        assert jobs.loads == [(FIRST, None if stored is torch.float32 else stored)]
        jobs.loads.clear()


def test_a_skipped_image_and_a_stale_flag_do_not_keep_a_checkpoint_from_being_loaded(jobs: Jobs) -> None:
    with job(jobs.host):
        jobs.host.shared.state.skipped = True
        assert jobs.run(override=E4M3).storage == [FP8]
    jobs.host.shared.state.interrupted = True
    jobs.host.shared.state.job_count = 0
    jobs.run()
    assert jobs.loads == [(FIRST, FP8), (FIRST, None)]


def test_hires_fix_of_a_skipped_image_has_the_checkpoint_that_it_asks_for(jobs: Jobs) -> None:
    def skip_and_go_on(p: Any) -> None:
        jobs.host.shared.state.skipped = True
        jobs.second_pass(p, SECOND)

    with job(jobs.host):
        jobs.run(during=skip_and_go_on)
    assert jobs.loads == [(SECOND, None)]


def test_the_first_checkpoint_of_all_is_loaded_whatever_was_pressed(jobs: Jobs) -> None:
    """Without one the WebUI cannot end a generation in good order."""
    host = jobs.host
    host.sd_models.model_data.sd_model = None
    with job(host):
        host.shared.state.interrupted = True
        assert jobs.run(override=E4M3).outputs == []
    assert jobs.loads == [(FIRST, FP8)]
