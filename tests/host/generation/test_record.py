"""The record is written by the thread that generates, while others read it: a page, a client of the API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lib_precision_lora.host.generation.record import KEPT_PASSES, Record
from lib_precision_lora.host.generation.report import FileReport
from lib_precision_lora.ui.choices import OURS

PASSES = 5


class Number(int):
    """Compared with a pass's number, it lets another thread's work be done first."""

    meanwhile: Callable[[], Any]

    def __lt__(self, other: int) -> bool:
        self.meanwhile()
        return int(self) < other


class Name(str):
    """Looked up in a dictionary, it lets another thread's work be done first."""

    __slots__ = ("meanwhile",)

    def __hash__(self) -> int:
        self.meanwhile()
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other)


def report(name: str, **more: Any) -> FileReport:
    return FileReport(name, 1.0, 1.0, unet_layers=2, **more)


def test_passes_are_read_while_another_begins() -> None:
    record = Record()
    for _ in range(PASSES):
        record.begin(OURS, "auto")
    number = Number(2)
    number.meanwhile = lambda: record.begin(OURS, "auto")
    assert [each.number for each in record.since(number)] == [3, 4, 5]
    assert record.present.number == 2 * PASSES + 1, "the others have begun"


def test_a_pass_is_read_while_a_model_is_followed_and_files_are_added() -> None:
    record = Record()
    present = record.begin(OURS, "auto")
    strengths = {"cats path": {("a", "None"): 1.0, ("b", "None"): 1.0}}
    calls = []

    def meanwhile() -> None:
        calls.append(len(calls))
        present.followed(f"Model{len(calls)}", False, 0.0, {"cats path": 1}, strengths)
        present.add(report(f"dogs {len(calls)}"), f"dogs path {len(calls)}")
        present.problem(f"dogs path {len(calls)}", "it was left out")

    source = Name("cats path")
    source.meanwhile = lambda: None
    present.add(report("cats"), source)
    present.add(report("birds"), "birds path")
    present.followed("Model", False, 0.0, {"cats path": 1}, strengths)
    present.followed("Encoder", True, 0.0, {"cats path": 1}, {})
    source.meanwhile = meanwhile
    found = list(present.reports())
    assert calls
    assert [(file.name, file.host_layers, file.unet_layers) for file in found] == [
        ("cats", 2, 2),
        ("birds", 0, 0),
    ], "as it was when the reading began"
    source.meanwhile = lambda: None
    assert len(list(present.reports())) == 2 + len(calls)


def test_what_was_left_out_is_told_while_files_are_read() -> None:
    present = Record().begin(OURS, "auto")
    for name in ("cats", "dogs"):
        present.add(report(name), f"{name} path")
    reading = iter(present.reports())
    first = next(reading)
    present.problem(None, "all of them")
    assert [first.problem, next(reading).problem] == [None, None]
    assert [file.problem for file in present.reports()] == ["all of them"] * 2
    present.problem(None, "another reason")
    assert [file.problem for file in present.reports()] == ["all of them"] * 2, "the first one stands"
    assert present.problems == ("all of them", "another reason")


@pytest.mark.parametrize("passes", [1, KEPT_PASSES - 1, KEPT_PASSES, KEPT_PASSES + 3])
def test_the_last_passes_are_kept(passes: int) -> None:
    record = Record()
    for _ in range(passes):
        record.begin(OURS, "auto")
    kept = [each.number for each in record.since(-1)]
    assert kept == list(range(passes + 1))[-KEPT_PASSES:]
    assert [each.number for each in record.since(passes)] == [passes], "the one that is still in effect"
