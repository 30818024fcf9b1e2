"""Norms of a running weight in closed form, against the same norms in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.fake_card import CARD, fake_card
from lib_precision_lora.adapters.dora import DoRA
from lib_precision_lora.adapters.lora import make_lora
from lib_precision_lora.adapters.steps import Add
from lib_precision_lora.branch import EffectiveWeight
from lib_precision_lora.branch.algebra import norms
from lib_precision_lora.branch.algebra.low_rank_form import low_rank_form
from lib_precision_lora.branch.algebra.memo import Memo
from lib_precision_lora.branch.algebra.reading import Reader
from lib_precision_lora.branch.algebra.sketch import SketchedWeight
from lib_precision_lora.storage import stored_weight
from lib_precision_lora.storage.dense import DenseWeight
from lib_precision_lora.storage.gguf import gguf_weight
from tests.branch.meter import metered
from tests.branch.recipes import generator, noise
from tests.families import BASE_STD, family
from tests.oracles import Step, merge
from tests.storage.formats import VARIANTS, stored_variant

SHAPE = (64, 1024)
MIB = 2**20


def matrix(shape: tuple[int, ...] = SHAPE, seed: int = 1) -> Tensor:
    return BASE_STD * noise(shape, generator(seed))


def adds(shape: tuple[int, ...], size: float, seed: int = 2) -> Add:
    """A low-rank term of rank 16 whose Frobenius norm is about `size` times that of the base."""
    columns = math.prod(shape[1:])
    std = math.sqrt(size * BASE_STD / 4.0)
    up, down = std * noise((shape[0], 16), generator(seed)), std * noise((16, columns), generator(seed + 1))
    return Add(0, shape[0], make_lora("layer", up, down).term, 1.0)


def merged(base: Tensor, *terms: Add) -> Tensor:
    weight = base.double().flatten(1)
    for step in terms:
        weight = weight + step.scale * step.term.up.double() @ step.term.down.double()
    return weight


def identity(values: Tensor) -> EffectiveWeight:
    return EffectiveWeight.identity(stored_weight(nn.Parameter(values, requires_grad=False)))


@pytest.fixture
def closed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the whole weight was read")

    for name in ("row_squares", "column_squares"):
        monkeypatch.setattr(Reader, name, refuse)


@pytest.mark.usefixtures("closed_only")
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("stored", VARIANTS)
def test_a_norm_errs_by_less_than_a_millionth_of_what_is_added(stored: str, size: float, axis: str) -> None:
    """Δ is size · ‖W0‖; the change that a DoRA makes of a row is known to the error of its norm."""
    case, term = stored_variant(stored, matrix()), adds(SHAPE, size)
    running = EffectiveWeight.identity(stored_weight(case.parameter, case.module)).running(0, SHAPE[0])
    found = getattr(running, f"{axis}_squares")((term,)).sqrt()
    exact = merged(case.expected, term).square().sum(1 if axis == "row" else 0).sqrt()
    assert (found.dtype, found.shape) == (torch.float64, exact.shape)
    added = float((merged(case.expected, term) - case.expected.double()).norm())
    assert float((found - exact).norm()) <= 1e-7 * added


@pytest.mark.usefixtures("closed_only")
@pytest.mark.parametrize("shape", [(24, 16, 3, 3), (24, 40), (24, 8, 5)])
def test_scaled_rows_parts_and_several_terms_are_those_of_the_merged_weight(shape: tuple[int, ...]) -> None:
    base = matrix(shape)
    steps = [("lora", None, 0.7), ("dora-out", None, -0.5), ("ia3-out", (4, 12), 0.6), ("lora", (8, 16), 2.0)]
    weight, oracle = identity(base), []
    for seed, (name, rows, strength) in enumerate(steps):
        made = family(name, (rows[1] if rows else shape[0], *shape[1:]), seed)
        weight = weight.apply(made.adapter, strength, rows)
        oracle.append(Step(made.change, strength, rows))
    exact, _ = merge(base, oracle)
    for start, length in ((0, 24), (8, 16), (2, 5), (23, 1)):
        form = low_rank_form(weight.pieces, weight.steps, start, start + length)
        if form is None:
            assert length < 8 * 3  # more ranks than rows
            continue
        found = weight.running(start, length).row_squares()
        expected = exact.flatten(1)[start : start + length].square().sum(1)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("rest", [0.1, 1e-3, 1e-5])
def test_what_nearly_cancels_the_base_is_found_the_careful_way(axis: str, rest: float) -> None:
    """W0 of rank 8, and a term that leaves `rest` of it on every third row, or in every third column."""
    g = generator(5)
    shape = (64, 96)
    up, down = noise((shape[0], 8), g), noise((8, shape[1]), g)
    base = up @ down
    for kept, number in ((up, 0), (down.T, 1)):
        if (axis == "row") == (number == 0):
            kept[::3] *= 1.0 - rest
            kept[1::3] *= 0.5
    term = Add(0, shape[0], make_lora("layer", -up, down).term, 1.0)
    exact = merged(base, term).square().sum(1 if axis == "row" else 0)
    found = getattr(identity(base).running(0, shape[0]), f"{axis}_squares")((term,))
    torch.testing.assert_close(found.sqrt(), exact.sqrt(), rtol=1e-9, atol=0)
    form = low_rank_form(identity(base).pieces, (term,), 0, shape[0])
    assert form is not None
    unsafe, sure = norms.squares(form, axis, stored_weight(nn.Parameter(base)), 0, Memo(), "", "")
    assert not sure.view(-1)[::3].any()
    if rest < 1e-3:
        assert float((unsafe / exact - 1.0).abs().max()) > 1e-6, "the closed form alone would not do"


def test_rows_that_cancel_are_read_and_the_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    base, up = matrix((64, 96)), torch.zeros(64, 1)
    up[40] = -1.0
    down = base[40:41].clone()
    seen: list[tuple[int, int]] = []
    read = Reader.row_squares
    monkeypatch.setattr(
        Reader, "row_squares", lambda reader, *rows: (seen.append(rows), read(reader, *rows))[1]
    )
    term = Add(0, 64, make_lora("layer", up, down).term, 1.0 - 1e-4)
    found = identity(base).running(0, 64).row_squares((term,))
    assert seen == [(40, 41)]
    torch.testing.assert_close(found, merged(base, term).square().sum(1), rtol=1e-9, atol=0)


def test_a_dora_of_a_weight_that_nearly_cancels_keeps_law_2() -> None:
    g = generator(6)
    up, down = 0.1 * noise((64, 8), g), 0.1 * noise((8, 96), g)
    base = up @ down
    lora = make_lora("layer", (1e-3 - 1.0) * up, down)
    magnitude = base.norm(dim=1) * torch.linspace(0.2, 3.0, 64)
    delta = lora.up.double() @ lora.down.double()

    def change(weight: Tensor, strength: float) -> Tensor:
        moved = weight + delta
        return weight + strength * (moved * (magnitude.double() / moved.norm(dim=1))[:, None] - weight)

    weight = identity(base).apply(DoRA(lora, magnitude, "out"), 0.7)
    expected, size = merge(base, [Step(change, 0.7)])
    error = float((weight.delta(torch.float64) - (expected - base.double())).norm()) / size
    assert error <= 1e-6


@pytest.mark.parametrize("values", [0.0, float("inf")])
def test_a_row_of_zeros_has_none_and_one_that_is_not_finite_stays_so(values: float) -> None:
    base = matrix((8, 32))
    base[3] = values
    running = identity(base).running(0, 8)
    assert float(running.row_squares()[3]) == values
    others = [row for row in range(8) if row != 3]
    torch.testing.assert_close(
        running.row_squares()[others], base.double().square().sum(1)[others], rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", ["dora-out", "dora-in"])
@pytest.mark.parametrize("shape", [(3072, 3072), (12288, 768), (768, 12288)])
def test_reading_takes_what_is_predicted(name: str, shape: tuple[int, int]) -> None:
    """Below the prediction, and no further from it than law 4 allows."""
    stored = stored_weight(
        nn.Parameter(torch.full(shape, BASE_STD, dtype=torch.bfloat16), requires_grad=False)
    )
    made = family(name, shape).adapter
    sketch = SketchedWeight.identity(stored).apply(made, 1.0)
    assert isinstance(sketch, SketchedWeight)
    meter = metered(lambda: EffectiveWeight.identity(stored).apply(made, 1.0))
    predicted = sketch.reads.peak + sum(sketch.reads.kept.values())
    assert meter.operations > 10
    assert meter.peak <= predicted + MIB // 4
    assert predicted - meter.peak <= 32 * MIB


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a value of the card was asked for")


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("stored", ["gguf-Q8_0", "dense-bf16"])
def test_on_a_card_the_base_is_read_there_and_sums_alone_leave_it(
    stored: str, axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[tuple[int, ...]] = []
    copy = Tensor.cpu
    term = adds(SHAPE, 0.1)
    form = low_rank_form(identity(matrix()).pieces, (term,), 0, SHAPE[0])
    assert form is not None
    with fake_card():
        if stored == "dense-bf16":
            weight = DenseWeight(SHAPE, stored, torch.empty(SHAPE, dtype=torch.bfloat16, device=CARD))
        else:
            data = torch.empty(SHAPE[0] * SHAPE[1] // 32 * 34, dtype=torch.uint8, device=CARD)
            weight = gguf_weight(data, "Q8_0", SHAPE)
        monkeypatch.setattr(Tensor, "cpu", lambda tensor: (left.append(tuple(tensor.shape)), copy(tensor))[1])
        for name in ("item", "numpy", "tolist"):
            monkeypatch.setattr(Tensor, name, refuse)
        read = norms.row_reading if axis == "row" else norms.column_reading
        own, (crossed,) = read(weight, 0, SHAPE[0], form.terms)
    length = SHAPE[0] if axis == "row" else SHAPE[1]
    assert own.shape == crossed.shape == (length,)
    assert left == [(length,)] * 2
