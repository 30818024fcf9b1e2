"""The laws that hold for every stored format alike, against the format's own library."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib_precision_lora.storage import StorageError, StoredWeight, stored_weight
from lib_precision_lora.storage.blocks import BlockedWeight
from lib_precision_lora.storage.weight import plain
from tests.storage.formats import VARIANTS, StoredCase, stored_variant, stored_variants

ALIGNED, UNALIGNED = (12, 256), (64, 20)
SHAPES = pytest.mark.parametrize("shape", [ALIGNED, UNALIGNED], ids=["aligned", "unaligned"])
FORMATS = pytest.mark.parametrize("name", VARIANTS)


def matrix(shape: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03


CASES = {
    (name, shape): stored_variant(name, matrix(shape)) for name in VARIANTS for shape in (ALIGNED, UNALIGNED)
}


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def image(case: StoredCase) -> list[bytes]:
    """Every stored byte of a case: the parameter's, its statistics', its module's."""
    state = getattr(case.parameter, "quant_state", None)
    parts = [*case.parts, case.module.bias, *([] if state is None else [state.code])]
    return [plain(part).contiguous().flatten().view(torch.uint8).numpy().tobytes() for part in parts]


@FORMATS
@SHAPES
def test_dense_equals_the_librarys_decode_bit_for_bit(name: str, shape: tuple[int, int]) -> None:
    case = CASES[name, shape]
    weight = stored_weight(case.parameter, case.module)
    assert weight.shape == shape
    assert same_bits(weight.dense(), case.expected)
    assert weight.dense().std() > 0.01


@FORMATS
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_rows_equal_the_same_rows_of_dense(name: str, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([ALIGNED, UNALIGNED]))
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    case = CASES[name, shape]
    rows = stored_weight(case.parameter, case.module).rows(start, stop)
    assert rows.device == case.codes.device
    assert same_bits(rows, case.expected[start:stop])


@FORMATS
@SHAPES
def test_samples_of_rows_are_of_one_size_and_tell_two_weights_apart(
    name: str, shape: tuple[int, int]
) -> None:
    case, other = CASES[name, shape], stored_variant(name, matrix(shape, seed=2))
    weights = [stored_weight(each.parameter, each.module) for each in (case, case, other)]
    for row in (0, shape[0] // 2, shape[0] - 1):
        first, again, another = (weight.sample(row) for weight in weights)
        assert first.numel() == weights[0].sample(0).numel() > 0
        assert same_bits(first, again)
        assert float(first.double().sum()) != float(another.double().sum())


@FORMATS
@SHAPES
def test_row_blocks_and_single_rows_join_to_the_whole(name: str, shape: tuple[int, int]) -> None:
    case = CASES[name, shape]
    weight = stored_weight(case.parameter, case.module)
    for step in (1, 5):
        blocks = [weight.rows(at, min(at + step, shape[0])) for at in range(0, shape[0], step)]
        assert same_bits(torch.cat(blocks), case.expected)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_is_a_cast_after_the_fp32_decode(name: str, dtype: torch.dtype) -> None:
    case = CASES[name, ALIGNED]
    assert same_bits(
        stored_weight(case.parameter, case.module).rows(3, 7, dtype), case.expected[3:7].to(dtype)
    )


@FORMATS
@SHAPES
def test_reading_writes_nothing_and_results_are_independent(name: str, shape: tuple[int, int]) -> None:
    case = stored_variant(name, matrix(shape))
    before = image(case)
    weight = stored_weight(case.parameter, case.module)
    for values in (weight.rows(0, 1), weight.rows(2, 5), weight.dense(), weight.dense(torch.float64)):
        values.fill_(float("nan"))
    assert image(case) == before
    assert same_bits(weight.dense(), case.expected)


@FORMATS
def test_a_reference_is_held_not_a_copy(name: str) -> None:
    case = stored_variant(name, matrix(ALIGNED))
    weight = stored_weight(case.parameter, case.module)
    case.codes.flatten().view(torch.uint8).zero_()
    assert not same_bits(weight.dense(), case.expected)


@FORMATS
def test_values_depend_on_no_byte_outside_of_their_rows(name: str) -> None:
    case = stored_variant(name, matrix(ALIGNED))
    weight = stored_weight(case.parameter, case.module)
    case.row_bytes[:4] = 255
    case.row_bytes[7:] = 255
    assert same_bits(weight.rows(4, 7), case.expected[4:7])


@FORMATS
@SHAPES
def test_only_the_blocks_that_the_rows_touch_are_decoded(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name, shape]
    weight = stored_weight(case.parameter, case.module)
    if not isinstance(weight, BlockedWeight):
        assert (
            name.startswith(("dense", "fp8", "comfy", "one-buffer-int8"))
            or name.endswith(("unquantized", "forge"))
            or "F16" in name
            or "F32" in name
        )
        return
    decoded: list[int] = []
    original = type(weight).decode_blocks

    def counted(self: BlockedWeight, first: int, last: int) -> Tensor:
        decoded.extend(range(first, last))
        return original(self, first, last)

    monkeypatch.setattr(type(weight), "decode_blocks", counted)
    weight.rows(5, 7)
    touched = {value // weight.block_size for value in range(5 * shape[1], 7 * shape[1])}
    assert decoded == sorted(touched)


@FORMATS
@pytest.mark.parametrize("bounds", [(-1, 3), (0, 13), (5, 4), (13, 13)])
def test_rows_out_of_bounds_are_refused_with_the_numbers(name: str, bounds: tuple[int, int]) -> None:
    case = CASES[name, ALIGNED]
    weight = stored_weight(case.parameter, case.module)
    with pytest.raises(StorageError, match=rf"Rows {bounds[0]}:{bounds[1]} .* 12 rows .*ask for"):
        weight.rows(*bounds)


@FORMATS
def test_nbytes_counts_the_stored_bytes(name: str) -> None:
    case = CASES[name, ALIGNED]
    weight = stored_weight(case.parameter, case.module)
    assert weight.nbytes == sum(part.numel() * part.element_size() for part in case.parts)


@FORMATS
def test_kind_names_the_format(name: str) -> None:
    case = CASES[name, ALIGNED]
    same_kind = re.sub(r"-(by-row|nested|in-bf16|subclass|forge)$", "", name)
    same_kind = same_kind.removeprefix("comfy-")
    same_kind = same_kind.replace("one-buffer-int8", "int8").replace("one-buffer-", "bnb-")
    same_kind = re.sub(r"-baked-(fp16|bf16)$", "-baked", same_kind)
    renamed = {"gguf-F16": "dense-fp16"} if name == "gguf-F16-forge" else {}
    renamed |= {f"gguf-{key}-baked": f"gguf-{key}" for key in ("Q5_0", "Q6_K", "BF16")}
    assert stored_weight(case.parameter, case.module).kind == renamed.get(same_kind, same_kind)


def test_every_variant_of_one_matrix_is_built_and_read() -> None:
    cases = stored_variants(matrix((8, 64)))
    assert set(cases) == set(VARIANTS)
    assert len(cases) > 40
    for case in cases.values():
        weight = stored_weight(case.parameter, case.module)
        assert isinstance(weight, StoredWeight)
        x = torch.ones(2, 64)
        torch.testing.assert_close(case.module(x), x @ weight.dense().T + case.module.bias)
