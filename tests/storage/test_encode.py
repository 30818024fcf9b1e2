"""Encoding, the inverse of decoding: what is written decodes, by the format's own library, to the nearest
values that the format has."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib_precision_lora.storage import Encoded, StorageError, encode, stored_weight
from tests.storage.formats import (
    DENSE,
    FP8,
    VARIANTS,
    StoredCase,
    StoredLinear,
    stored_variant,
)
from tests.storage.four_bit import decoded_by_bitsandbytes, four_bit_values
from tests.storage.quantized_tensors import doubles, turned_doubles

FORMATS = pytest.mark.parametrize("name", VARIANTS)
FOUR_BIT = [name for name in VARIANTS if name.startswith("bnb") and "unquantized" not in name]
SCALED = [name for name in VARIANTS if "scaled" in name and not name.startswith("comfy")]
TENSORS = [name for name in VARIANTS if name.startswith("comfy")]
SHAPE = (12, 256)


def noise(*shape: int, std: float, seed: int) -> Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example(name: str) -> tuple[StoredCase, Tensor]:
    """A stored weight, and fp64 values that are it and a change."""
    case = stored_variant(name, noise(*SHAPE, std=0.03, seed=1).float())
    return case, case.expected.double() + noise(*SHAPE, std=0.004, seed=2)


def encoded(case: StoredCase, values: Tensor) -> Encoded:
    return encode(case.module, "weight", case.parameter, values)


def element_type(name: str) -> torch.dtype:
    """In which a format without blocks is written; GGUF in its layer's compute type."""
    if name.startswith(("gguf", "one-buffer")):
        own = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        compute = torch.bfloat16 if name.endswith("bf16") else torch.float16
        return own.get(name.split("-")[1], compute)
    return {**DENSE, **FP8}.get(name.split("-")[1], torch.float16)


def every_value(dtype: torch.dtype) -> Tensor:
    """The finite values of an 8-bit type, ascending, in fp64."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return values[values.isfinite()].unique()


def nearest_of(table: Tensor, values: Tensor) -> Tensor:
    distances = (values.reshape(-1, 1) - table).abs()
    return table[distances.argmin(1)].view(values.shape)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in (*FOUR_BIT, *SCALED, *TENSORS)])
def test_formats_without_a_scale_hold_one_rounding_of_the_values(name: str) -> None:
    case, values = example(name)
    result = encoded(case, values)
    assert list(result.entries) == ["weight"]
    written = result.entries["weight"]
    assert written.dtype == element_type(name)
    expected = values.to(written.dtype)
    if written.dtype in FP8.values():
        expected = nearest_of(every_value(written.dtype), values)
    assert torch.equal(written.double(), expected.double())
    assert torch.equal(result.weight.dense(), expected.float())


@pytest.mark.parametrize("name", SCALED)
def test_within_its_range_a_scale_stays_and_its_nearest_multiple_is_written(name: str) -> None:
    case, values = example(name)
    result = encoded(case, values)
    assert list(result.entries) == ["weight"]
    written, scale = result.entries["weight"], case.module.scale_weight.double()
    quotient = values / scale
    expected = quotient.to(written.dtype).double()
    if written.dtype in FP8.values():
        expected = nearest_of(every_value(written.dtype), quotient)
    assert torch.equal(written.double(), expected)
    torch.testing.assert_close(result.weight.dense(torch.float64), expected * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [*FP8.values(), torch.float16])
@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1), (4,), (4, 1)])
@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16])
def test_where_values_leave_its_range_a_larger_scale_is_written(
    dtype: torch.dtype, scale_shape: tuple[int, ...], scale_type: torch.dtype
) -> None:
    limit = torch.finfo(dtype).max
    scale = torch.full(scale_shape, 1e-3).to(scale_type)
    module = StoredLinear(torch.ones(4, 8).to(dtype), torch.ones(4, 8), scale)
    values = noise(4, 8, std=1e-3, seed=3)
    values[1, 2], values[3, 5] = 7e-3 * limit, -1e-3 * limit * 0.9
    result = encode(module, "weight", module.weight, values)
    assert set(result.entries) == {"weight", "scale_weight"}
    new = result.entries["scale_weight"]
    assert (new.dtype, new.shape) == (scale_type, scale.shape)
    rows = new.double().reshape(-1, 1).expand(4 if new.numel() > 1 else 1, 1)
    decoded = result.entries["weight"].double() * rows
    assert decoded.isfinite().all()
    assert float(decoded[1, 2]) == pytest.approx(float(values[1, 2]), rel=4e-3)
    if new.numel() > 1:
        kept = [0, 2, 3]
        assert torch.equal(new.reshape(-1)[kept], scale.reshape(-1)[kept]), "rows that fit keep their scale"
    assert torch.equal(result.weight.dense(), decoded.float())
    assert torch.equal(module.scale_weight, scale), "the host's own is not written"


def test_a_row_of_zeros_under_a_scale_of_zero_stays_zero() -> None:
    module = StoredLinear(
        torch.zeros(2, 4).to(torch.float8_e4m3fn), torch.zeros(2, 4), torch.tensor([0.0, 0.5])
    )
    result = encode(module, "weight", module.weight, torch.tensor([[0.0] * 4, [1.0] * 4]))
    assert result.weight.dense().tolist() == [[0.0] * 4, [1.0] * 4]
    assert list(result.entries) == ["weight"]


def test_the_bias_of_a_scaled_layer_is_not_scaled() -> None:
    case, _ = example("fp8-e4m3fn-scaled")
    values = torch.linspace(-2.0, 2.0, SHAPE[0])
    result = encode(case.module, "bias", case.module.bias, values)
    assert torch.equal(result.entries["bias"], values)


@pytest.mark.parametrize("name", FOUR_BIT)
def test_4_bit_values_are_at_least_as_near_as_those_of_bitsandbytes(name: str) -> None:
    case, values = example(name)
    state = case.parameter.quant_state
    result = encoded(case, values)
    packed, reference = bnb.quantize_4bit(
        values.float(),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=case.parameter.dtype,
    )
    theirs = reference.as_dict(packed=True)
    assert result.entries.keys() == {"weight", *(f"weight.{key}" for key in theirs)}
    for key, value in theirs.items():
        written = result.entries[f"weight.{key}"]
        assert (written.dtype, written.shape) == (value.dtype, value.shape) or "quant_state" in key
    written = result.entries["weight"]
    assert (written.dtype, written.shape) == (packed.dtype, packed.shape)
    error = (result.weight.dense(torch.float64) - values).norm()
    limit = (four_bit_values(packed, reference).double() - values).norm()
    assert float(error) <= float(limit) * (1 + 1e-6)
    if not state.nested:
        assert torch.equal(result.entries["weight.absmax"], theirs["absmax"])
        same = written.view(torch.uint8) == packed.view(torch.uint8)
        assert float(same.double().mean()) > 0.999


@pytest.mark.parametrize("name", FOUR_BIT)
def test_bitsandbytes_reads_the_entries_as_we_do(name: str) -> None:
    case, values = example(name)
    result = encoded(case, values)
    entries = {key.removeprefix("weight."): value for key, value in result.entries.items() if key != "weight"}
    state = bnb.QuantState.from_dict(entries, device=torch.device("cpu"))
    assert tuple(state.shape) == SHAPE
    assert torch.equal(decoded_by_bitsandbytes(result.entries["weight"], state), result.weight.dense())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 150)),
        st.tuples(st.integers(1, 12), st.integers(1, 6), st.just(3), st.just(3)),
    ),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from([64, 128, 256]),
    nested=st.booleans(),
)
def test_any_4_bit_shape_and_block_size_is_as_near_as_bitsandbytes(
    shape: tuple[int, ...], quant_type: str, blocksize: int, nested: bool
) -> None:
    options = {"quant_type": quant_type, "blocksize": blocksize, "compress_statistics": nested}
    first = noise(*shape, std=0.05, seed=4).float()
    values = noise(*shape, std=0.05, seed=5).float()
    values.view(-1)[: values.numel() // 3] = 0.0
    module = nn.Module()
    packed, state = bnb.quantize_4bit(first, **options)
    module.weight = nn.Parameter(packed, requires_grad=False)
    module.weight.bnb_quantized, module.weight.quant_state = True, state
    result = encode(module, "weight", module.weight, values)
    assert result.entries["weight"].shape == packed.shape
    decoded = result.weight.dense()
    assert decoded.isfinite().all()
    expected = four_bit_values(*bnb.quantize_4bit(values, **options))
    tie = 2e-3 if nested else 1e-5  # a statistic in the middle of two codes may become either
    assert float((decoded - values).norm()) <= float((expected - values).norm()) * (1 + tie) + 1e-7


@FORMATS
def test_encoding_writes_nothing_of_the_base_and_shares_no_memory_with_it(name: str) -> None:
    case, values = example(name)
    given_values = values.clone()
    result = encoded(case, values)
    result.entries["weight"].view(torch.uint8).fill_(0)
    for entry in result.entries.values():
        entry.view(-1).view(torch.uint8).zero_()
    assert torch.equal(values, given_values)
    assert torch.equal(stored_weight(case.parameter, case.module).dense(), case.expected)


@FORMATS
def test_what_decodes_exactly_is_written_as_it_was(name: str) -> None:
    case, _ = example(name)
    if name.startswith(("gguf", "one-buffer")) or "nested" in name:
        largest = float(case.expected.abs().max())
        error = encoded(case, case.expected).weight.dense() - case.expected
        assert float(error.abs().max()) <= largest * (0.02 if name.startswith("bnb") else 2**-8)
        return
    result = encoded(case, case.expected)
    assert torch.equal(result.weight.dense(), case.expected)
    if name not in ("bnb-fp4", "comfy-mxfp8"):  # two zeros; some blocks by two powers of two
        written = result.entries["weight"]
        assert torch.equal(written.view(torch.uint8), case.codes.view(torch.uint8))


@pytest.mark.parametrize(
    "name",
    ["dense-bf16", "fp8-e4m3fn-scaled-by-row", "bnb-nf4", "bnb-nf4-nested"]
    + [name for name in TENSORS if "convrot" not in name],
)
def test_a_wider_weight_takes_the_format_of_the_stored_one(name: str) -> None:
    case, _ = example(name)
    values = noise(SHAPE[0], 384, std=0.03, seed=6)
    result = encoded(case, values)
    assert result.weight.shape == (SHAPE[0], 384)
    assert result.weight.kind == stored_weight(case.parameter, case.module).kind
    assert float((result.weight.dense(torch.float64) - values).norm() / values.norm()) < 0.15
    if name.startswith("bnb"):
        entries = {key[7:]: value for key, value in result.entries.items() if key != "weight"}
        state = bnb.QuantState.from_dict(entries, device=torch.device("cpu"))
        assert torch.equal(four_bit_values(result.entries["weight"], state), result.weight.dense())


@FORMATS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    case, values = example(name)
    values[3, 17] = bad
    with pytest.raises(StorageError, match="lower the strengths"):
        encoded(case, values)


@pytest.mark.parametrize("name", TENSORS)
def test_a_quantized_tensor_is_written_under_the_names_types_and_shapes_of_its_host(name: str) -> None:
    case, values = example(name)
    result = encoded(case, values)
    params = case.parameter._params
    own = {"weight": case.codes, "weight_scale": params.scale}
    if params.block_scale is not None:
        own |= {"weight_scale": params.block_scale, "weight_scale_2": params.scale}
    assert {"weight"} <= set(result.entries) <= set(own)
    for key, entry in result.entries.items():
        assert (entry.dtype, entry.shape) == (own[key].dtype, own[key].shape)


@pytest.mark.parametrize("name", [name for name in TENSORS if "fp4" not in name and "mxfp8" not in name])
def test_the_nearest_multiples_of_a_quantized_tensors_scale_are_written(name: str) -> None:
    """In the rotated basis, where it has one."""
    case, values = example(name)
    result = encoded(case, values)
    params = case.parameter._params
    scale = result.entries.get("weight_scale", params.scale).double()
    scale = scale if scale.dim() == 0 else scale.reshape(-1, 1)
    group = params.convrot_groupsize if "convrot" in name else 1
    basis = values if group == 1 else torch.from_numpy(turned_doubles(doubles(values), group))
    if "fp8" in name:
        expected = nearest_of(every_value(case.codes.dtype), basis / scale) * scale
    else:
        most = 7 if "int4" in name else 127
        expected = (basis / scale).round().clamp(-most, most) * scale
    if group > 1:
        expected = torch.from_numpy(turned_doubles(doubles(expected), group))
    torch.testing.assert_close(result.weight.dense(torch.float64), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "most"), [("comfy-nvfp4", 17 / 96), ("comfy-mxfp8", 1 / 16)])
def test_no_value_of_a_block_is_further_off_than_half_of_its_largest_step(name: str, most: float) -> None:
    """E2M1 ends at 4 and 6, and its scale is off by up to 1/16; E4M3 has steps of 1/8 of a power of two."""
    case, values = example(name)
    error = (encoded(case, values).weight.dense(torch.float64) - values).abs()
    blocks = (SHAPE[0], -1, 32 if name == "comfy-mxfp8" else 16)
    largest = values.view(blocks).abs().amax(2, keepdim=True)
    assert 0.0 < float((error.view(blocks) / largest).max()) <= most


@pytest.mark.parametrize("name", TENSORS)
def test_of_a_quantized_tensor_a_larger_scale_is_written_where_values_leave_its_range(name: str) -> None:
    case, values = example(name)
    values[3] *= 50
    result = encoded(case, values)
    scale = "weight_scale_2" if name == "comfy-nvfp4" else "weight_scale"
    assert scale in result.entries
    error = (result.weight.dense(torch.float64) - values)[3]
    assert float(error.norm() / values[3].norm()) < 0.2


@pytest.mark.parametrize("name", [name for name in TENSORS if "convrot" in name])
def test_columns_that_no_rotation_fits_are_refused(name: str) -> None:
    case, _ = example(name)
    with pytest.raises(StorageError, match=r"its 300 columns are no multiple of the 256"):
        encoded(case, noise(SHAPE[0], 300, std=0.03, seed=6))


@pytest.mark.parametrize(
    ("name", "largest"),
    [("fp8-e4m3fn", 449.0), ("fp8-e5m2", 6e4), ("dense-fp16", 7e4), ("gguf-Q8_0", 7e4)],
)
def test_values_beyond_the_range_are_refused_with_the_numbers(name: str, largest: float) -> None:
    case, values = example(name)
    values[3, 17] = -largest
    kind = {"fp8-e4m3fn": "fp8-e4m3fn", "fp8-e5m2": "fp8-e5m2"}.get(name, "fp16")
    with pytest.raises(StorageError, match=rf"largest value would be .*{kind} ends at .*wider type"):
        encoded(case, values)
