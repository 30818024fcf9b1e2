"""Forge Neo's `ParameterNF4`: bitsandbytes' 4-bit weight in one buffer."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.storage import StorageError, stored_weight
from tests.storage.four_bit import four_bit_values
from tests.storage.one_buffer import OneBufferParameter, in_one_buffer


def quantized(shape: tuple[int, ...], nested: bool = False, blocksize: int = 64) -> tuple[Tensor, Any]:
    values = 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return bnb.quantize_4bit(values, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(12, 256), (3, 7), (5, 131), (4, 3, 3, 3)])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_values_are_those_of_the_same_weight_in_its_parts(
    shape: tuple[int, ...], nested: bool, blocksize: int
) -> None:
    """Codes and packed statistics of any length: what follows begins at a multiple of 4 bytes."""
    packed, state = quantized(shape, nested, blocksize)
    parameter = in_one_buffer(packed, state)
    stored = stored_weight(parameter)
    assert torch.equal(stored.dense(), four_bit_values(packed, state))
    assert stored.shape == shape
    assert stored.kind == "bnb-nf4"
    assert stored.nbytes == parameter.data.numel()


def test_without_a_type_it_is_nf4() -> None:
    packed, state = quantized((12, 256))
    assert stored_weight(in_one_buffer(packed, state, quant_type=False)).kind == "bnb-nf4"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("missing", [1, 200])
def test_a_buffer_that_is_too_small_is_refused_with_the_numbers(nested: bool, missing: int) -> None:
    packed, state = quantized((12, 256), nested)
    whole = in_one_buffer(packed, state)
    cut = OneBufferParameter(whole.data[:-missing], **vars(whole))
    with pytest.raises(StorageError, match=rf"\[12, 256\] in one buffer .* {whole.data.numel() - missing};"):
        stored_weight(cut)


def test_fewer_codes_than_values_are_refused() -> None:
    packed, state = quantized((12, 256))
    parameter = in_one_buffer(packed, state)
    parameter.packed_bytes -= 1
    with pytest.raises(StorageError, match="needs 1536 bytes of codes"):
        stored_weight(parameter)


def test_its_bias_is_an_ordinary_parameter() -> None:
    module = nn.Module()
    module.weight, module.bias = in_one_buffer(*quantized((12, 256))), nn.Parameter(torch.ones(12))
    assert stored_weight(module.bias, module).kind == "dense-fp32"
