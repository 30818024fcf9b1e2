"""LoHa: `ΔW = alpha / rank · (w1_a · w1_b) ∘ (w2_a · w2_b)`, ∘ the product element by element.

Source: FedPara (arXiv 2108.06098); LyCORIS (arXiv 2309.14859, section 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError, as_float_factor, require_finite
from lib_precision_lora.adapters.additive import (
    add_term,
    read_alpha,
    require_matrices,
    require_parts,
    require_shape,
)
from lib_precision_lora.adapters.lora import fold_tucker_core
from lib_precision_lora.adapters.steps import Running, Step
from lib_precision_lora.adapters.terms import Hadamard, LowRank

ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True, slots=True, eq=False)
class LoHa:
    """The Hadamard product of two low-rank matrices, as Khatri-Rao factors where they are cheaper.

    `(A₁B₁) ∘ (A₂B₂) = U · V` with U[o, (i, j)] = A₁[o, i] · A₂[o, j] and V[(i, j), c] = B₁[i, c] · B₂[j, c],
    of rank r₁ · r₂. Where that would multiply more than a dense matrix does, the term is made in row
    blocks as it is needed.
    """

    term: LowRank | Hadamard
    scale: float
    rank: int
    kind: str = "loha"

    def tensors(self) -> tuple[Tensor, ...]:
        return self.term.tensors()

    def check(self, shape: tuple[int, ...]) -> None:
        require_shape(*self.term.size, shape)

    def reordered(self, order: Tensor) -> LoHa:
        return dataclasses.replace(self, term=self.term.reordered(order))

    def compose(self, running: Running, strength: float) -> tuple[Step, ...]:
        return add_term(self, running, strength)


def read_loha(name: str, tensors: Mapping[str, Tensor]) -> LoHa | None:
    """The LoHa among one layer's tensors, by role; None where there is none.

    w_a: [out, rank], w_b: [rank, in · kernel]; with cores, w_a: [rank, out], w_b: [rank, in],
    t: [rank, rank, *kernel]. Raises `AdapterError`: a part is missing, factors that do not meet, NaN, inf.
    """
    if not any(role in tensors for role in ROLES):
        return None
    require_parts(name, tensors, *ROLES)
    cores = ("hada_t1", "hada_t2") if "hada_t1" in tensors else ()
    require_finite(name, **{role: tensors.get(role) for role in (*ROLES, *cores)})
    require_matrices(name, **{role: tensors[role] for role in ROLES})
    a1, b1, a2, b2 = (as_float_factor(name, role, tensors[role]).flatten(1) for role in ROLES)
    rank = b1.shape[0]
    if "hada_t1" in tensors:
        require_parts(name, tensors, "hada_t2")
        b1 = fold_tucker_core(name, tensors["hada_t1"], b1).flatten(1)
        b2 = fold_tucker_core(name, tensors["hada_t2"], b2).flatten(1)
        a1, a2 = a1.T, a2.T
    inner, outer = (a1.shape[1], a2.shape[1]), (*a1.shape[:1], *b1.shape[1:])
    if inner != (b1.shape[0], b2.shape[0]) or outer != (*a2.shape[:1], *b2.shape[1:]):
        shapes = ", ".join(f"{role} {list(tensors[role].shape)}" for role in ROLES)
        raise AdapterError(f"{name}: the factors do not meet ({shapes})")
    alpha = read_alpha(name, tensors)
    term = Hadamard(a1, b1, a2, b2).cheapest()
    return LoHa(term, 1.0 if alpha is None else alpha / rank, rank)
