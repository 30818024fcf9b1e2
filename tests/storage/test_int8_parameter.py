"""Forge Neo's `ParameterInt8`: a weight that the host has quantized, in one buffer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib_precision_lora.storage import StorageError, stored_weight
from lib_precision_lora.storage.encode import unlabelled
from tests.storage.one_buffer import Int8Parameter, int8_in_one_buffer
from tests.storage.rotating_host import GROUP, RotatedInt8Parameter

HOSTS = pytest.mark.parametrize(
    ("host", "group", "kind"), [(Int8Parameter, 1, "int8"), (RotatedInt8Parameter, GROUP, "int8-convrot")]
)


def noise(rows: int, columns: int) -> Tensor:
    return 0.03 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@HOSTS
@pytest.mark.parametrize("shape", [(8, 16), (40, 64), (1, 4)])
def test_values_are_those_of_the_definition_and_bytes_those_of_the_buffer(
    host: type[Int8Parameter], group: int, kind: str, shape: tuple[int, int]
) -> None:
    parameter, expected = int8_in_one_buffer(noise(*shape), host, group)
    stored = stored_weight(parameter)
    assert (stored.kind, stored.shape) == (kind, shape)
    assert torch.equal(stored.dense(), expected)
    assert stored.nbytes == parameter.data.numel() == shape[0] * (shape[1] + 4)
    assert unlabelled(parameter) == "one-buffer int8"


def test_a_host_that_rotates_some_widths_alone_is_asked_for_each() -> None:
    parameter, expected = int8_in_one_buffer(noise(8, 18), RotatedInt8Parameter, 1)
    assert stored_weight(parameter).kind == "int8"
    assert torch.equal(stored_weight(parameter).dense(), expected)


@HOSTS
def test_a_buffer_of_another_size_is_refused_with_the_numbers(
    host: type[Int8Parameter], group: int, kind: str
) -> None:
    whole, _ = int8_in_one_buffer(noise(8, 16), host, group)
    cut = host(whole.data[:-4], **vars(whole))
    with pytest.raises(StorageError, match=r"int8 weight of shape \[8, 16\] .* does not take 156 bytes"):
        stored_weight(cut)
