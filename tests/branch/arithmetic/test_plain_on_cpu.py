"""A plain stack on a CPU that multiplies bf16: what it sums, what it takes, and where it is not taken."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.branch import Compute, Patch, PatchSession
from lib_precision_lora.branch.arithmetic import plain_form
from lib_precision_lora.branch.arithmetic.plain import PlainStack
from lib_precision_lora.branch.forward.operands import Operands
from tests.branch.arithmetic.test_plain import BF16, FP16, FP32, Model, lora, stack_of
from tests.branch.meter import metered

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _multiplies_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor has."""
    monkeypatch.setattr(plain_form, "multiplies_bf16", lambda device: True)


def attached(layer: nn.Module, files: Sequence[tuple[torch.dtype, float]]) -> tuple[Model, PatchSession]:
    assert isinstance(layer.weight, Tensor)
    kernel, model = layer.weight.shape[2:], Model(layer)
    rows, columns = layer.weight.shape[:2]
    session = PatchSession(model)
    session.apply([(str(n), lora(columns, rows, t, kernel, n), s) for n, (t, s) in enumerate(files)])
    return model, session


@pytest.mark.parametrize("stored", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("strengths", [(0.7,), (-0.7, -0.7), (0.3, -1.1, 0.0), (2.0**-70,)], ids=str)
@pytest.mark.parametrize("inputs", [96, 1024])
def test_what_the_second_product_sums_is_the_change_to_four_digits(
    stored: torch.dtype, strengths: tuple[float, ...], inputs: int
) -> None:
    """Before y rounds it, in float64, at the strengths of attaching and at others."""
    x = torch.randn(32, inputs, generator=torch.Generator().manual_seed(3)).to(BF16)
    files = [lora(inputs, 48, stored, (), n) for n in range(len(strengths))]
    terms = [next(iter(file.values())).term for file in files]
    _model, session = attached(nn.Linear(inputs, 48, bias=False, dtype=BF16), [(stored, 0.9)] * len(files))
    with session, torch.no_grad():
        session.place(CPU, BF16)
        session.apply([(str(n), file, s) for n, (file, s) in enumerate(zip(files, strengths, strict=True))])
        session.place(CPU, BF16)
        stack = stack_of(session)
        parts = stack._of(stack._parts_of(x), stack.ranges[0]).double()
        change = stack.factor * parts @ stack.up(stack.ranges[0]).double().T
    exact = sum(
        (
            strength * x.double() @ term.down.double().T @ term.up.double().T
            for strength, term in zip(strengths, terms, strict=True)
        ),
        torch.zeros(32, 48, dtype=torch.float64),
    )
    assert stack.form.apart
    assert float((change - exact).norm()) <= 1e-4 * float(exact.norm())


@pytest.mark.parametrize("stored", [BF16, FP16], ids=str)
@pytest.mark.parametrize("strengths", [(0.7,), (0.7, 0.4)], ids=str)
def test_the_memory_is_the_planned_one(stored: torch.dtype, strengths: tuple[float, ...]) -> None:
    inputs, outputs, tokens = 512, 768, 2048
    model, session = attached(
        nn.Linear(inputs, outputs, bias=False, dtype=BF16), [(stored, s) for s in strengths]
    )
    x = torch.randn(tokens, inputs, dtype=BF16)
    patches: Sequence[Patch] = session.patches
    with session, torch.no_grad():
        planned = session.footprints(patches, "auto", CPU, BF16)["layer"]
        session.place(CPU, BF16)
        model.layer(x)
        peak = metered(lambda: model.layer(x)).peak - tokens * outputs * 2
        assert planned.factor_bytes == session.placed_bytes
    workspace = planned.workspace_bytes(tokens)
    assert 0.6 * workspace <= peak <= workspace + 64 * 2**10


@pytest.mark.parametrize(
    ("dtype", "compute", "layer"),
    [
        (FP32, "auto", nn.Linear(64, 48, bias=False)),
        (FP16, "auto", nn.Linear(64, 48, bias=False)),
        (BF16, "fp32", nn.Linear(64, 48, bias=False)),
        (BF16, "auto", nn.Conv2d(64, 48, 3, bias=False)),
    ],
    ids=["fp32", "fp16", "strict", "convolution"],
)
def test_other_activations_modes_and_layers_are_multiplied_in_fp32(
    dtype: torch.dtype, compute: Compute, layer: nn.Module
) -> None:
    _model, session = attached(layer.to(dtype), [(BF16, 0.5)])
    with session:
        session.apply_patches(session.patches, compute)
        session.place(CPU, dtype)
        assert isinstance(session._attached["layer"].piece._operands, Operands)  # type: ignore[union-attr]


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_cpu_without_products_of_bf16_multiplies_in_fp32(
    multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_form, "multiplies_bf16", lambda device: multiplies)
    _model, session = attached(nn.Linear(64, 48, bias=False, dtype=BF16), [(BF16, 0.5)])
    with session:
        session.place(CPU, BF16)
        kind = PlainStack if multiplies else Operands
        assert isinstance(session._attached["layer"].piece._operands, kind)  # type: ignore[union-attr]


def test_what_the_first_product_loses_is_in_the_second() -> None:
    """On every build and processor that the tests meet; where it is not so, the products are fp32's."""
    assert plain_form.keeps_what_is_lost()


def test_a_product_that_rounds_twice_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds_first(y: Tensor, x: Tensor, w: Tensor, beta: float) -> Tensor:
        return beta * y + torch.mm(x, w)

    monkeypatch.setattr(torch, "addmm", rounds_first)
    assert not plain_form.keeps_what_is_lost()
