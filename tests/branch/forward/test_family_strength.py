"""What a change of strengths reads again: nothing, but the norms that it changes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.algebra import norms
from lib_precision_lora.branch.algebra.reading import Reader
from tests.families import BASE_STD, FAMILIES, Family, family
from tests.oracles import Step, merge

SHAPE = (16, 64)
KERNEL = (16, 8, 3, 3)


KEPT = tuple(name for name in FAMILIES if name != "boft-peft")
"""All families but the one whose strength decides how much of each row is turned."""


class Model(nn.Module):
    """One layer, linear or a convolution, and an input for it."""

    def __init__(self, shape: tuple[int, ...] = SHAPE) -> None:
        super().__init__()
        is_conv = len(shape) > 2
        self.layer = nn.Conv2d(shape[1], shape[0], shape[2:]) if is_conv else nn.Linear(shape[1], shape[0])
        self.layer.requires_grad_(False)
        self.layer.weight.copy_(BASE_STD * torch.randn(shape, generator=torch.manual_seed(4)))
        self.x = torch.randn(3, shape[1], *[5] * (len(shape) - 2), generator=torch.manual_seed(5))

    def error(self, applied: list[tuple[Family, float]]) -> float:
        """Of the forward as it is now, from the one in float64 with these merged."""
        weight, _ = merge(self.layer.weight, [Step(made.change, strength) for made, strength in applied])
        multiply = nn.functional.linear if weight.ndim == 2 else nn.functional.conv2d
        exact = multiply(self.x.double(), weight, self.layer.bias.double())
        return float((self.layer(self.x).double() - exact).norm() / exact.norm())


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The norms and products that are read from the base meanwhile."""
    seen: list[str] = []
    with monkeypatch.context() as patch:
        for owner, name in (
            *((Reader, name) for name in ("row_squares", "column_squares", "times")),
            *((norms, name) for name in ("row_reading", "column_reading")),
        ):
            original = getattr(owner, name)

            def record(*args: object, name=name, original=original) -> object:
                seen.append(name)
                return original(*args)

            patch.setattr(owner, name, record)
        yield seen


def items(adapters: list[object], strengths: tuple[float, ...]) -> list[tuple[str, dict[str, object], float]]:
    return [
        (f"file {number}", {"layer.weight": adapter}, strength)
        for number, (adapter, strength) in enumerate(zip(adapters, strengths, strict=True))
    ]


def held(session: PatchSession) -> dict[str, int]:
    """Every tensor with factors or turns that the branch multiplies with, by place."""
    piece = session._attached["layer"].piece
    operands, stack = piece._operands, piece._stack
    tensors: dict[str, Tensor] = {}
    if stack is not None:
        tensors |= {"down": stack.down, "exponents": stack.exponents}
        tensors |= {f"up {number}": up for number, up in enumerate(stack.ups.values())}
    turns = [turn for piece in operands.pieces for turn in piece.turns]
    turns += () if operands.before is None else operands.before.turns
    turns += [(left.operator, left.factor) for phase in operands.phases for left in phase.lefts]
    for number, (operator, _) in enumerate(turns):
        tensors |= {f"turn {number}.{place}": part for place, part in enumerate(operator.tensors())}
    for phase in operands.phases:
        for row_range in phase.ranges:
            for number, step in enumerate(row_range.others):
                tensors |= {f"other {number}.{place}": part for place, part in enumerate(step.term.tensors())}
    assert tensors
    return {place: id(tensor) for place, tensor in tensors.items()}


@pytest.mark.parametrize("shape", [SHAPE, KERNEL], ids=["linear", "conv"])
@pytest.mark.parametrize("name", KEPT)
def test_a_change_of_strength_reads_nothing_and_keeps_the_very_same_factors(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = Model(shape), family(name, shape)
    adapter = made.adapter
    with PatchSession(model) as session:
        session.apply(items([adapter], (1.0,)))
        assert model.error([(made, 1.0)]) <= 1e-5
        branch, factors = session._attached["layer"].piece, held(session)
        with reads(monkeypatch) as seen:
            for strength in (0.7, -0.5, 2.0, 1.0):
                session.apply(items([adapter], (strength,)))
                assert model.error([(made, strength)]) <= 1e-5
                assert session._attached["layer"].piece is branch
                assert held(session) == factors
        assert seen == []


@pytest.mark.parametrize(
    ("name", "again"),
    [("dora-out", 0), ("dora-in", 0), ("loha-dora-in", 0), ("lokr-dora-out", 1), ("glora", 1)],
)
def test_a_change_of_an_earlier_strength_reads_what_depends_on_it(
    name: str, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """again: what has no closed form, or is a product with the running weight."""
    model, made = Model(), [family("lora", SHAPE), family(name, SHAPE), family("lokr-both", SHAPE)]
    adapters = [one.adapter for one in made]
    with PatchSession(model) as session:
        for strengths, expected in (
            ((1.0, 1.0, 1.0), 1),
            ((1.0, 0.3, 1.0), 0),
            ((1.0, 0.3, -2.0), 0),
            ((0.5, 0.3, -2.0), again),
            ((0.5, 1.0, 1.0), 0),
        ):
            with reads(monkeypatch) as seen:
                session.apply(items(adapters, strengths))
            assert len(seen) == expected
            assert model.error(list(zip(made, strengths, strict=True))) <= 1e-5


def test_a_norm_that_stands_before_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = Model(), [family("dora-out", SHAPE, 1), family("dora-out", SHAPE, 2)]
    adapters = [one.adapter for one in made]
    with PatchSession(model) as session:
        session.apply(items(adapters, (1.0, 1.0)))
        with reads(monkeypatch) as seen:
            session.apply(items(adapters, (1.0, 0.5)))
            assert seen == []
            session.apply(items(adapters, (0.5, 0.5)))
            assert seen == [], "the norms change, what they are made of does not"
        assert model.error([(made[0], 0.5), (made[1], 0.5)]) <= 1e-5
        with reads(monkeypatch) as seen:
            session.apply(items(adapters[::-1], (0.5, 0.5)))
            assert seen == []
        assert model.error([(made[1], 0.5), (made[0], 0.5)]) <= 1e-5
        with reads(monkeypatch) as seen:
            session.apply(items([adapters[1], family("dora-out", SHAPE, 3).adapter], (0.5, 0.5)))
            assert seen == ["row_reading"], "for the new term alone"


def test_norms_are_forgotten_with_the_files_they_belong_to_and_those_of_the_base_stay() -> None:
    model, adapter = Model(), family("dora-out", SHAPE).adapter
    base = model.layer.weight.double().square().sum(1)

    def kept() -> list[Tensor]:
        return [value for _, value in session._memo._kept.values() if isinstance(value, Tensor)]

    with PatchSession(model) as session:
        session.apply(items([adapter], (1.0,)))
        planned = session.footprints(session.patches, "fp32", torch.device("cpu"), torch.float32)["layer"]
        assert sum(value.nbytes for value in kept()) == planned.kept_bytes + 4 * SHAPE[0], "and the change"
        session.apply(items([family("loha-streamed", SHAPE).adapter], (1.0,)))
        (norms_of_base,) = kept()
        torch.testing.assert_close(norms_of_base, base, rtol=1e-14, atol=0)
        assert len(session._memo._kept) == 2, "and the largest number of the LoHa that stands there now"
        session.apply(items([family("lora", SHAPE).adapter], (1.0,)))
        assert len(session._memo._kept) == 1, "that of a LoRA is its file's"


def test_another_base_in_the_same_place_is_read_and_takes_the_place_of_the_former(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, made = Model(), family("dora-out", SHAPE)
    with PatchSession(model) as session:
        session.apply(items([made.adapter], (1.0,)))
        count = len(session._memo._kept)
        session.clear()
        model.layer.weight.mul_(1.5)
        with reads(monkeypatch) as seen:
            session.apply(items([made.adapter], (1.0,)))
        assert seen == ["row_reading"]
        assert model.error([(made, 1.0)]) <= 1e-5
        assert len(session._memo._kept) == count


@pytest.mark.parametrize("name", ["glora", "ia3-in", "ia3-peft-in"])
def test_what_a_convolution_spreads_over_its_kernel_is_forgotten_with_the_session(name: str) -> None:
    model, adapter = Model(KERNEL), family(name, KERNEL).adapter
    with PatchSession(model) as session:
        session.apply(items([adapter], (1.0,)))
        assert len(adapter._spread) == 1
    del session
    gc.collect()
    assert len(adapter._spread) == 0


@pytest.mark.parametrize("name", KEPT)
def test_a_change_of_strength_copies_nothing_to_the_device_again(name: str) -> None:
    """On `meta`, a device apart from the factors: every copy to it is a new tensor."""
    model, adapter = Model(), family(name, SHAPE).adapter
    with PatchSession(model) as session:
        session.apply(items([adapter], (1.0,)))
        branch = session._attached["layer"].piece
        before = branch.operands(model.x.to("meta"), None)
        factors = held(session)
        session.apply(items([adapter], (0.5,)))
        after = branch.operands(model.x.to("meta"), None)
        assert session._attached["layer"].piece is branch
        assert after is not before
        assert held(session) == factors
