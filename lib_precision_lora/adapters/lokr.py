"""LoKr: `ΔW = alpha / rank · w1 ⊗ w2`, either factor whole or of low rank.

Source: KronA (arXiv 2212.10650); LyCORIS (arXiv 2309.14859, section 3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError, as_float_factor, require_finite
from lib_precision_lora.adapters.additive import (
    add_term,
    read_alpha,
    read_number,
    require_matrices,
    require_parts,
    require_shape,
)
from lib_precision_lora.adapters.lora import fold_tucker_core
from lib_precision_lora.adapters.steps import Running, Step
from lib_precision_lora.adapters.terms import Dense, Kronecker
from lib_precision_lora.strict_product import multiply

ROLES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@dataclass(frozen=True, slots=True, eq=False)
class LoKr:
    """A Kronecker product, applied through its structure and never expanded.

    rank: that of the factored part, None where both factors are whole (alpha then does not count).
    """

    term: Kronecker | Dense
    scale: float
    rank: int | None
    kind: str = "lokr"

    def tensors(self) -> tuple[Tensor, ...]:
        return self.term.tensors()

    def check(self, shape: tuple[int, ...]) -> None:
        require_shape(*self.term.size, shape)
        kernel = math.prod(shape[2:])
        if isinstance(self.term, Kronecker) and self.term.width % kernel:
            raise AdapterError(
                f"the right factor has {self.term.width} columns, which the layer's kernel of {kernel} does "
                "not divide: the file was trained on another model"
            )

    def reordered(self, order: Tensor) -> LoKr:
        """Reordered rows have no Kronecker structure any more: the one layer concerned becomes dense."""
        return dataclasses.replace(self, term=Dense(self.term.rows(order, torch.float32)))

    def compose(self, running: Running, strength: float) -> tuple[Step, ...]:
        return add_term(self, running, strength)


def read_lokr(name: str, tensors: Mapping[str, Tensor]) -> LoKr | None:
    """The LoKr among one layer's tensors, by role; None where there is none.

    w1: [a, b] or w1_a: [a, r] and w1_b: [r, b]; w2: [p, q, *kernel], or w2_a: [p, r] and
    w2_b: [r, q · kernel], or with a core t2: [r, r, *kernel], w2_a: [r, p], w2_b: [r, q]. Axes of one behind
    them change nothing.
    Raises `AdapterError`: a part is missing, factors that do not meet, NaN, inf.
    """
    if not any(role in tensors for role in ROLES):
        return None
    wanted = ["lokr_w1"] if "lokr_w1" in tensors else ["lokr_w1_a", "lokr_w1_b"]
    wanted += ["lokr_w2"] if "lokr_w2" in tensors else ["lokr_w2_a", "lokr_w2_b", "lokr_t2"]
    parts = {role: as_float_factor(name, role, tensors[role]) for role in wanted if role in tensors}
    require_finite(name, **parts)
    require_matrices(name, **parts)
    for role in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a"):
        if role in parts and math.prod(parts[role].shape[2:]) != 1:
            raise AdapterError(
                f"{name}: {role} has shape {list(parts[role].shape)}, and a kernel belongs to the right "
                "factor"
            )
    rank: int | None = None
    if "lokr_w1" in parts:
        left = parts["lokr_w1"]
    else:
        first, second = _pair(name, parts, "lokr_w1_a", "lokr_w1_b")
        rank = second.shape[0]
        left = multiply(first.float(), second.float().flatten(1))
    if "lokr_w2" in parts:
        right: tuple[Tensor, ...] = (parts["lokr_w2"],)
    else:
        right = _pair(name, parts, "lokr_w2_a", "lokr_w2_b")
        rank = parts["lokr_w2_b"].shape[0]
    scale = _whole_scale(name, tensors)
    if rank is not None:
        alpha = read_alpha(name, tensors)
        scale = 1.0 if alpha is None else alpha / rank
    return LoKr(Kronecker(left.flatten(1) if left.ndim > 2 else left, right), scale, rank)


def _whole_scale(name: str, tensors: Mapping[str, Tensor]) -> float:
    """The scale where no factor has a rank: 1 whatever alpha says (LyCORIS), or what PEFT's configuration
    gives. Trainers save a placeholder for such an alpha, 9999999999, which is inf in fp16."""
    return read_number(name, "scale", tensors["scale"]) if "scale" in tensors else 1.0


def _pair(name: str, parts: Mapping[str, Tensor], outer: str, inner: str) -> tuple[Tensor, Tensor]:
    """The two factors of one side, [p, r] and [r, q, …], a core folded into the second."""
    require_parts(name, parts, outer, inner)
    first, second = parts[outer].flatten(1), parts[inner]
    if outer == "lokr_w2_a" and "lokr_t2" in parts:
        first, second = first.T.float(), fold_tucker_core(name, parts["lokr_t2"], second)
    if first.shape[1] != second.shape[0]:
        raise AdapterError(
            f"{name}: the factors do not meet "
            f"({outer} {list(parts[outer].shape)}, {inner} {list(parts[inner].shape)})"
        )
    return first, second
