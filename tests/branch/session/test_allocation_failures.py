"""Laws 1, 4 and 5 where memory runs out: whichever allocation fails, the former set stands as it stood."""

from __future__ import annotations

import re

import pytest
import torch

from lib_precision_lora.branch import PatchMemoryError, PatchSession
from lib_precision_lora.branch.forward.linear import LinearBranch
from tests.branch.hosts import SHAPES, Mixed, hooks_of, image_of
from tests.branch.patch_sets import Items, files_on, outputs, snapshot
from tests.families import family
from tests.no_memory import FOREVER, NoMemory

CARD = torch.device("cpu", 0)
"""Under a name that its tensors do not have, as `mps` and `cuda` without a number."""

FORMER: Items = files_on(["linear.weight", "register", "norm.weight", "linear.bias"])
FAMILIES = {
    "linear.weight": ("lora", "loha"),
    "second.weight": ("glora", "dora-in"),
    "conv.weight": ("dora-out",),
    "embedding.weight": ("lora",),
    "linear.bias": ("diff",),
    "norm.weight": ("diff",),
    "rms.scale": ("diff",),
    "register": ("lora",),
}
WANTED: Items = [
    (
        f"file {number}",
        {
            name: family(kinds[number], SHAPES[name]).adapter
            for name, kinds in FAMILIES.items()
            if number < len(kinds)
        },
        0.75,
    )
    for number in range(2)
]
CHANGED: Items = [(name, adapters, 0.25) for name, adapters, _ in FORMER]


def attach(session: PatchSession, wanted: Items) -> None:
    session.apply(wanted)
    session.place(CARD, torch.float32)


def allocations(former: Items, wanted: Items) -> tuple[int, int]:
    """How many operators allocate when the set is applied, and when it is applied and placed."""
    model = Mixed()
    session = PatchSession(model)
    if former:
        attach(session, former)
    with NoMemory() as memory:
        session.apply(wanted)
        applied = memory.allocations
        session.place(CARD, torch.float32)
    return applied, memory.allocations


@pytest.mark.parametrize(
    ("former", "wanted", "times", "least"),
    [
        ([], WANTED, 1, 150),
        (FORMER, WANTED, FOREVER, 150),
        (FORMER, CHANGED, 1, 15),
        (FORMER, CHANGED, FOREVER, 15),
    ],
    ids=[
        "nothing attached, once",
        "a set attached, from then on",
        "a change of strength, once",
        "a change of strength, from then on",
    ],
)
def test_memory_that_runs_out_at_any_allocation_leaves_the_former_set(
    former: Items, wanted: Items, times: int, least: int
) -> None:
    exact_model = Mixed()
    exact_session = PatchSession(exact_model)
    attach(exact_session, wanted)
    exact = outputs(exact_model)
    applied, total = allocations(former, wanted)
    assert total >= least
    for first in range(1, total + 1):
        model = Mixed()
        pristine = image_of(model)
        session = PatchSession(model)
        if former:
            attach(session, former)
        before = snapshot(model, session)
        with NoMemory(first, times) as memory:
            error = None
            try:
                attach(session, wanted)
            except PatchMemoryError as raised:
                error = str(raised)
        assert memory.failed
        assert error is not None
        assert re.search(r"layer [a-z.]+: no memory for its \d+ bytes of factors \(no room", error)
        if first <= applied:
            assert snapshot(model, session) == before
        attach(session, wanted)
        assert torch.equal(outputs(model), exact), "it works once memory is there"
        session.clear()
        assert image_of(model) == pristine
        assert hooks_of(model) == 0


def test_what_finds_no_memory_when_it_is_placed_falls_back_as_a_whole() -> None:
    """Factors would fill the card to the last byte otherwise, and leave nothing for activations."""
    model = Mixed()
    session = PatchSession(model)
    session.apply(WANTED)
    with NoMemory(1), pytest.raises(PatchMemoryError):
        session.place(CARD, torch.float32)
    assert session.streamed == ()
    assert session.placed_bytes == 0


def test_a_layer_that_finds_no_memory_in_a_forward_is_streamed() -> None:
    model = Mixed()
    session = PatchSession(model)
    session.apply(WANTED)
    session.place(CARD, torch.float32)
    session.release()
    branch = next(here.piece for here in session._attached.values() if isinstance(here.piece, LinearBranch))
    with NoMemory(1):
        branch.ready(CARD, torch.float32)
    assert len(session.streamed) == 1


def test_a_device_that_stays_full_holds_no_factors() -> None:
    model = Mixed()
    session = PatchSession(model)
    session.apply(WANTED)
    with (
        NoMemory(12, FOREVER),
        pytest.raises(PatchMemoryError, match=r"layer \w+: no memory for its \d+ bytes"),
    ):
        session.place(CARD, torch.float32)
    assert session.placed_bytes == 0


def test_forwards_find_what_was_placed_under_another_name_of_the_device() -> None:
    model = Mixed()
    session = PatchSession(model)
    attach(session, files_on(["linear.weight", "conv.weight"]))
    placed = [here.piece._operands for here in session._attached.values()]
    outputs(model)
    assert all(placed)
    assert all(
        mine is its.piece._operands for mine, its in zip(placed, session._attached.values(), strict=True)
    )


def test_an_embedding_whose_factors_stay_in_their_file_is_not_placed() -> None:
    model = Mixed()
    session = PatchSession(model)
    attach(session, files_on(["embedding.weight"]))
    assert session.placed_bytes == 0
