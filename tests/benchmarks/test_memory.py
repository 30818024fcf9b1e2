"""The table of docs/memory.md is what the benchmark plans now, and the benchmark runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.flux_layers import SHAPES, flux_layers, inputs, loras
from benchmarks.memory import main
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.arithmetic import plain_form

MIB = 2**20
PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
CPU = torch.device("cpu")


def test_the_benchmark_measures_what_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--files", "1", "--rank", "4", "--tokens", "16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {layer["name"] for layer in result["layers"]} == set(SHAPES)
    for layer in result["layers"]:
        out, columns = SHAPES[layer["name"]]
        assert layer["factors_planned"] == layer["factors_measured"]
        scales = layer["factors_measured"] - 2 * 4 * (out + columns)
        assert scales in (4 * 4, 2 * 4 * 4), "one vector of them, or two where the CPU has no bf16 products"
        assert 0 < layer["workspace_measured"] <= layer["workspace_planned"] + 2 * MIB
        factors = layer["factors_measured"]
        assert layer["resident_peak"] is None or factors / 2 < layer["resident_peak"] < factors + 64 * MIB
        assert 8 <= layer["merge_transient"] / (out * columns) <= 20


def test_the_pages_planned_numbers_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is of a CPU without products in bf16."""
    monkeypatch.setattr(plain_form, "_cpu_multiplies_bf16", lambda: False)
    session = PatchSession(model := flux_layers(CPU))
    planned = session.footprints(loras(8, 32), "auto", CPU, torch.bfloat16)
    rows = dict(re.findall(r"^\| (\w+) \| \d+×\d+ \| \d+ \| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE))
    assert set(rows) == set(model.keys())
    for name, cells in rows.items():
        numbers = [float(cell) for cell in cells.split(" | ")]
        x = inputs(name, 4096, CPU)
        assert numbers[0] == pytest.approx(planned[name].factor_bytes / MIB, abs=0.06)
        workspace = planned[name].workspace_bytes(x.numel() // x.shape[-1])
        assert numbers[2] == pytest.approx(workspace / MIB, abs=0.06)


def test_sizes_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--files", "0"])
    assert "--files is 0" in capsys.readouterr().err
