"""Long work says how far it has come, and can be given up anywhere: everything is then as it was."""

from __future__ import annotations

import pytest
import torch

from lib_precision_lora.adapters import read_adapters
from lib_precision_lora.branch import DensePolicy, Patch, PatchSession
from lib_precision_lora.branch.algebra.effective import RunningRows
from lib_precision_lora.branch.session.patch import resolve
from tests.branch.hosts import SHAPES, Mixed, hooks_of
from tests.branch.patch_sets import EVERYTHING, Items, files_on, outputs, snapshot
from tests.families import family

CPU = torch.device("cpu")
FORMER: Items = files_on(["linear.weight", "register", "conv.weight", "norm.weight"])
MATRICES = ("linear.weight", "second.weight", "conv.weight")
DORA: Items = [("dora", {name: family("dora-out", SHAPES[name]).adapter for name in MATRICES}, 1.0)]


class GivenUp(Exception):
    pass


class Ticks:
    """Hears every tick; gives up at the one of this number, counted from 0."""

    def __init__(self, last: int | None = None) -> None:
        self.heard: list[tuple[int, int]] = []
        self.last = last

    def __call__(self, done: int, total: int) -> None:
        self.heard.append((done, total))
        if len(self.heard) - 1 == self.last:
            raise GivenUp


def patches_of(model: Mixed, items: Items) -> list[Patch]:
    return resolve(model, items)[0]


@pytest.mark.parametrize("items", [EVERYTHING, DORA, [*FORMER, *DORA]])
def test_ticks_count_from_none_towards_all(items: Items) -> None:
    model, ticks = Mixed(), Ticks()
    PatchSession(model).apply_patches(patches_of(model, items), tick=ticks)
    done, totals = zip(*ticks.heard, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == list(range(len(done)))
    assert len(done) <= totals[0]
    assert len(done) > 2 * len(patches_of(model, items)), "a tick for each patch, and for each place"


@pytest.mark.parametrize("dense", ["branch", "merge"])
@pytest.mark.parametrize("former", [[], FORMER], ids=["nothing attached", "a set attached"])
@pytest.mark.parametrize("wanted", [EVERYTHING, DORA, files_on(list(SHAPES), -0.5, kind=3)])
def test_given_up_at_any_tick_everything_is_as_it_was(
    former: Items, wanted: Items, dense: DensePolicy
) -> None:
    model = Mixed()
    session = PatchSession(model)
    session.apply(former, dense=dense)
    before = snapshot(model, session)
    patches, given_up = patches_of(model, wanted), 0
    while True:
        try:
            session.apply_patches(patches, dense=dense, tick=Ticks(given_up))
            break
        except GivenUp:
            given_up += 1
        assert snapshot(model, session) == before
    assert given_up > len(patches)
    untouched, other = Mixed(), PatchSession(after := Mixed())
    other.apply_patches(patches_of(after, wanted), dense=dense)
    assert torch.equal(outputs(model), outputs(after))
    session.clear()
    assert hooks_of(model) == 0
    assert torch.equal(outputs(model), outputs(untouched))


def test_norms_that_were_read_before_it_was_given_up_are_not_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[tuple[int, ...]] = []
    squares = RunningRows.row_squares

    def counting(rows: RunningRows, *args: object) -> torch.Tensor:
        read.append(rows.shape)
        return squares(rows, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(RunningRows, "row_squares", counting)
    model = Mixed()
    patches = patches_of(model, DORA)
    for layer in (0, 1, 2):
        session = PatchSession(model)
        read.clear()
        with pytest.raises(GivenUp):
            session.apply_patches(patches, tick=Ticks(layer))
        assert len(read) == layer, "one layer, at most, from one tick to the next"
        session.apply_patches(patches)
        assert len(read) == len(MATRICES)
        session.clear()


@pytest.mark.parametrize("last", range(3))
def test_factors_whose_placing_was_given_up_are_placed_by_their_forward(last: int) -> None:
    model, ticks = Mixed(), Ticks(last)
    session = PatchSession(model)
    session.apply(DORA)
    with pytest.raises(GivenUp):
        session.place(CPU, torch.float32, tick=ticks)
    assert ticks.heard == [(done, len(MATRICES)) for done in range(last + 1)]
    assert bool(session.placed_bytes) is (last > 0)
    result = outputs(model)
    session.place(CPU, torch.float32)
    assert torch.equal(outputs(model), result)


def test_every_module_of_a_file_is_a_tick_of_its_reading() -> None:
    file = {
        f"layer_{number}.{name}": torch.ones(shape)
        for number in range(4)
        for name, shape in (("lora_up.weight", (6, 2)), ("lora_down.weight", (2, 5)))
    }
    ticks = Ticks()
    assert len(read_adapters(file, tick=ticks)) == 4
    assert ticks.heard == [(done, 4) for done in range(4)]
    with pytest.raises(GivenUp):
        read_adapters(file, tick=Ticks(2))
