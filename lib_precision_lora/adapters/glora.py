"""GLoRA: `W' = W + alpha / rank · (W · a1 · a2 + b1 · b2)`.

`W · a1` is read once from the running weight, after which the adapter is two low-rank terms. On a
convolution a1 · a2 acts on the input channels, at each position of the kernel; a Tucker core (`bm`, between
b1 and b2) is folded into b2 when the file is read.
Source: arXiv 2306.07967; LyCORIS `glora` in its new and old layouts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError, as_float_factor, require_finite
from lib_precision_lora.adapters.additive import read_alpha, require_matrices, require_parts
from lib_precision_lora.adapters.lora import fold_tucker_core
from lib_precision_lora.adapters.steps import Add, Running, Step
from lib_precision_lora.adapters.terms import LowRank

ROLES = ("a1", "a2", "b1", "b2")


@dataclass(frozen=True, slots=True, eq=False)
class GLoRA:
    """inner, outer: a1 [in, r], a2 [r, in]; up, down: b1 [out, r], b2 [r, in · kernel].

    _spread: a2 at each position of the kernel, for each size of kernel, as long as anyone holds it: a
    change of strength meets the same tensor again.
    """

    inner: Tensor
    outer: Tensor
    up: Tensor
    down: Tensor
    scale: float
    kind: str = "glora"
    _spread: WeakValueDictionary[int, Tensor] = field(
        default_factory=WeakValueDictionary, init=False, repr=False
    )

    @property
    def rank(self) -> int:
        return self.outer.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.inner, self.outer, self.up, self.down

    def check(self, shape: tuple[int, ...]) -> None:
        made = (self.up.shape[0], self.down.shape[1], self.inner.shape[0], self.outer.shape[1])
        expected = (shape[0], math.prod(shape[1:]), *shape[1:2], *shape[1:2])
        if made != expected:
            raise AdapterError(
                f"the factors fit a weight of {made[0]}×{made[1]} with {made[2]} inputs, the layer's is "
                f"{'×'.join(map(str, shape))}: the file was trained on another model"
            )

    def reordered(self, order: Tensor) -> GLoRA:
        return dataclasses.replace(self, up=self.up[order])

    def compose(self, running: Running, strength: float) -> tuple[Step, ...]:
        rows, kernel = running.shape[0], math.prod(running.shape[2:])
        outer, scale = self._outer(kernel), strength * self.scale
        seen = running.remember(
            self, lambda: running.times(at_each_position(self.inner, kernel)).to(outer.device)
        )
        return (
            Add(0, rows, LowRank(seen, outer), scale),
            Add(0, rows, LowRank(self.up, self.down), scale),
        )

    def _outer(self, kernel: int) -> Tensor:
        if kernel == 1:
            return self.outer
        outer = self._spread.get(kernel)
        if outer is None:
            self._spread[kernel] = outer = at_each_position(self.outer, kernel)
        return outer


def at_each_position(factor: Tensor, kernel: int) -> Tensor:
    """`factor ⊗ I`: one factor for each position of the kernel; [m, n] → [m · kernel, n · kernel]."""
    return factor if kernel == 1 else torch.kron(factor, torch.eye(kernel, device=factor.device))


def read_glora(name: str, tensors: Mapping[str, Tensor]) -> GLoRA | None:
    """The GLoRA among a layer's tensors, by role; None where there is none.

    The old layout has a1: [r, in], a2: [in, r], b1: [r, in], b2: [out, r]: W a2 a1 + b2 b1.
    Raises `AdapterError`: a part is missing, factors that do not meet, NaN, inf.
    """
    if not any(role in tensors for role in ROLES):
        return None
    require_parts(name, tensors, *ROLES)
    require_matrices(name, **{role: tensors[role] for role in ROLES})
    a1, a2, b1, b2 = (as_float_factor(name, role, tensors[role]).flatten(1) for role in ROLES)
    require_finite(name, a1=a1, a2=a2, b1=b1, b2=b2)
    old = a1.shape[0] == b1.shape[0] == a2.shape[1] == b2.shape[1] and a1.shape[0] < a1.shape[1]
    rank = a1.shape[0] if old else a2.shape[0]
    inner, outer, up, down = (a2, a1, b2, b1) if old else (a1, a2, b1, b2)
    if "bm" in tensors:
        core = as_float_factor(name, "bm", tensors["bm"])
        require_finite(name, bm=core)
        down = fold_tucker_core(name, core, down, ("bm", "b1" if old else "b2")).flatten(1)
    if inner.shape[1] != outer.shape[0] or up.shape[1] != down.shape[0]:
        shapes = ", ".join(f"{role} {list(tensors[role].shape)}" for role in ROLES)
        raise AdapterError(f"{name}: the factors do not meet ({shapes})")
    alpha = read_alpha(name, tensors)
    return GLoRA(inner.float(), outer.float(), up, down, 1.0 if alpha is None else alpha / rank)
