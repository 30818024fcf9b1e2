"""benchmarks/ready.py on few and narrow layers: every stage runs, and the command tells of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import ready
from benchmarks.interleave import CPU
from tests.memory.checkpoints import flux

SHAPES = ready.changed_layers(1, hidden=64)


def test_the_layers_are_those_of_the_blocks() -> None:
    assert len(ready.changed_layers(19)) == 304  # of a file of kohya's trainer
    assert {name: flux(hidden=64)[f"{name}.weight"] for name in SHAPES} == SHAPES


def test_each_stage_of_a_round_is_timed(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for seed, path in enumerate(paths):
        ready.write_file(path, SHAPES, seed)
    one, three = (ready.one_round(paths[:count], SHAPES, CPU) for count in (1, 3))
    assert [stage for stage in ready.STAGES if stage in three] == [
        stage for stage in ready.STAGES if stage != "read to place"
    ]
    assert one.keys() == three.keys() - {"one removed"}
    assert min(*one.values(), *three.values()) > 0


def test_the_command_prints_a_table_or_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready, "changed_layers", lambda blocks: SHAPES)
    arguments = ["--rounds", "1", "--files", "1", "--files", "2"]
    assert ready.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["layers"] == len(SHAPES)
    assert set(result["milliseconds"]) == {"1", "2"}
    assert "CPU" in result["machine"] or torch.cuda.is_available()
    assert ready.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[4:]] == list(ready.STAGES)
    with pytest.raises(SystemExit):
        ready.main(["--rounds", "0"])
    assert "at least 1" in capsys.readouterr().err
