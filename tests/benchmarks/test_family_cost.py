"""The formulas of benchmarks/family_files.py are what a forward does and what stays in memory."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.family_cost import main, measure, read
from benchmarks.family_files import FILES, Sizes
from tests.docs.families_table import PAGE
from tests.families import FAMILIES, family

SMALL = Sizes(tokens=8, inputs=256, outputs=192, rank=4)
MANY_CHUNKS = Sizes(tokens=14000, inputs=256, outputs=192, rank=2)
BEGIN, END = "<!-- family cost: begin -->\n", "<!-- family cost: end -->\n"


def test_every_family_has_a_file_and_formulas() -> None:
    missing, gone = set(FAMILIES) - set(FILES), set(FILES) - set(FAMILIES)
    assert not missing | gone, f"benchmarks/family_files.py lacks {missing}, and has {gone} without a family"


@pytest.mark.parametrize("name", FILES)
def test_a_benchmarks_file_is_read_as_that_family(name: str) -> None:
    read_file, known = read(FILES[name], SMALL), family(name, (192, 256)).adapter
    assert (type(read_file), read_file.kind) == (type(known), known.kind)
    for part in ("axis", "on_input"):
        assert getattr(read_file, part, None) == getattr(known, part, None)
    terms = [getattr(each, "inner", each) for each in (read_file, known) if hasattr(each, "scale")]
    assert len({type(getattr(each, "term", None)) for each in terms}) <= 1
    read_file.check((192, 256))


@pytest.mark.parametrize("name", FILES)
def test_formula_and_forward_agree_within_5_percent(name: str) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        cost = measure(name, FILES[name], SMALL, repeats=1)
    assert abs(cost.flops - cost.flops_by_formula) <= 0.05 * cost.flops_by_formula
    assert abs(cost.held - cost.held_by_formula) <= 0.05 * cost.held_by_formula
    assert cost.held > 0
    assert cost.elementwise > 0
    assert cost.peak > 0
    assert cost.time > 0.0


def test_a_streamed_product_is_made_once_for_each_chunk_of_tokens() -> None:
    assert MANY_CHUNKS.letters["c"] == 2
    with torch.no_grad():
        cost = measure("loha-streamed", FILES["loha-streamed"], MANY_CHUNKS, repeats=1)
    assert cost.flops == cost.flops_by_formula


def test_a_formula_is_a_sum_of_products() -> None:
    assert SMALL.value("2·t·r·i + 3·o") == 2 * 8 * 4 * 256 + 3 * 192
    assert SMALL.value("0") == 0
    with pytest.raises(ValueError, match="x"):
        SMALL.value("2·x")


def test_the_page_has_a_row_for_every_family_with_what_the_formulas_say() -> None:
    block = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = {line.split(" | ")[0].strip("| "): line for line in block.splitlines() if line.startswith("| ")}
    del rows["family"]
    command = "python -m benchmarks.family_cost"
    assert set(rows) == set(FAMILIES), f"docs/families.md: run {command} and put its table there"
    for name, file in FILES.items():
        cells = [cell.strip() for cell in rows[name].strip("|").split("|")]
        assert cells[1:4] == [file.flops, *[f"{Sizes().value(file.flops) / 1e6:.1f}"] * 2], name
        assert cells[6:9] == [file.bytes, *[f"{Sizes().value(file.bytes) / 2**20:.3f}"] * 2], name


def test_the_command_line_measures_what_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tokens", "8", "--inputs", "256", "--outputs", "192", "--rank", "4", "--repeats", "1"]
    assert main([*sizes, "--family", "lora", "--family", "diff", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sizes"] == {"tokens": 8, "inputs": 256, "outputs": 192, "rank": 4}
    assert [one["family"] for one in result["families"]] == ["lora", "diff"]
    assert [one["flops"] for one in result["families"]] == [28672, 2 * 8 * 256 * 192]
    assert main([*sizes, "--family", "oft"]) == 0
    assert "| oft | 2·t·o·r | 0.0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inputs", "100"], "100 inputs"),
        (["--rank", "64"], "rank 64"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--tokens", "0"], "0 tokens"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
