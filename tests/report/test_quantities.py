"""No amount that is there is shown as none."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_precision_lora.report.quantities import mebibytes

UNITS = {"MiB": 2**20, "KiB": 2**10, "bytes": 1}


@given(st.integers(0, 2**45) | st.integers(0, 2**20))
def test_an_amount_is_within_half_of_its_last_digit_and_zero_where_it_is_zero(nbytes: int) -> None:
    number, unit = mebibytes(nbytes).split(" ")
    step = 1 if unit == "bytes" else UNITS[unit] / 10
    assert abs(float(number) * UNITS[unit] - nbytes) <= 0.500001 * step
    assert (float(number) == 0) == (nbytes == 0)
    assert re.fullmatch(r"\d+(\.\d)?", number)


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [
        (0, "0.0 MiB"),
        (1, "1 bytes"),
        (51, "51 bytes"),
        (52, "0.1 KiB"),
        (24 * 2**10, "24.0 KiB"),
        (52_428, "51.2 KiB"),
        (52_429, "0.1 MiB"),
        (3 * 2**20, "3.0 MiB"),
        (5 * 2**30, "5120.0 MiB"),
    ],
)
def test_the_unit_is_the_largest_that_shows_something(nbytes: int, shown: str) -> None:
    assert mebibytes(nbytes) == shown
