"""What a product makes beside its operands: so many fp32 copies of each.

half     x / s, and its fp16 form; the result in fp32 and in fp16
strict   an activation in fp32; where an operand must be in parts, two of an fp32 one, and two products at
         once; where it must be in fp64, that, and the result once more in fp32
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lib_precision_lora.branch.arithmetic.product import Product
from lib_precision_lora.memory.chunks import HALF_COPIES
from lib_precision_lora.strict_product import rounding_of


@dataclass(frozen=True, slots=True)
class Copies:
    """operand: of an activation, as the product takes it; inner: of an operand that is in fp32 already;
    result: of the result, with itself."""

    operand: float
    inner: float
    result: float


HALF = Copies(HALF_COPIES, HALF_COPIES, HALF_COPIES)


@dataclass(frozen=True, slots=True)
class ProductCost:
    """stack: of products with low-rank factors; strict: of all others, which are made in fp32 in every mode.

    cast: fp32 copies of an activation that is brought to fp32 before anything else.
    """

    stack: Copies
    strict: Copies
    cast: float

    @classmethod
    def of(
        cls, product: Product, device: torch.device, convolution: bool, dtype: torch.dtype | None = None
    ) -> ProductCost:
        """convolution: in the forward of one, which multiplies by matrices as well; dtype: of the
        activations, the costliest where None."""
        cast = 0.0 if dtype == torch.float32 else 1.0
        kinds = {rounding_of(device, False), rounding_of(device, convolution)}
        if "any" in kinds:
            strict = Copies(2.0, 2.0, 3.0)
        elif "tf32" in kinds:
            strict = Copies(1.0 if dtype in (torch.float16, torch.bfloat16) else 2.0, 2.0, 2.0)
        else:
            strict = Copies(cast, 0.0, 1.0)
        return cls(HALF if product.half else strict, strict, cast)
