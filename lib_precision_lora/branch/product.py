"""Products of activations and factors, in the arithmetic of a compute mode.

`product(op, x, w, axes) → op(x, w)` in fp32, for an `op` that is linear in both: a matrix product or a
convolution. axes: those of x over which one output element sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

Bilinear = Callable[[Tensor, Tensor], Tensor]
Compute = Literal["auto", "fp16", "fp32"]


class Product(Protocol):
    """Either arithmetic; `half` says which of the two kinds of factors it multiplies."""

    half: bool

    def __call__(self, op: Bilinear, x: Tensor, w: Tensor, axes: tuple[int, ...]) -> Tensor: ...


class SingleProduct:
    """fp32 operands, fp32 sums, also where the process lets matrix products use TF32."""

    half = False

    def __call__(self, op: Bilinear, x: Tensor, w: Tensor, axes: tuple[int, ...]) -> Tensor:
        x, w = x.float(), w.float()
        if x.is_cuda and tensor_float_allowed(convolution=axes != (-1,)):
            return split_product(op, x, w)
        return op(x, w)


class HalfProduct:
    """fp16 operands, fp32 sums, one rounding of the result to fp16; cannot overflow.

    `op(x, w) = s · op(x / s, w)` with s the power of two above the largest |x| of a sum. w is bounded as
    `HalfFactors` are. On the CPU the same roundings are made around an fp32 product, which is faster
    there and has the same result.
    """

    half = True

    def __call__(self, op: Bilinear, x: Tensor, w: Tensor, axes: tuple[int, ...]) -> Tensor:
        size = magnitude(x, axes)
        small = (x / size).to(torch.float16)
        on_cpu = x.device.type == "cpu"
        result = op(small.float(), w.float()).to(torch.float16) if on_cpu else op(small, w)
        return result.float() * size


def choose_product(compute: Compute, device: torch.device, dtype: torch.dtype) -> Product:
    """The arithmetic for activations of this type on this device.

    Automatic takes fp16 products where activations are fp16 on an accelerator, which keeps law 2's fp16
    figure, and fp32 elsewhere: bf16 activations would lose range in fp16, fp32 ones mantissa, and CPUs
    are no faster in fp16.
    """
    if compute == "fp16" or (compute == "auto" and dtype == torch.float16 and device.type != "cpu"):
        return HalfProduct()
    return SingleProduct()


def magnitude(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The power of two at or above max |x| over `axes` (kept as axes of 1), fp32; 1 where x is 0.

    At the ends of fp32's range, the nearest that fp32 holds as a normal number.
    """
    largest = x.abs().amax(axes, keepdim=True).float()
    size = torch.exp2(torch.ceil(torch.log2(largest)).clamp(-126, 127))
    return torch.where(largest > 0, size, torch.ones_like(size))


def tensor_float_allowed(convolution: bool) -> bool:
    """Whether this process lets CUDA round the fp32 operands of a convolution, or of a matrix product, to
    TF32 (10 bits of mantissa)."""
    try:
        return torch.backends.cudnn.allow_tf32 if convolution else torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # torch 2.9 and later refuse to answer once the process has used their newer flags
        return True


def split_product(op: Bilinear, x: Tensor, w: Tensor) -> Tensor:
    """`op(x, w)` to about 2^-21 from three products whose operands TF32 does not round, or hardly.

    x = x₁ + x₂, w = w₁ + w₂ with x₁, w₁ of 10 mantissa bits: op(x₁, w₁) + op(x₁, w₂) + op(x₂, w₁).
    The process's own flags are left alone. Source: Ootomo and Yokota, arXiv 2203.03341.
    """
    x_high, w_high = truncate_mantissa(x), truncate_mantissa(w)
    x_low, w_low = x - x_high, w - w_high
    return op(x_high, w_low) + op(x_low, w_high) + op(x_high, w_high)


def truncate_mantissa(x: Tensor) -> Tensor:
    """The leading 10 mantissa bits of fp32 numbers, the rest zero."""
    return (x.view(torch.int32) & -8192).view(torch.float32)
