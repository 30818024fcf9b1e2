"""Products in fp32 whose operands no flag of the process rounds: the one way in which all is multiplied.

    strict(op, x, w) = op(x, w)        op linear in both: a matrix product, a convolution, an einsum

A process may let torch round the operands of fp32 products, to TF32 on CUDA and to bf16 or TF32 on CPUs that
have instructions for it. Its flags are its own: they are asked, and never set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Bilinear = Callable[[Tensor, Tensor], Tensor]
Rounding = Literal["none", "tf32", "any"]
"""How a device may round the operands: not at all, to 10 bits of mantissa, or to fewer."""


def strict(op: Bilinear, x: Tensor, w: Tensor, convolution: bool = False) -> Tensor:
    """`op(x, w)` with operands and sums in fp32, or in fp64 where x or w is.

    convolution: whether op is one, of which torch's flags are others than of matrix products.
    """
    if torch.float64 in (x.dtype, w.dtype):
        return op(x.double(), w.double())
    allowed = rounding_of(x.device, convolution)
    if allowed == "tf32":
        return split_product(op, x, w)
    if allowed == "any":
        return op(x.double(), w.double()).float()
    return op(x.float(), w.float())


def multiply(x: Tensor, w: Tensor) -> Tensor:
    """`x · w`, the last axis of x over the last but one of w, as `strict` multiplies."""
    return strict(torch.matmul, x, w)


def rounding_of(device: torch.device, convolution: bool) -> Rounding:
    """How this process lets the device round fp32 operands of a convolution, or of a matrix product."""
    if device.type == "cuda":
        return "tf32" if tensor_float_allowed(convolution) else "none"
    return "any" if device.type == "cpu" and cpu_rounding_allowed(convolution) else "none"


def tensor_float_allowed(convolution: bool) -> bool:
    """Whether this process lets CUDA round the fp32 operands of a convolution, or of a matrix product, to
    TF32 (10 bits of mantissa)."""
    try:
        return torch.backends.cudnn.allow_tf32 if convolution else torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # torch 2.9 and later refuse to answer once the process has used their newer flags
        return True


def cpu_rounding_allowed(convolution: bool) -> bool:
    """Whether this process lets CPUs round them; torch before 2.9 has one flag for it, of matrix products."""
    part = getattr(torch.backends.mkldnn, "conv" if convolution else "matmul", None)
    precision = getattr(part, "fp32_precision", None)
    if precision is None:
        return not convolution and torch.get_float32_matmul_precision() == "medium"
    return precision in ("bf16", "tf32")


def split_product(op: Bilinear, x: Tensor, w: Tensor) -> Tensor:
    """`op(x, w)` to about 2^-21 from three products whose operands TF32 does not round, or hardly.

    x = x₁ + x₂, w = w₁ + w₂ with x₁, w₁ of 10 mantissa bits: op(x₁, w₁) + op(x₁, w₂) + op(x₂, w₁).
    Half-precision operands fit into TF32 as they are and have no second part.
    Source: Ootomo and Yokota, arXiv 2203.03341.
    """
    x_parts, w_parts = mantissa_parts(x), mantissa_parts(w)
    result = op(x_parts[0], w_parts[0])
    for w_low in w_parts[1:]:
        result.add_(op(x_parts[0], w_low))
    for x_low in x_parts[1:]:
        result.add_(op(x_low, w_parts[0]))
    return result


def mantissa_parts(x: Tensor) -> tuple[Tensor, ...]:
    """x as one or two fp32 numbers: as it is from fp16 or bf16, else its leading 10 mantissa bits and the
    rest."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return (x.float(),)
    high = truncate_mantissa(x.float())
    return high, x.float() - high


def truncate_mantissa(x: Tensor) -> Tensor:
    """The leading 10 mantissa bits of fp32 numbers, the rest zero."""
    return (x.view(torch.int32) & -8192).view(torch.float32)
