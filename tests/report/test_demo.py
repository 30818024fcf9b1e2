"""The demo's rows: our figures are law 2's, the stock-like ones are of the size that Forge's were."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib_precision_lora.adapters import make_lora
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.report.demo import DemoResult, DemoShape, Row, run_demo
from lib_precision_lora.report.demo.chart import write_chart
from lib_precision_lora.report.demo.files import FORMATS, read_tensors
from lib_precision_lora.report.demo.measure import (
    Subject,
    attached_delta,
    exact_delta,
    fingerprint,
    relative_error,
)
from lib_precision_lora.report.demo.model import build_model
from lib_precision_lora.report.demo.stock_merge import (
    STOCK_FORMATS,
    dequantize_q4_0,
    dequantize_q8_0,
    requantize_q8_0,
    stock_like_merge,
)
from lib_precision_lora.report.demo.table import demo_text
from lib_precision_lora.report.demo.weights import DELTA_RATIO, base_weights, lora_weights
from tests.storage.four_bit import decoded_by_bitsandbytes

STORED = ("NF4", "FP8", "Q8_0", "Q4_0", "Q4_K", "bf16")
SMALL = DemoShape(hidden=256, blocks=1, tokens=32)

OBSERVED = {"NF4": (0.9, 1.3), "FP8": (0.8, 1.2), "Q8_0": (5, 100), "Q4_0": (0.9, 1.3), "bf16": (0.1, 0.25)}
"""Where the stock-like error must lie; observed of Forge: 1.08, 1.00, 28.8, 1.08, 0.166."""


@pytest.fixture(scope="module")
def result() -> DemoResult:
    return run_demo(SMALL)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return base_weights(SMALL)


def row(result: DemoResult, stored: str) -> Row:
    return next(row for row in result.rows if row.stored == stored)


def test_every_stored_weight_has_a_row(result: DemoResult) -> None:
    assert tuple(row.stored for row in result.rows) == STORED


@pytest.mark.parametrize("stored", STORED)
def test_the_lora_beside_the_base_is_exact_and_leaves_the_base_alone(result: DemoResult, stored: str) -> None:
    ours = row(result, stored).ours
    assert 0 < ours.error <= 1e-6
    assert ours.base_unchanged
    assert min(ours.attach_seconds, ours.forward_seconds, ours.base_forward_seconds) > 0


@pytest.mark.parametrize("stored", OBSERVED)
def test_the_stock_like_error_is_of_the_observed_size(result: DemoResult, stored: str) -> None:
    lowest, highest = OBSERVED[stored]
    stock = row(result, stored).stock
    assert stock is not None
    assert lowest < stock.error < highest


@pytest.mark.parametrize("stored", OBSERVED)
def test_the_stock_like_merge_holds_ten_times_the_bytes_of_the_layer_in_bf16(
    result: DemoResult, stored: str
) -> None:
    largest = max(rows * columns for rows, columns in SMALL.linears.values())
    stock = row(result, stored).stock
    assert stock is not None
    assert 10 <= stock.transient_bytes / largest <= 20


def test_q4_k_is_refused_by_the_stock_like_merge_and_served_by_ours(result: DemoResult) -> None:
    refused = row(result, "Q4_K")
    assert (refused.stock, refused.refused) == (None, "no requantizer")
    assert "refused (no requantizer)" in demo_text(result)


def test_the_factors_are_counted_and_no_matrix_beside_them(result: DemoResult) -> None:
    factors = sum(2 * 16 * (rows + columns) for rows, columns in SMALL.linears.values())
    assert all(factors <= row.ours.extra_bytes <= factors + 32 * 2**20 for row in result.rows)


def test_fp16_keeps_its_own_limit() -> None:
    result = run_demo(SMALL, "fp16")
    assert result.limit == 1e-3
    assert all(1e-6 < row.ours.error <= 1e-3 for row in result.rows)
    assert result.findings == ()


def test_the_lora_has_the_norm_that_is_said(result: DemoResult) -> None:
    assert result.delta_ratio == pytest.approx(DELTA_RATIO, rel=1e-3)


def test_a_broken_law_is_a_finding(result: DemoResult) -> None:
    assert result.findings == ()
    strict = dataclasses.replace(result, limit=1e-12)
    assert len(strict.findings) == len(STORED)
    assert "FINDING  NF4" in demo_text(strict)
    nan = dataclasses.replace(result.rows[0].ours, error=float("nan"), base_unchanged=False)
    broken = dataclasses.replace(result, rows=(dataclasses.replace(result.rows[0], ours=nan),))
    assert len(broken.findings) == 2


def test_the_object_is_plain_json(result: DemoResult) -> None:
    parsed = json.loads(json.dumps(result.as_object(), allow_nan=False))
    assert [row["stored"] for row in parsed["rows"]] == list(STORED)
    assert parsed["rows"][2]["stock"]["error"] > 5


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_chart_is_written_in_the_format_of_its_name(
    result: DemoResult, tmp_path: Path, suffix: str
) -> None:
    pytest.importorskip("matplotlib", reason="pip install matplotlib, or make test, runs it")
    path = tmp_path / f"chart{suffix}"
    write_chart(result, path)
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


@pytest.mark.parametrize("stored", STORED)
def test_a_checkpoint_reads_back_as_its_own_library_decodes_it(
    weights: dict[str, Tensor], tmp_path: Path, stored: str
) -> None:
    path = tmp_path / f"base{FORMATS[stored].suffix}"
    FORMATS[stored].write(weights, path)
    model = build_model(FORMATS[stored].read(path))
    name = "single_blocks.0.linear2.weight"
    assert torch.equal(model.single_blocks[0].linear2.stored.dense(), library_decode(path, name, stored))
    assert {key for key, _ in model.named_parameters()} == set(weights)


def library_decode(path: Path, name: str, stored: str) -> Tensor:
    """fp32 by gguf, bitsandbytes (whose rows are whole blocks here) or torch, straight from the file."""
    if path.suffix == ".gguf":
        tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
        return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
    with safe_open(path, framework="pt") as file:
        values = file.get_tensor(name)
        if stored != "NF4":
            return values.float()
        parts = {key: file.get_tensor(f"{name}.{key}") for key in ("absmax", "quant_map")}
    shape = base_weights(SMALL)[name].shape
    state = bnb.QuantState(
        parts["absmax"], shape, parts["quant_map"], 64, quant_type="nf4", dtype=torch.float32
    )
    return decoded_by_bitsandbytes(values, state)


def subject(weights: dict[str, Tensor], folder: Path) -> Subject:
    save_file(weights, folder / "base.safetensors")
    save_file(lora_weights(weights), folder / "lora.safetensors")
    model = build_model(FORMATS["bf16"].read(folder / "base.safetensors"))
    lora = read_tensors(folder / "lora.safetensors")
    return Subject(model, lora, torch.randn(4, SMALL.hidden), torch.randn(SMALL.hidden))


def test_the_measured_error_sees_what_is_attached_and_nothing_else(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    demo = subject(weights, tmp_path)
    session = PatchSession(demo.model)
    with torch.no_grad():
        before = demo.forward()
        pairs = [(attached_delta(module), exact_delta(lora)) for module, lora in demo.linears()]
        assert relative_error(pairs) == 1.0
        demo.attach(session, "auto")
        assert not torch.equal(demo.forward(), before)
        pairs = [(attached_delta(module) / 2, exact_delta(lora)) for module, lora in demo.linears()]
        assert relative_error(pairs) == pytest.approx(0.5, rel=1e-5)
        session.clear()
        assert torch.equal(demo.forward(), before)


def test_the_fingerprint_sees_one_changed_byte_and_a_new_object(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    demo = subject(weights, tmp_path)
    module = demo.model.single_blocks[0].linear1
    before = fingerprint(demo.model)
    assert fingerprint(demo.model) == before
    kept = module.weight.data[0, 0].clone()
    module.weight.data[0, 0] += 1
    assert fingerprint(demo.model) != before
    module.weight.data[0, 0] = kept
    assert fingerprint(demo.model) == before
    module.weight = torch.nn.Parameter(module.weight.data.clone(), requires_grad=False)
    assert fingerprint(demo.model) != before


def test_the_stock_like_q8_0_turns_the_sign_of_every_tenth_blocks_largest_weight() -> None:
    merged = (torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.03).bfloat16()
    decoded = requantize_q8_0(merged)()
    turned = ((decoded * merged.float() < 0) & (decoded.abs() > 0.9 * merged.abs().float())).view(-1, 32)
    assert 0.08 < float(turned.any(dim=1).float().mean()) < 0.13


@pytest.mark.parametrize(("stored", "dequantize"), [("Q8_0", dequantize_q8_0), ("Q4_0", dequantize_q4_0)])
def test_the_stock_like_dequantizers_are_right_up_to_bf16(
    weights: dict[str, Tensor], tmp_path: Path, stored: str, dequantize: object
) -> None:
    FORMATS[stored].write(weights, tmp_path / "base.gguf")
    name = "single_blocks.0.linear1.weight"
    values = dequantize(FORMATS[stored].read(tmp_path / "base.gguf")[name])
    expected = library_decode(tmp_path / "base.gguf", name, stored)
    assert values.dtype == torch.bfloat16
    assert torch.allclose(values.float(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("stored", OBSERVED)
def test_a_stock_like_merge_of_nothing_stays_near_the_base(
    weights: dict[str, Tensor], tmp_path: Path, stored: str
) -> None:
    """The model's fault is in the LoRA's size, not in a wrong format: it returns the base within its step."""
    path = tmp_path / f"base{FORMATS[stored].suffix}"
    FORMATS[stored].write(weights, path)
    name = "single_blocks.0.linear1.weight"
    parameter = FORMATS[stored].read(path)[name]
    rows, columns = SMALL.linears[name.removesuffix(".weight")]
    nothing = make_lora("nothing", torch.zeros(rows, 1), torch.zeros(1, columns))
    merged = stock_like_merge(STOCK_FORMATS[stored], parameter, nothing)()
    base = library_decode(path, name, stored)
    tolerance = 1.0 if stored == "Q8_0" else 0.02
    assert float((merged - base).norm() / base.norm()) < tolerance
