"""bitsandbytes 4-bit weights, against their definition, which is held to bitsandbytes where that is right."""

from __future__ import annotations

import subprocess
import sys
from math import prod
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib_precision_lora.storage import StorageError, stored_weight
from tests.storage.formats import VARIANTS, stored_variant
from tests.storage.four_bit import (
    FP4_CODE,
    decoded_by_bitsandbytes,
    four_bit_values,
    install_wrong_bitsandbytes,
    nf4_code,
)

FOUR_BIT = [name for name in VARIANTS if name.startswith("bnb") and "unquantized" not in name]


def quantized(values: Tensor, **options: object) -> tuple[nn.Parameter, Tensor]:
    """A parameter that carries only `bnb_quantized` and `quant_state`, and what it stands for."""
    packed, state = bnb.quantize_4bit(values, **options)
    parameter = nn.Parameter(packed, requires_grad=False)
    parameter.bnb_quantized, parameter.quant_state = True, state
    return parameter, four_bit_values(packed, state)


@pytest.mark.parametrize(("quant_type", "code"), [("nf4", nf4_code()), ("fp4", FP4_CODE)])
def test_the_codes_are_those_of_the_definition(quant_type: str, code: list[float]) -> None:
    assert bnb.get_4bit_type(quant_type, device="cpu").tolist() == pytest.approx(code, abs=1e-6)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128, 256])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_definition_is_what_bitsandbytes_reads_where_rows_are_whole_blocks(
    quant_type: str, blocksize: int, nested: bool
) -> None:
    values = torch.randn(24, 768, generator=torch.Generator().manual_seed(7)) * 0.05
    packed, state = bnb.quantize_4bit(
        values, quant_type=quant_type, blocksize=blocksize, compress_statistics=nested
    )
    decoded = four_bit_values(packed, state)
    assert torch.equal(decoded, decoded_by_bitsandbytes(packed, state))
    assert float((decoded - values).norm() / values.norm()) < 0.2


@pytest.mark.parametrize("name", FOUR_BIT)
def test_no_expected_value_is_asked_of_a_bitsandbytes_that_decodes_wrongly(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(12, 80, generator=torch.Generator().manual_seed(8))
    expected = stored_variant(name, matrix).expected
    install_wrong_bitsandbytes(monkeypatch.setattr)
    case = stored_variant(name, matrix)
    wrong = bnb.dequantize_4bit(case.parameter.data, case.parameter.quant_state)
    assert float((wrong - expected).norm()) > 0.05 * float(expected.norm()), "the mock is wrong indeed"
    assert torch.equal(case.expected, expected)
    assert torch.equal(stored_weight(case.parameter, case.module).dense(), expected)


def test_the_wrong_decode_is_right_where_rows_are_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, state = bnb.quantize_4bit(torch.randn(12, 128), quant_type="nf4", blocksize=64)
    install_wrong_bitsandbytes(monkeypatch.setattr)
    assert torch.equal(decoded_by_bitsandbytes(packed, state), four_bit_values(packed, state))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 20), st.sampled_from([80, 96, 144, 192, 320])),
        st.tuples(st.integers(1, 40), st.integers(1, 150)),
        st.tuples(st.integers(1, 12), st.integers(1, 6), st.just(3), st.just(3)),
    ),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from([64, 128, 256, 512]),
    nested=st.booleans(),
    data=st.data(),
)
def test_any_shape_block_size_and_statistics_equal_the_definition_bit_for_bit(
    shape: tuple[int, ...], quant_type: str, blocksize: int, nested: bool, data: st.DataObject
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(prod(shape))) * 0.05
    parameter, expected = quantized(
        values, quant_type=quant_type, blocksize=blocksize, compress_statistics=nested
    )
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    weight = stored_weight(parameter)
    assert weight.shape == shape
    assert torch.equal(weight.dense(), expected)
    assert torch.equal(weight.rows(start, stop), expected[start:stop])


@pytest.mark.parametrize("storage", [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32])
def test_bytes_may_be_stored_in_another_type(storage: torch.dtype) -> None:
    parameter, expected = quantized(torch.randn(12, 80), quant_type="nf4", quant_storage=storage)
    assert parameter.dtype == storage
    assert torch.equal(stored_weight(parameter).rows(3, 8), expected[3:8])


@pytest.mark.parametrize("nested", [False, True])
def test_many_blocks_with_nested_statistics_are_read_from_the_middle(nested: bool) -> None:
    parameter, expected = quantized(torch.randn(700, 72), quant_type="nf4", compress_statistics=nested)
    assert torch.equal(stored_weight(parameter).rows(333, 334), expected[333:334])


def test_the_output_type_of_the_state_does_not_narrow_the_decode() -> None:
    values = torch.randn(12, 80)
    wide, expected = quantized(values, quant_type="nf4")
    wide.quant_state.dtype = torch.bfloat16
    assert torch.equal(stored_weight(wide).dense(), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_statistics_outside_of_the_rows_are_not_read(nested: bool) -> None:
    parameter, expected = quantized(torch.randn(1024, 64), quant_type="nf4", compress_statistics=nested)
    state = parameter.quant_state
    poisoned = state.state2.absmax if nested else state.absmax
    middle = poisoned.numel() // 2
    poisoned[:middle], poisoned[middle + 1 :] = float("nan"), float("nan")
    row = middle * (256 if nested else 1)
    assert torch.equal(stored_weight(parameter).rows(row, row + 1), expected[row : row + 1])


def test_a_parameter_not_yet_quantized_is_read_dense_and_then_quantized() -> None:
    values = torch.randn(8, 64).to(torch.float16)
    parameter = Params4bit(values, requires_grad=False, quant_type="nf4")
    assert not parameter.bnb_quantized
    before = stored_weight(parameter)
    assert (before.kind, before.shape) == ("bnb-nf4-unquantized", (8, 64))
    assert torch.equal(before.dense(), values.float())
    packed, state = bnb.quantize_4bit(values, quant_type="nf4")
    after = stored_weight(Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True))
    assert (after.kind, after.shape) == ("bnb-nf4", (8, 64))


def test_a_state_kept_on_the_module_is_found() -> None:
    parameter, expected = quantized(torch.randn(8, 64), quant_type="fp4")
    module = nn.Module()
    module.weight, module.quant_state, parameter.quant_state = parameter, parameter.quant_state, None
    assert torch.equal(stored_weight(parameter, module).dense(), expected)


def test_a_quantized_parameter_without_its_state_is_refused() -> None:
    parameter, _ = quantized(torch.randn(8, 64), quant_type="nf4")
    parameter.quant_state = None
    with pytest.raises(StorageError, match=r"no quant_state.*load the checkpoint again"):
        stored_weight(parameter, nn.Linear(64, 8))


def test_bytes_that_do_not_fit_the_state_are_refused_with_the_numbers() -> None:
    parameter, _ = quantized(torch.randn(8, 64), quant_type="nf4")
    parameter.data = parameter.data[:-1]
    with pytest.raises(StorageError, match=r"\[8, 64\] needs 256 bytes and 8 statistics .* holds 255 and 8"):
        stored_weight(parameter)


def test_a_transposed_view_of_packed_bytes_is_refused() -> None:
    parameter, _ = quantized(torch.randn(8, 64), quant_type="nf4")
    parameter.data = parameter.data.view(16, 16).T
    with pytest.raises(StorageError, match="not contiguous"):
        stored_weight(parameter)


def test_decoding_does_not_import_bitsandbytes_gguf_or_the_host() -> None:
    code = (
        "import sys; sys.modules['bitsandbytes'] = sys.modules['gguf'] = sys.modules['backend'] = None\n"
        "import torch; from types import SimpleNamespace as S\n"
        "from lib_precision_lora.storage import stored_weight\n"
        "p = torch.nn.Parameter(torch.full((32, 1), 0x1F, dtype=torch.uint8), requires_grad=False)\n"
        "p.bnb_quantized = True\n"
        "p.quant_state = S(shape=(1, 64), blocksize=64, absmax=torch.tensor([2.0]), nested=False,\n"
        "                  code=torch.arange(16.0), quant_type='nf4')\n"
        "assert stored_weight(p).dense().tolist() == [[2.0, 30.0] * 32]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
