"""One Kronecker product in bf16: what it sums and takes, what a card starts, and where it is not taken."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from benchmarks.fake_card import CARD, fake_card
from benchmarks.kernels import counted
from lib_precision_lora.adapters import Adapter, read_adapters
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.arithmetic import plain_form, plain_kronecker
from lib_precision_lora.branch.arithmetic.plain_kronecker import PlainKronecker
from tests.branch.arithmetic.test_plain import BF16, FP16, FP32, Model
from tests.branch.meter import metered

CPU = torch.device("cpu")
LEFT, HEIGHT, WIDTH, RANK = (6, 4), 16, 24, 8
ROWS, COLUMNS = LEFT[0] * HEIGHT, LEFT[1] * WIDTH


@pytest.fixture(autouse=True)
def _multiplies_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor has."""
    monkeypatch.setattr(plain_form, "multiplies_bf16", lambda device: True)


def lokr(factored: bool, dtype: torch.dtype) -> tuple[Mapping[str, Adapter], Tensor]:
    """The file, and its change of the weight at strength 1 in float64."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    left = noise(*LEFT)
    if factored:
        parts = {"lokr_w2_a": noise(HEIGHT, RANK), "lokr_w2_b": noise(RANK, WIDTH)}
        right = parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double()
    else:
        parts = {"lokr_w2": noise(HEIGHT, WIDTH)}
        right = parts["lokr_w2"].double()
    tensors = {f"layer.{key}": value for key, value in {"lokr_w1": left, **parts}.items()}
    tensors["layer.alpha"] = torch.tensor(float(RANK))  # over the rank: 1
    return read_adapters(tensors, {"layer": "layer.weight"}), torch.kron(left.double(), right)


def operands_of(session: PatchSession) -> object:
    (attached,) = session._attached.values()
    return attached.piece._operands  # type: ignore[union-attr]


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("stored", [BF16, FP16, FP32], ids=str)
def test_what_the_last_product_sums_is_the_change_to_four_digits(factored: bool, stored: torch.dtype) -> None:
    """Before y rounds it, at a strength that was changed after the factors were placed."""
    file, change = lokr(factored, stored)
    x = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(3)).to(BF16)
    model = Model(nn.Linear(COLUMNS, ROWS, dtype=BF16))
    with PatchSession(model) as session, torch.no_grad():
        session.apply([("a", file, 1.0)])
        session.place(CPU, BF16)
        session.apply([("a", file, -0.6)])
        made = operands_of(session)
        assert isinstance(made, PlainKronecker)
        columns = torch.cat((made.up[0], *made.up), 1).double()
        sums = (made.scale * made._parts(x).double() @ columns.T).view(32, -1)
    exact = -0.6 * x.double() @ change.T
    assert float((sums - exact).norm()) <= 1e-4 * float(exact.norm())


@pytest.mark.parametrize("factored", [True, False])
def test_the_output_errs_as_one_rounding(factored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of few tokens, on an input of several axes."""
    monkeypatch.setattr(plain_kronecker, "CACHED_BYTES", 2**14)
    file, change = lokr(factored, BF16)
    model = Model(nn.Linear(COLUMNS, ROWS, dtype=BF16))
    x = torch.randn(2, 33, COLUMNS, generator=torch.Generator().manual_seed(3)).to(BF16)
    with PatchSession(model) as session, torch.no_grad():
        own = model.layer(x).double()
        session.apply([("a", file, 0.8)])
        got = model.layer(x).double()
    exact = own + 0.8 * x.double() @ change.T
    assert float((got - exact).norm()) <= 1.01 * float((exact.to(BF16).double() - exact).norm())


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("stored", [BF16, FP16], ids=str)
def test_the_memory_is_the_planned_one(factored: bool, stored: torch.dtype) -> None:
    file, _ = lokr(factored, stored)
    model, x = Model(nn.Linear(COLUMNS, ROWS, dtype=BF16)), torch.randn(1024, COLUMNS, dtype=BF16)
    with PatchSession(model) as session, torch.no_grad():
        session.apply([("a", file, 0.5)])
        planned = session.footprints(session.patches, "auto", CPU, BF16)["layer"]
        session.place(CPU, BF16)
        peak = metered(lambda: model.layer(x)).peak - 1024 * ROWS * 2
        assert planned.factor_bytes == session.placed_bytes
    workspace = planned.workspace_bytes(1024)
    assert 0.6 * workspace <= peak <= workspace + 16 * 2**10


@pytest.mark.parametrize(("factored", "kernels"), [(True, 9), (False, 9)])
def test_a_card_starts_few_kernels_for_it(factored: bool, kernels: int) -> None:
    file, _ = lokr(factored, BF16)
    plain_form._sums_in_fp32.cache_clear()
    try:
        with fake_card(), torch.no_grad():
            model = Model(nn.Linear(COLUMNS, ROWS, bias=False, device=CARD, dtype=BF16))
            x = torch.empty(1, 512, COLUMNS, device=CARD, dtype=BF16)
            own = len(counted(lambda: model.layer(x)))
            with PatchSession(model) as session:
                session.apply([("a", file, 0.5)])
                session.place(CARD, BF16)
                started = counted(lambda: model.layer(x))[own:]
    finally:
        plain_form._sums_in_fp32.cache_clear()
    assert len(started) <= kernels
    assert sum("addmm" in kernel.name for kernel in started) == 1


@pytest.mark.parametrize(
    ("dtype", "compute", "count"),
    [(FP32, "auto", 1), (FP16, "auto", 1), (BF16, "fp32", 1), (BF16, "auto", 2)],
)
def test_other_types_modes_and_stacks_are_multiplied_in_fp32(
    dtype: torch.dtype, compute: str, count: int
) -> None:
    file, _ = lokr(True, BF16)
    model = Model(nn.Linear(COLUMNS, ROWS, dtype=dtype))
    with PatchSession(model) as session:
        session.apply([(str(number), file, 0.5) for number in range(count)], compute)  # type: ignore[arg-type]
        session.place(CPU, dtype)
        assert not isinstance(operands_of(session), PlainKronecker)
