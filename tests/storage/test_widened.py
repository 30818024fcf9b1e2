"""A widened weight is `[W0 | 0]` over the bytes of W0."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_precision_lora.storage import StorageError, stored_weight, widened
from tests.storage.formats import VARIANTS, stored_variant

MATRIX = torch.randn(24, 256, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", VARIANTS)
def test_any_rows_are_those_of_the_stored_weight_and_zeros(name: str) -> None:
    case = stored_variant(name, MATRIX)
    own = stored_weight(case.parameter, case.module)
    wide = widened(own, 300)
    expected = torch.cat([case.expected, torch.zeros(24, 44)], dim=1)
    assert (wide.shape, wide.kind, wide.nbytes) == ((24, 300), own.kind, own.nbytes)
    assert torch.equal(wide.dense(), expected.float())
    for start, stop in ((0, 1), (7, 20), (23, 24), (5, 5)):
        assert torch.equal(wide.rows(start, stop, torch.float64), expected[start:stop].double())
    with pytest.raises(StorageError, match="24 rows"):
        wide.rows(20, 25)


def test_a_kernel_is_widened_in_its_channels_alone() -> None:
    weight = torch.randn(6, 4, 3, 2)
    wide = widened(stored_weight(nn.Parameter(weight)), 7)
    assert wide.shape == (6, 7, 3, 2)
    assert torch.equal(wide.dense()[:, :4], weight)
    assert not wide.dense()[:, 4:].any()


def test_the_widest_counts_and_a_weight_that_is_wide_enough_is_itself() -> None:
    own = stored_weight(nn.Parameter(MATRIX))
    assert widened(own, 256) is own
    assert widened(own, 100) is own
    wide = widened(own, 300)
    assert widened(wide, 290) is wide
    assert torch.equal(widened(wide, 310).dense(), widened(own, 310).dense())
