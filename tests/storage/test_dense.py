"""Dense weights of any number of dimensions, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_precision_lora.storage import StorageError, stored_weight


@pytest.mark.parametrize("shape", [(7,), (6, 5), (6, 5, 3), (6, 5, 3, 3), (6, 5, 1, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_vectors_linear_and_conv_weights_are_read_by_their_first_axis(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    parameter = nn.Parameter(torch.randn(shape).to(dtype))
    weight = stored_weight(parameter)
    assert weight.shape == shape
    assert torch.equal(weight.rows(2, 5), parameter.detach()[2:5].float())
    assert not weight.dense().requires_grad


def test_strides_of_any_order_are_read() -> None:
    parameter = nn.Parameter(torch.randn(5, 8, 3, 3).to(memory_format=torch.channels_last))
    assert torch.equal(stored_weight(parameter).rows(1, 4), parameter.detach()[1:4])
    assert torch.equal(
        stored_weight(parameter.detach()[0, :, :, 0].T).dense(), parameter.detach()[0, :, :, 0].T
    )


def test_a_row_range_may_be_empty() -> None:
    assert stored_weight(nn.Parameter(torch.randn(4, 3))).rows(4, 4).shape == (0, 3)


def test_a_scalar_is_refused() -> None:
    with pytest.raises(StorageError, match="scalar has no rows"):
        stored_weight(nn.Parameter(torch.tensor(4.6)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_an_unknown_layout_is_refused_by_name(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(4, 3, dtype=dtype), requires_grad=False)
    with pytest.raises(
        StorageError, match=rf"Parameter of {dtype} and shape \[4, 3\] in Linear .*load the checkpoint"
    ):
        stored_weight(parameter, nn.Linear(3, 4))
