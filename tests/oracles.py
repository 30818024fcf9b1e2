"""Reference results in float64, written from the formulas alone: no code under test is used here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Change = Callable[[Tensor, float], Tensor]
"""(running rows W in float64, strength) → the rows after the adapter."""

RowFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One patch of a sequential merge.

    rows: (start, length) of the part it concerns; factor: what that part is multiplied with first.
    """

    change: Change
    strength: float = 1.0
    rows: tuple[int, int] | None = None
    factor: float = 1.0


def merge(base: Tensor, steps: Sequence[Step]) -> tuple[Tensor, float]:
    """The weight after all steps in order, in float64, and `Σ ‖Δᵢ‖` of all its changes."""
    weight = base.double().clone()
    size = 0.0
    for step in steps:
        start, length = step.rows or (0, weight.shape[0])
        part = weight[start : start + length]
        scaled = step.factor * part
        after = step.change(scaled, step.strength)
        size += float((scaled - part).norm() + (after - scaled).norm())
        part.copy_(after)
    return weight, size


def lora_delta(
    up: Tensor, down: Tensor, alpha: float | None, shape: Sequence[int], mid: Tensor | None = None
) -> Tensor:
    """`alpha / rank · up · down`; with a Tucker core, `Σ up[o, m] · mid[m, r, k] · down[r, i]`."""
    rank = down.shape[0]
    scale = 1.0 if alpha is None else alpha / rank
    up, down = up.double().flatten(1), down.double().flatten(1)
    if mid is None:
        return scale * (up @ down).reshape(tuple(shape))
    core = mid.double().flatten(2)
    return scale * torch.einsum("om,mrk,ri->oik", up, core, down).reshape(tuple(shape))


def added(delta: Tensor, function: RowFunction | None = None) -> Change:
    """`W + strength · f(Δ)`, f the host's row function."""
    moved = delta.double() if function is None else function(delta.double())
    return lambda weight, strength: weight + strength * moved


def replaced(value: Tensor) -> Change:
    """`value`, whatever the strength."""
    return lambda weight, strength: value.double().expand_as(weight)


def swap_halves(weight: Tensor) -> Tensor:
    """The host's `swap_scale_shift`, from its definition: the two halves of the rows change places."""
    first, second = weight.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)


def rounding_error(exact: Tensor, dtype: torch.dtype) -> float:
    """`‖round(y) − y‖`: what one ideal rounding to `dtype` costs; exact: float64."""
    return float((exact.to(dtype).double() - exact).norm())


def allowed_error(exact: Tensor, exact_base: Tensor, host: Tensor) -> float:
    """1.5 times one ideal rounding of the output to the host's type.

    Where the host's own base output is worse than one rounding (fp32 sums of a matrix product), its error
    takes the place of the base's share: 1.5 · √((ideal² + base²) / 2), 1.5 · ideal for an ideal host. In a
    small output, whose few roundings may all be unlucky, never less than what the host's own output plus the
    exact delta, rounded once, errs by.
    exact, exact_base: the output with and without the patches, float64; host: the host's without them.
    """
    ideal = rounding_error(exact, host.dtype)
    base = float((host.double() - exact_base).norm())
    unavoidable = (host.double() + (exact - exact_base)).to(host.dtype).double() - exact
    return max(1.5 * ideal, 1.5 * ((ideal**2 + base**2) / 2) ** 0.5, 1.01 * float(unavoidable.norm()))
