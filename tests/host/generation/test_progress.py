"""Stages: what the WebUI's bar and the log say of them, and when they are given up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from lib_precision_lora.containers import stream
from lib_precision_lora.host.generation.progress import Interrupted, Progress
from lib_precision_lora.host.loras.files import FileProblem, LoraFiles, Stamp
from lib_precision_lora.ticks import Tick
from tests.host.observers import log_lines

INFO = 20


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def state() -> SimpleNamespace:
    """As of a WebUI whose job runs."""
    return SimpleNamespace(
        job_count=1, interrupted=False, skipped=False, stopping_generation=False, textinfo="before"
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(state: SimpleNamespace, clock: Clock) -> Progress:
    return Progress(lambda: state, clock)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    with log_lines(INFO) as lines:
        yield lines


def test_the_bar_shows_name_and_percentage_and_then_what_stood_there(
    progress: Progress, state: SimpleNamespace
) -> None:
    with progress.stage("LoRA cats: reading") as tick:
        assert state.textinfo == "LoRA cats: reading"
        for done, percent in ((0, 0), (45, 22), (199, 99), (200, 100)):
            tick(done, 200)
            assert state.textinfo == f"LoRA cats: reading {percent} %"
        with progress.stage("within") as inner:
            inner(1, 2)
            assert state.textinfo == "within 50 %"
        assert state.textinfo == "LoRA cats: reading 100 %"
    assert state.textinfo == "before"


@pytest.mark.parametrize("kind", ["stage", "whole"])
def test_the_bar_shows_what_stood_there_also_after_an_error(
    progress: Progress, state: SimpleNamespace, kind: str
) -> None:
    def failing() -> None:
        with getattr(progress, kind)("fails"):
            assert state.textinfo == "fails"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert state.textinfo == "before"


def test_the_log_speaks_after_a_second_every_ten_seconds_and_at_the_end(
    progress: Progress, clock: Clock, lines: list[str]
) -> None:
    with progress.stage("attaching LoRAs") as tick:
        for second in range(25):
            tick(second, 50)
            tick(second, 50)
            clock.now += 0.9 if second == 0 else 1.0
    assert lines == [
        "attaching LoRAs 4 %",
        "attaching LoRAs 24 %",
        "attaching LoRAs 44 %",
        "attaching LoRAs: took 24.9 s",
    ]


def test_the_log_does_not_speak_of_what_is_done_within_a_second(
    progress: Progress, clock: Clock, lines: list[str]
) -> None:
    with progress.stage("attaching LoRAs") as tick:
        for done in range(9):
            tick(done, 9)
            clock.now += 0.1
    with progress.whole("LoRA cats: computing its hash", logged=False):
        clock.now += 0.9
    assert lines == []


def test_the_log_names_what_the_webui_does_as_it_begins_and_what_it_took(
    progress: Progress, clock: Clock, lines: list[str]
) -> None:
    with progress.whole("loading the checkpoint as set"):
        assert lines == ["loading the checkpoint as set"]
        clock.now += 31.25
    assert lines[1:] == ["loading the checkpoint as set: took 31.2 s"]


@pytest.mark.parametrize("button", ["interrupted", "skipped"])
def test_a_press_gives_up_at_the_next_tick_and_the_log_says_so(
    progress: Progress, state: SimpleNamespace, clock: Clock, lines: list[str], button: str
) -> None:
    def reading() -> None:
        with progress.stage("LoRA cats: reading") as tick:
            tick(1, 3)
            setattr(state, button, True)
            clock.now += 0.5
            tick(2, 3)

    with pytest.raises(Interrupted, match="LoRA cats: reading"):
        reading()
    assert state.textinfo == "before"
    assert lines == ["LoRA cats: reading: interrupted after 0.5 s"]


def test_a_flag_that_a_former_job_has_left_interrupts_nothing(
    progress: Progress, state: SimpleNamespace
) -> None:
    state.interrupted = state.skipped = True
    state.job_count = 0
    with progress.stage("reading") as tick:
        tick(0, 1)
    assert not progress.interrupted


def test_to_end_after_this_image_is_no_reason_to_give_it_up(
    progress: Progress, state: SimpleNamespace
) -> None:
    state.stopping_generation = True
    with progress.stage("reading") as tick:
        tick(0, 1)


def written(folder: Path, size: int) -> Path:
    """A LoRA file whose tensors have this many bytes."""
    path = folder / "cats.safetensors"
    safetensors.torch.save_file({"a": torch.arange(size // 4, dtype=torch.float32)}, path)
    return path


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1000)
    return 1000


def test_a_file_is_read_chunk_by_chunk_and_each_is_shown(
    tmp_path: Path, small_chunks: int, progress: Progress, state: SimpleNamespace
) -> None:
    path = written(tmp_path, 8000)
    stamp, shown = Stamp.of(str(path)), []

    @contextmanager
    def stage(name: str) -> Iterator[Tick]:
        with progress.stage(name) as tick:

            def heard(done: int, total: int) -> None:
                tick(done, total)
                shown.append((done, total, state.textinfo))

            yield heard

    content = LoraFiles(stage=stage).read(stamp)
    assert torch.equal(content["a"], torch.arange(2000.0))
    assert len(shown) > 8000 // small_chunks
    assert {total for _, total, _ in shown} == {stamp.size}
    assert [done for done, _, _ in shown] == sorted(done for done, _, _ in shown)
    assert all(text == f"LoRA cats: reading {100 * done // stamp.size} %" for done, _, text in shown)


@pytest.mark.parametrize("left", [0, 20, 7000])
def test_a_file_that_was_cut_off_after_it_was_looked_at_is_refused(tmp_path: Path, left: int) -> None:
    path = written(tmp_path, 8000)
    stamp = Stamp.of(str(path))
    os.truncate(path, left)
    with pytest.raises(FileProblem, match="changed while it was being read"):
        LoraFiles().read(stamp)


def test_a_file_that_is_cut_off_while_it_is_read_is_refused(tmp_path: Path, small_chunks: int) -> None:
    path = written(tmp_path, 8000)
    stamp = Stamp.of(str(path))

    @contextmanager
    def stage(name: str) -> Iterator[Tick]:
        yield lambda done, total: os.truncate(path, 5000) if done > 3000 else None

    files = LoraFiles(stage=stage)
    with pytest.raises(FileProblem, match=r"^cats\.safetensors: the file is truncated"):
        files.read(stamp)
    assert files.kept_bytes == 0


def test_nothing_is_kept_of_a_file_whose_reading_was_interrupted(
    tmp_path: Path, small_chunks: int, progress: Progress, state: SimpleNamespace
) -> None:
    path = written(tmp_path, 8000)
    stamp, files = Stamp.of(str(path)), LoraFiles(stage=progress.stage)
    state.interrupted = True
    with pytest.raises(Interrupted):
        files.read(stamp)
    assert files.kept_bytes == 0
    state.interrupted = False
    assert torch.equal(files.read(stamp)["a"], torch.arange(2000.0))


@pytest.mark.parametrize("save", [torch.save, safetensors.torch.save_file], ids=["pt", "safetensors"])
def test_a_file_of_any_kind_can_be_interrupted_before_it_is_read(
    tmp_path: Path, progress: Progress, state: SimpleNamespace, save: Any
) -> None:
    path = tmp_path / "cats.pt"
    save({"a": torch.ones(2)}, path)
    stamp, files = Stamp.of(str(path)), LoraFiles(stage=progress.stage)
    state.interrupted = True
    with pytest.raises(Interrupted, match="LoRA cats: reading"):
        files.read(stamp)
    state.interrupted = False
    assert set(files.read(stamp)) == {"a"}
