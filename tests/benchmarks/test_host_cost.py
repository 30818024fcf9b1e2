"""benchmarks/host_cost.py times a call with a branch, in every type and mode."""

from __future__ import annotations

from benchmarks.host_cost import rows


def test_each_type_and_mode_is_timed_and_a_branch_costs_something() -> None:
    found = list(rows(calls=20, rounds=3))
    assert len({(name, compute) for name, compute, _, _ in found}) == len(found) == 9
    assert all(own > 0 and beyond > 0 for _, _, own, beyond in found)
