"""`make bench`: every benchmark is reachable, and one command prints them all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks.__main__ import BENCHMARKS, Benchmark

ROOT = Path(__file__).parents[2]


def test_whatever_has_a_main_is_among_them() -> None:
    files = {
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main(" in path.read_text("utf-8")
    }
    assert {one.main.__module__.rpartition(".")[2] for one in BENCHMARKS.values()} == files - {"__main__"}


def test_one_command_prints_tables_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--quick", "--only", "overhead"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# Benchmarks\n\nOn ")
    assert f"## {BENCHMARKS['overhead'].title}" in text
    assert bench.main(["--quick", "--only", "overhead", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"machine", "overhead"}
    assert result["overhead"]["branch"] > 0


def test_quick_arguments_are_given_where_a_minute_has_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[list[str]] = []

    def main(arguments: Sequence[str]) -> int:
        given.append(list(arguments))
        print("{}" if "--json" in arguments else "a table")  # noqa: T201
        return len(given) // 4

    monkeypatch.setattr(bench, "BENCHMARKS", {"card": Benchmark("One", main, ("--small",))})
    for options in ([], ["--quick"], ["--quick", "--json"]):
        assert bench.main(options) == 0
    assert given == [[], ["--small"], ["--small", "--json"]]
    capsys.readouterr()
    with pytest.raises(RuntimeError, match="One: ended with 1"):
        bench.main([])
