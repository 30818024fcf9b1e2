"""The range of fp32: numbers of a step that a branch could not hold are found while it is attached.

A strength of 1e39 is a finite number to Python and inf to a tensor, and so is an alpha of 1e300 in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from lib_precision_lora.adapters.adapter import LARGEST, AdapterError, largest_size, require_number
from lib_precision_lora.adapters.operators import Uniform
from lib_precision_lora.adapters.steps import Add, Step
from lib_precision_lora.adapters.terms import LowRank
from lib_precision_lora.branch.algebra.memo import Memo


class Factors(Protocol):
    """A term or an operator."""

    def tensors(self) -> tuple[Tensor, ...]: ...


def require_range(step: Step, largest: Callable[[Factors], float]) -> None:
    """Raise `AdapterError` for a step with a factor, or a change of the weight, that fp32 cannot hold.

    largest: a bound of the elements of a term or an operator.
    """
    if isinstance(step, Add):
        require_number("its strength times the file's own scale", step.scale)
        size = abs(step.scale) * largest(step.term)
        if not size <= LARGEST:  # NaN is not, either
            raise AdapterError(
                f"its change of the weight reaches {size:.3g}, beyond the {LARGEST:.3g} that fp32 holds: "
                "use a smaller strength, or another epoch of the file"
            )
    for operator, factor in step.columns if isinstance(step, Add) else ((step.operator, step.factor),):
        require_number("its strength", factor)
        if isinstance(operator, Uniform):
            require_number("the factor of the base weight", operator.value)
        elif not largest(operator) <= LARGEST:
            raise AdapterError(
                "it scales or turns the weight by numbers that fp32 does not hold: use another epoch of it"
            )


def bound_of(memo: Memo, factors: Factors) -> float:
    """A bound of the elements of a term or an operator, looked for once: the product of the largest one of
    each of its tensors."""
    if isinstance(factors, LowRank) and factors.sizes is not None:
        return math.prod(factors.sizes)
    key = "largest", tuple(id(tensor) for tensor in factors.tensors())
    return memo.recall(key, factors, lambda: largest_element(factors))


def largest_element(factors: Factors) -> float:
    """The product of the largest absolute element of each tensor."""
    product = 1.0
    for tensor in factors.tensors():
        if tensor.numel():
            product *= largest_size(tensor)
    return product
