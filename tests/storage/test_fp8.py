"""FP8 with and without the scale that Forge keeps beside it on the module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.storage import StorageError, stored_weight

FLOATS = pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32]
)


def module_with(weight: Tensor, scale: Tensor | None) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.bias = nn.Parameter(torch.ones(weight.shape[0]).to(weight.dtype), requires_grad=False)
    module.scale_weight = None if scale is None else nn.Parameter(scale, requires_grad=False)
    return module


@FLOATS
@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1), (6,), (6, 1)])
def test_scale_weight_multiplies_in_fp32(dtype: torch.dtype, scale_shape: tuple[int, ...]) -> None:
    scale = torch.rand(scale_shape) + 0.01
    module = module_with(torch.randn(6, 10).to(dtype), scale)
    column = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(1, 1)
    expected = module.weight.float() * column
    weight = stored_weight(module.weight, module)
    assert torch.equal(weight.dense(), expected)
    assert torch.equal(weight.rows(2, 5), expected[2:5])
    assert weight.kind.endswith("-scaled")


def test_a_scale_per_row_applies_to_conv_weights() -> None:
    scale = torch.rand(6)
    module = module_with(torch.randn(6, 4, 3, 3).to(torch.float8_e4m3fn), scale)
    expected = module.weight.float() * scale.view(6, 1, 1, 1)
    assert torch.equal(stored_weight(module.weight, module).rows(1, 4), expected[1:4])


def test_a_half_precision_scale_is_widened_before_it_multiplies() -> None:
    scale = torch.tensor(0.0123, dtype=torch.bfloat16)
    module = module_with(torch.randn(6, 10).to(torch.float8_e4m3fn), scale)
    assert torch.equal(stored_weight(module.weight, module).dense(), module.weight.float() * scale.float())


@FLOATS
def test_without_scale_weight_or_with_none_the_weight_is_plain(dtype: torch.dtype) -> None:
    module = module_with(torch.randn(6, 10).to(dtype), None)
    for owner in (module, nn.Linear(10, 6), None):
        weight = stored_weight(module.weight, owner)
        assert torch.equal(weight.dense(), module.weight.float())
        assert "scaled" not in weight.kind


@FLOATS
def test_the_bias_of_a_scaled_module_is_not_scaled(dtype: torch.dtype) -> None:
    module = module_with(torch.randn(6, 10).to(dtype), torch.tensor(3.0))
    assert torch.equal(stored_weight(module.bias, module).dense(), torch.ones(6))


@pytest.mark.parametrize("scale_shape", [(10,), (1, 10), (6, 10), (6, 2)])
def test_a_scale_that_fits_neither_tensor_nor_rows_is_refused(scale_shape: tuple[int, ...]) -> None:
    module = module_with(torch.randn(6, 10).to(torch.float8_e4m3fn), torch.rand(scale_shape))
    with pytest.raises(StorageError, match=r"scale_weight of shape .* \[6, 10\].*one per row"):
        stored_weight(module.weight, module)
