"""The benchmark of norms takes the ways that it names, on every base."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.dora_norms import BASES, main, measure
from lib_precision_lora.branch.algebra import norms
from lib_precision_lora.branch.algebra.reading import Reader

SHAPE = (64, 256)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("base", BASES)
def test_each_base_is_read_once_by_each_way(base: str, axis, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for owner, name in ((norms, f"{axis}_reading"), (Reader, f"{axis}_squares")):
        original = getattr(owner, name)

        def record(*args: object, name=name, original=original) -> object:
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, record)
    torch.manual_seed(0)
    cost = measure(base, SHAPE, axis, 4, 1)
    assert seen == [f"{axis}_reading", f"{axis}_squares"]
    assert min(cost.decode, cost.first, cost.changed, cost.whole) > 0.0


def test_the_result_is_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shape", "64x256", "--base", "Q8_0", "--rank", "4", "--repeats", "1"]
    assert main([*arguments, "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)["costs"]
    assert [(cost["base"], cost["axis"]) for cost in costs] == [("Q8_0", "row"), ("Q8_0", "column")]
    assert main(arguments) == 0
    assert "| Q8_0 | 64×256 | row |" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--shape", "64"], ["--shape", "64x100"], ["--rank", "0"]])
def test_wrong_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(wrong)
    assert wrong[0].strip("-") in capsys.readouterr().err
