"""benchmarks/forward.py and its clock: ratios of runs that take turns."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import forward
from benchmarks.forward import Case, measure
from benchmarks.interleave import CPU, Spread, ratios, seconds


def test_runs_take_turns_and_each_round_begins_with_another() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = seconds(runs, 2, CPU)
    assert "".join(order) == "abc" + "abc" + "bca"
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_ratio_is_that_of_one_round() -> None:
    found = ratios({"bare": [1.0, 10.0, 2.0], "more": [2.0, 30.0, 2.0]}, "bare")
    assert found == {"more": Spread(median=2.0, low=1.5, high=2.5)}
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert str(Spread(1.0, 0.5, 2.0)) == "1.000× (0.500 to 2.000)"


def test_a_run_that_works_longer_takes_longer() -> None:
    def work(limit: int) -> int:
        return sum(range(limit))

    times = seconds({"short": lambda: work(1_000), "long": lambda: work(200_000)}, 5, CPU)
    assert ratios(times, "short")["long"].median > 10


@pytest.mark.parametrize("base", forward.BASES)
def test_every_base_runs_beside_a_branch(base: str) -> None:
    rows = measure(Case((256, 512), 8, "bf16", base, rank=4), (1, 3), 2, CPU)
    assert [row.files for row in rows] == [1, 3]
    assert [row.bound for row in rows] == [1 + n * 4 * (256 + 512) / (256 * 512) for n in (1, 3)]
    assert all(row.over_bound == row.time.median / row.bound > 0 for row in rows)


def test_what_is_not_a_branch_beside_the_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(torch.nn.Module):
        """Read around its forward, for all that the session knows."""

        def __init__(self, weight: torch.nn.Parameter) -> None:
            super().__init__()
            self.weight, self.bias = weight, None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    monkeypatch.setattr(forward, "dense_layer", Other)
    with pytest.raises(AssertionError, match="another weight"):
        measure(Case((64, 64), 2, "fp32", rank=4), (1,), 1, CPU)


def test_the_command_prints_a_table_or_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "SHAPES", ((64, 64),))
    arguments = ["--quick", "--tokens", "2", "--rank", "4", "--rounds", "1", "--files", "2"]
    assert forward.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "CPU" in result["machine"] or torch.cuda.is_available()
    assert [(row["case"]["dtype"], row["files"]) for row in result["rows"]] == [("fp32", 2), ("bf16", 2)]
    assert forward.main(arguments) == 0
    assert "| 64→64 | 2 | bf16 | dense | lora | 2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        forward.main(["--files", "0"])
    assert "at least 1" in capsys.readouterr().err
