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
        if x.is_cuda and tensor_float_allowed(convolution=axes != (-1,)):
            return split_product(op, x, w)
        return op(x.float(), w.float())


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
        return result.float().mul_(size)


def choose_product(compute: Compute, device: torch.device, dtype: torch.dtype) -> Product:
    """The arithmetic for activations of this type on this device.

    Automatic takes fp16 products where activations are fp16 on an accelerator, which keeps law 2's fp16
    figure, and fp32 elsewhere: bf16 activations would lose range in fp16, fp32 ones mantissa, and CPUs
    are no faster in fp16.
    """
    fast = dtype == torch.float16 and device.type != "cpu" and not half_sums_allowed()
    if compute == "fp16" or (compute == "auto" and fast):
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


def half_sums_allowed() -> bool:
    """Whether this process lets CUDA sum fp16 products in fp16 (torch 2.7 and later; off by default)."""
    return bool(getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False))


def split_product(op: Bilinear, x: Tensor, w: Tensor) -> Tensor:
    """`op(x, w)` to about 2^-21 from three products whose operands TF32 does not round, or hardly.

    x = x₁ + x₂, w = w₁ + w₂ with x₁, w₁ of 10 mantissa bits: op(x₁, w₁) + op(x₁, w₂) + op(x₂, w₁).
    Half-precision operands fit into TF32 as they are and have no second part. The process's own flags are
    left alone. Source: Ootomo and Yokota, arXiv 2203.03341.
    """
    x_parts, w_parts = mantissa_parts(x), mantissa_parts(w)
    result = op(x_parts[0], w_parts[0])
    for w_low in w_parts[1:]:
        result = op(x_parts[0], w_low) + result
    for x_low in x_parts[1:]:
        result = op(x_low, w_parts[0]) + result
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
