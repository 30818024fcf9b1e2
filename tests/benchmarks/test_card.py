"""The counts of benchmarks/card.py: what each way starts, and the times that follow from it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import card
from benchmarks.card_layers import LAYERS, PASSES, Layer
from benchmarks.card_ways import Files, counting, ours, ours_on_older_torch, peft, two_products
from benchmarks.kernels import Kernel
from benchmarks.roofline import CARDS, Card
from tests.docs.named_tests import ROOT

PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")

LINEAR = Layer("linear", (48, 64), (2, 20, 64), torch.bfloat16)
CONV = Layer("conv", (48, 32, 3, 3), (2, 32, 8, 8), torch.float16)
LOOP = 4
"""Kernels of PEFT's loop: two products, a scale, a sum."""


@pytest.fixture(autouse=True)
def _without_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing one would change this process."""
    for root in ("FORGE_ROOT", "NEO_ROOT"):
        monkeypatch.delenv(root, raising=False)


@pytest.mark.parametrize("layer", [LINEAR, CONV], ids=lambda layer: layer.name)
@pytest.mark.parametrize("count", [1, 3])
def test_two_products_read_and_write_each_tensor_once(layer: Layer, count: int) -> None:
    with counting():
        kernels = two_products(layer, Files(count, 4, layer.dtype))
    assert len(kernels) == 2
    rows, columns = layer.weight[0], math.prod(layer.weight[1:])
    positions = 2 * 20 if layer is LINEAR else 2 * 8 * 8
    given = math.prod(layer.given)
    rank = 4 * count
    numbers = given + rank * columns + 2 * rank * positions + rank * rows + 2 * rows * positions
    assert sum(kernel.bytes for kernel in kernels) == 2 * numbers


@pytest.mark.parametrize("layer", [LINEAR, CONV], ids=lambda layer: layer.name)
def test_a_loop_takes_four_kernels_for_each_file_and_a_stack_the_same_for_all(layer: Layer) -> None:
    with counting():
        loops = [len(peft(layer, Files(count, 4, layer.dtype))) for count in (1, 3)]
        stacks = [len(ours(layer, Files(count, 4, layer.dtype))) for count in (1, 3)]
    assert loops == [LOOP, 3 * LOOP]
    assert stacks[0] == stacks[1] <= 10


def test_an_older_torch_starts_more_on_bf16() -> None:
    files = Files(1, 4, torch.bfloat16)
    with counting():
        assert len(ours_on_older_torch(LINEAR, files)) > len(ours(LINEAR, files))


def test_the_passes_change_the_layers_that_a_trainer_names() -> None:
    counts = {name: sum(layer.count for layer in model.layers()) for name, model in PASSES.items()}
    assert counts == {"flux": 304, "sdxl": 722, "sd15": 192}  # of a file of kohya's trainer
    flux, sdxl = PASSES["flux"].layers(), PASSES["sdxl"].layers()
    assert any(layer.given == (1, 4096 + 256, 3072) and layer.weight == (21504, 3072) for layer in flux)
    assert any(layer.given == (2, 4096, 640) and layer.weight == (640, 640) for layer in sdxl)


def test_a_roofline_is_the_slower_of_memory_and_products_and_the_launches() -> None:
    slow = Card("slow", bandwidth=100.0, multiprocessors=1, clock=1.0)
    assert slow.peak(fp32=False) == 2 * slow.peak(fp32=True) == 512
    memory, products = Kernel("a", bytes=300, flops=512), Kernel("b", bytes=100, flops=5120)
    assert slow.seconds([memory, products], launch=0.5) == 3 + 10 + 2 * 0.5
    assert slow.seconds([Kernel("b", 100, 5120, fp32=True)], launch=0.0) == 20
    assert {each.name: round(each.peak(False) / 1e12, 1) for each in CARDS} == {
        "RTX 3060": 25.5,
        "RTX 4070": 58.3,
        "RTX 4090": 165.2,
    }


def test_tables_and_json_hold_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows = card.measure(counts=(2,), rank=4, passes=(), layers=(LINEAR, CONV))
    found = card.as_json(rows, 4, 5e-6)
    assert json.loads(json.dumps(found))["measure"].startswith("Counted, not timed")
    assert {(row["subject"], row["way"]) for row in found["layers"]} == {
        (layer.name, way)
        for layer in (LINEAR, CONV)
        for way in ("ours", "ours, older torch", "two products", "PEFT")
    }
    for row in rows["layers"]:
        assert row.way != "two products" or row.share == 1
        assert row.milliseconds["RTX 3060"] > row.milliseconds["RTX 4090"] > 1e3 * 5e-6 * row.kernels
    text = card.as_text(rows, 4, 5e-6)
    assert text.startswith("Counted, not timed")
    assert "| linear | 2 |" in text
    assert "| conv | 2 |" in text
    with pytest.raises(SystemExit):
        card.main(["--rank", "0"])
    assert "at least 1" in capsys.readouterr().err


def test_only_what_is_over_the_limits_is_marked() -> None:
    flux = LAYERS[0]
    with counting():
        rows = list(card.layer_rows(flux, (8,), 16, 5e-6))
    assert {row.stored for row in rows if row.over} == {"fp16", "fp32"}
    assert all(row.way == "ours" for row in rows if row.over)


def page_cells(first: str, subject: str, loras: int) -> dict[str, str]:
    """One row of the page's first table of these, by column."""
    table = PAGE[PAGE.index(f"| {first} | LoRAs |") :].partition("\n\n")[0].splitlines()
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    (row,) = (row for row in rows if row[:2] == [subject, str(loras)])
    return dict(zip(heads[2:], row[2:], strict=True))


def column(row: card.Row) -> str:
    return f"{row.way}, {row.stored} files" if row.way == "ours" else row.way


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[3], LAYERS[8]], ids=lambda layer: layer.name)
@pytest.mark.parametrize("count", [1, 8])
def test_the_page_has_what_the_code_starts_now(layer: Layer, count: int) -> None:
    cells = page_cells("layer", layer.name, count)
    with counting():
        rows = list(card.layer_rows(layer, (count,), 16, 5e-6))
    assert len(rows) == 6
    for row in rows:
        assert cells[column(row)] == card.layer_cell(row)


def test_the_page_has_a_pass_as_it_is_counted_now() -> None:
    model = PASSES["sdxl"]
    cells = page_cells("pass", model.name, 1)
    with counting():
        rows = list(card.pass_rows(model, (1,), 16, 5e-6))
    assert cells.items() >= {column(row): card.pass_cell(row) for row in rows if row.loras}.items()


def test_the_page_says_that_it_is_counted_and_has_every_layer_and_card() -> None:
    assert "counted, not timed" in PAGE
    for layer in LAYERS:
        for count in (1, 4, 8):
            assert page_cells("layer", layer.name, count)["two products"].startswith("2, ")
    for each in CARDS:
        figures = f"{each.bandwidth / 1e9:g} | {each.multiprocessors} | {each.clock / 1e9:g}"
        assert f"| {each.name} | {figures} | {each.peak(False) / 1e12:.1f} |" in PAGE


def test_two_hosts_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for root in ("FORGE_ROOT", "NEO_ROOT"):
        monkeypatch.setenv(root, "/nowhere")
    with pytest.raises(SystemExit):
        card.main([])
    assert "one process runs one host" in capsys.readouterr().err
