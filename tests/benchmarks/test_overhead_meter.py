"""The meter is a small part of what it measures."""

from __future__ import annotations

import json

import pytest

from benchmarks.overhead_meter import main


def test_the_meter_costs_a_small_part_of_the_smallest_branch(capsys: pytest.CaptureFixture[str]) -> None:
    """The limits leave room for a busy machine: measured were 0.25 us idle, 0.95 us measuring, of 180."""
    assert main(["--json", "--calls", "500", "--rounds", "20"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert 0 < cost["idle"] < 0.05 * cost["branch"]
    assert cost["idle"] < cost["measuring"] < 0.2 * cost["branch"]


def test_a_size_of_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--calls", "0"])
    assert end.value.code == 2
    assert "--calls is 0, it must be at least 1" in capsys.readouterr().err
