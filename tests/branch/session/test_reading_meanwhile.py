"""What a session says is asked by other threads than the one that attaches: a page, a client of the API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import LoRA
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.forward.norm import NormBranch
from lib_precision_lora.branch.forward.weight_branch import WeightBranch

LAYERS = 3
CPU = torch.device("cpu")


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(LAYERS)))


@pytest.fixture
def session(model: nn.Sequential) -> PatchSession:
    """With a branch on every layer, placed."""
    adapters = {f"{number}.weight": LoRA(torch.ones(4, 2), torch.ones(2, 4), 1.0) for number in range(LAYERS)}
    session = PatchSession(model)
    session.apply([("cats", adapters, 1.0)])
    session.place(CPU, torch.float32)
    return session


READINGS: dict[str, Callable[[PatchSession], object]] = {
    "placed": lambda session: session.placed_sizes,
    "streamed": lambda session: session.streamed_sizes,
    "bytes": lambda session: session.placed_bytes,
}


def meanwhile(patch: pytest.MonkeyPatch, change: Callable[[], None]) -> list[str]:
    """The change comes once, between the first branch that is read and the second; grows when it has come."""
    placed, changed = WeightBranch.placed, []

    def reading(branch: WeightBranch) -> Iterator[Tensor]:
        yield from list(placed(branch))
        if not changed:
            changed.append("once")
            change()

    patch.setattr(WeightBranch, "placed", reading)
    return changed


@pytest.mark.parametrize("reading", READINGS)
def test_sizes_are_read_while_another_thread_takes_off_and_attaches(
    session: PatchSession, monkeypatch: pytest.MonkeyPatch, reading: str
) -> None:
    if reading == "streamed":
        session.place(CPU, torch.float32, resident=frozenset())
    before = READINGS[reading](session)
    changed = meanwhile(monkeypatch, session.clear)
    assert READINGS[reading](session) == before, "as it was when the reading began"
    assert changed
    assert READINGS[reading](session) in ((), 0)


@pytest.mark.parametrize("placed", [{"0"}, frozenset()])
def test_names_are_those_of_one_moment(session: PatchSession, placed: set[str]) -> None:
    session.place(CPU, torch.float32, resident=placed)
    assert set(session.streamed) == {"0", "1", "2"} - set(placed)
    assert session.merged == ()


def once(value: Any) -> property:
    """An attribute that another thread sets to None after it was read for the first time."""
    left = [value]
    return property(lambda _: left.pop() if left else None)


def test_a_branch_is_released_while_its_tensors_are_read(
    session: PatchSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = session._attached["0"].piece
    assert isinstance(branch, WeightBranch)
    whole = list(branch.placed())
    assert whole
    monkeypatch.setattr(WeightBranch, "_stack", once(branch._stack), raising=False)
    assert list(map(id, branch.placed())) == list(map(id, whole))
    assert len(list(branch.placed())) < len(whole), "it is gone"


def test_a_norms_branch_is_released_while_its_tensors_are_read() -> None:
    class Vector:
        placed = once(torch.ones(4))

    branch: Any = NormBranch(None, None)
    branch.weight = Vector()
    (tensor,) = branch.placed()
    assert isinstance(tensor, Tensor)
    assert list(branch.placed()) == [], "it is gone"
