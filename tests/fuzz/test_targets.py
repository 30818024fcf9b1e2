"""A few inputs of every target: the same for the same seed, some accepted, some refused, no fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fuzz.run import run
from tests.fuzz.targets import INPUTS, target

FEW = 60
SEED = 7
LEAST = 20_000
"""Inputs of a whole run."""


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_target_has_a_module_and_together_they_are_many() -> None:
    modules = {path.stem for path in (Path(__file__).parent / "targets").glob("*.py")}
    assert INPUTS.keys() <= modules
    assert all(target(name).name == name for name in INPUTS)
    assert sum(INPUTS.values()) >= LEAST


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_depend_on_the_seed_and_the_number_alone(name: str) -> None:
    made, again = (
        [repr(target(name).input(SEED, index)) for index in numbers]
        for numbers in (range(20), reversed(range(20)))
    )
    assert made == list(reversed(again))
    assert len(set(made)) > 10
    assert repr(target(name).input(SEED + 1, 3)) != made[3]


@pytest.mark.parametrize("name", INPUTS)
def test_a_few_inputs_show_no_fault(name: str) -> None:
    result = run(target(name), SEED, range(FEW))
    assert [found.command for found in result.faults] == [], result.faults[0].trace
    assert result.tried == FEW
    assert result.accepted > 0
    assert result.refused > 0
