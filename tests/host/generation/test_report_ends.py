"""However a generation ends, the report of the last one is that of the last one, measured from its start."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib_precision_lora.host import binding as forge
from lib_precision_lora.host import install, installation, uninstall
from lib_precision_lora.host.generation.generations import GENERATIONS, log_report
from lib_precision_lora.host.generation.override import Override
from lib_precision_lora.host.page import script
from lib_precision_lora.memory.meter import PeakMeter
from lib_precision_lora.ui.choices import AS_SET
from lib_precision_lora.ui.settings import COMPUTE, ENABLED
from tests.host.jobs import BeforeProcess, Jobs
from tests.host.lora_files import make_lora
from tests.host.observers import hooks_of, log_lines, swapped
from tests.memory.card_statistics import CardStatistics

TEXT = "a cat<lora:cats:1>"


class Script(BeforeProcess):
    """Our script with a closed accordion, its report included."""

    def __init__(self) -> None:
        super().__init__(Override())

    def before_process(self, p: Any) -> None:
        script.request_override(p, (False, AS_SET, AS_SET))

    def postprocess(self, p: Any, processed: Any) -> None:
        script.show_late_notices(p, processed)
        script.report(p)


def run(jobs: Jobs, prompt: str = TEXT, during: Callable[[Any], None] = lambda p: None, **fields: Any) -> Any:
    """A generation with our script."""
    p = jobs.new(prompt, during=during, **fields)
    p.scripts = Script()
    jobs.host.processing.process_images(p)
    return p


@pytest.fixture(autouse=True)
def _files(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    make_lora("cats").write(jobs.host)
    make_lora("dogs", seed=3).write(jobs.host)
    monkeypatch.setattr(GENERATIONS, "last", None)


def last() -> tuple[list[str], bool]:
    """Names and end of the generation that is told as the last one."""
    report = GENERATIONS.last
    assert report is not None
    return [file.name for file in report.files], report.finished


class Fault(RuntimeError):
    pass


def fail(p: Any) -> None:
    raise Fault("injected")


def test_after_a_generation_that_fails_the_last_one_is_that_one(jobs: Jobs) -> None:
    run(jobs)
    assert last() == (["cats"], True)
    with pytest.raises(Fault):
        run(jobs, "<lora:dogs:0.5>", during=fail)
    assert last() == (["dogs"], False)
    run(jobs, "nothing")
    assert last() == ([], True)


def test_one_that_fails_before_its_loras_has_none(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    run(jobs)
    with monkeypatch.context() as patch:
        patch.setattr(jobs.host.sd_models, "forge_loader", lambda *args, **kwargs: fail(None))
        jobs.select("second.safetensors")
        with pytest.raises(Fault):
            run(jobs, "<lora:dogs:0.5>")
    assert last() == ([], False)


def test_a_nested_generation_that_fails_leaves_the_outer_one_its_report(jobs: Jobs) -> None:
    def during(p: Any) -> None:
        with pytest.raises(Fault):
            run(jobs, "<lora:dogs:0.5>", during=fail)
        assert last() == (["dogs"], False)

    run(jobs, during=during)
    assert last() == (["cats", "dogs"], True)


def test_a_client_is_told_that_the_last_generation_failed(jobs: Jobs, api: Any) -> None:
    run(jobs)
    with pytest.raises(Fault):
        run(jobs, "<lora:cats:0.05>" * 10, during=fail)
    told = api.get("/precision-lora/v1/status").json()["last_generation"]
    assert told["finished"] is False
    assert [(file["name"], file["strength"]) for file in told["files"]] == [("cats", 0.5)]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> CardStatistics:
    """A card whose largest use so far was much larger."""
    monkeypatch.setattr(forge, "PeakMeter", lambda device, reset: PeakMeter(torch.device("cuda"), reset))
    return CardStatistics(monkeypatch, in_use=2**20, peak=2**33)


def peak(jobs: Jobs, card: CardStatistics, nbytes: int) -> int | None:
    """What is told of a generation that takes so much at once."""

    def during(p: Any) -> None:
        card.use(nbytes)
        card.use(2**20)

    run(jobs, during=during)
    assert GENERATIONS.last is not None
    return GENERATIONS.last.peak_bytes


def test_a_peak_is_that_of_its_generation(jobs: Jobs, card: CardStatistics) -> None:
    assert peak(jobs, card, 3 * 2**20) == 3 * 2**20
    assert peak(jobs, card, 2 * 2**20) == 2 * 2**20
    with log_lines(logging.INFO) as lines:
        log_report(GENERATIONS.last)
    assert ", 2.0 MiB at most in use on the card, all included" in lines[0]


def test_a_nested_generation_does_not_reset_the_outer_ones_measurement(
    jobs: Jobs, card: CardStatistics
) -> None:
    inner: list[int | None] = []

    def during(p: Any) -> None:
        card.use(5 * 2**20)
        inner.extend([peak(jobs, card, 4 * 2**20), peak(jobs, card, 6 * 2**20)])

    run(jobs, during=during)
    assert inner == [None, 6 * 2**20], "the first is hidden by the outer one's"
    assert GENERATIONS.last.peak_bytes == 6 * 2**20
    assert card.resets == 1


def test_the_statistics_that_the_page_measures_with_are_left_alone(
    jobs: Jobs, card: CardStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Event()
    running.set()
    monkeypatch.setattr(jobs.host.shared, "mem_mon", SimpleNamespace(run_flag=running), raising=False)
    card.reset()  # as the page does where a task begins
    assert peak(jobs, card, 3 * 2**20) == 3 * 2**20
    assert peak(jobs, card, 3 * 2**20) is None, "hidden by the former one of the task"
    assert card.resets == 1
    running.clear()
    assert peak(jobs, card, 2 * 2**20) == 2 * 2**20


def outputs(jobs: Jobs, during: Callable[[], Any]) -> list[torch.Tensor]:
    """Of the diffusion model in two steps of one image; during: what happens between them."""
    steps: list[torch.Tensor] = []

    def between(p: Any) -> None:
        steps.append(p.outputs[-1])
        if len(steps) == 1:
            during()
            sample_again(jobs, p)
            steps.append(p.outputs[-1])

    run(jobs, during=between)
    return steps


def sample_again(jobs: Jobs, p: Any) -> None:
    """Another step: the model is not placed again."""
    from tests.host.checkpoints import PICTURE, TOKENS
    from tests.host.images import context_of

    with torch.inference_mode():
        unet = p.sd_model.forge_objects.unet
        p.outputs.append(unet.model.diffusion_model(TOKENS, PICTURE, context_of(p.c)).clone())


def test_taken_out_while_an_image_is_sampled_it_stays_to_the_end_of_that_image(jobs: Jobs) -> None:
    ours = swapped(jobs.host)
    run(jobs, "a cat")
    with_lora, again = outputs(jobs, uninstall)
    assert torch.equal(with_lora, again), "half of a LoRA"
    assert last() == (["cats"], True)
    assert installation.active() is None
    assert all(swapped(jobs.host)[name] is not function for name, function in ours.items())
    assert hooks_of(jobs.host.current.model) == 0
    assert last() == (["cats"], True), "the report stays"


def test_what_fails_after_it_was_taken_out_is_told_and_it_leaves(jobs: Jobs) -> None:
    def during(p: Any) -> None:
        uninstall()
        fail(p)

    with pytest.raises(Fault):
        run(jobs, during=during)
    assert last() == (["cats"], False)
    assert installation.active() is None


def test_put_in_again_before_the_image_is_done_it_does_not_leave(jobs: Jobs) -> None:
    active = installation.active()

    def during(p: Any) -> None:
        uninstall()
        uninstall()
        assert install()

    run(jobs, during=during)
    assert installation.active() is active
    run(jobs, "<lora:dogs:1>")
    assert last() == (["dogs"], True)
    uninstall()
    assert installation.active() is None, "at once, where no image is being made"


def in_effect() -> tuple[str, str]:
    """Who applies LoRAs now, and how."""
    active = installation.active()
    assert active is not None
    return active.record.present.patcher, active.record.present.compute


@pytest.mark.parametrize(("option", "value"), [(ENABLED, False), (COMPUTE, "fp16")])
def test_a_setting_that_is_changed_while_an_image_is_made_takes_effect_at_the_next_one(
    jobs: Jobs, option: str, value: Any
) -> None:
    seen: list[tuple[str, str]] = []

    def during(p: Any) -> None:
        if not seen:
            jobs.host.set_option(option, value)
            jobs.host.extra_networks.activate(p, p.extra_network_data)  # as a hires pass does
            jobs.sample_once(p)
        seen.append(in_effect())

    p = run(jobs, during=during)
    assert torch.equal(p.outputs[0], p.outputs[1])
    assert seen == [("Precision LoRA", "auto")]
    run(jobs, during=lambda p: seen.append(in_effect()))
    assert len(seen) == 2
    assert seen[1] == {ENABLED: ("WebUI", ""), COMPUTE: ("Precision LoRA", "fp16")}[option]
