"""Products of activations and factors, in the arithmetic of a compute mode.

`product(op, x, w, axes) → op(x, w)` in fp32, for an `op` that is linear in both: a matrix product or a
convolution. axes: those of x over which one output element sums.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from lib_precision_lora.strict_product import Bilinear, rounding_of, strict

Compute = Literal["auto", "fp16", "fp32"]


class Product(Protocol):
    """Either arithmetic; `half` says which of the two kinds of factors it multiplies."""

    half: bool

    def __call__(self, op: Bilinear, x: Tensor, w: Tensor, axes: tuple[int, ...]) -> Tensor: ...


class SingleProduct:
    """fp32 operands, fp32 sums, whatever the process lets matrix products do."""

    half = False

    def __call__(self, op: Bilinear, x: Tensor, w: Tensor, axes: tuple[int, ...]) -> Tensor:
        return strict(op, x, w, convolution=axes != (-1,))


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
        if x.device.type == "cpu":
            result = strict(op, small, w, convolution=axes != (-1,)).to(torch.float16)
        else:
            result = op(small, w)
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


def process_choices(device: torch.device, dtype: torch.dtype, convolution: bool) -> object:
    """What the process can change from one forward to the next, and the choice of products depends on.

    convolution: whether products are made in the forward of one.
    """
    if device.type != "cuda":
        return None
    return rounding_of(device, convolution) if dtype == torch.float32 else half_sums_allowed()


def magnitude(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The power of two at or above max |x| over `axes` (kept as axes of 1), fp32; 1 where x is 0.

    At the ends of fp32's range, the nearest that fp32 holds as a normal number.
    """
    largest = x.abs().amax(axes, keepdim=True).float()
    size = torch.exp2(torch.ceil(torch.log2(largest)).clamp(-126, 127))
    return torch.where(largest > 0, size, torch.ones_like(size))


def half_sums_allowed() -> bool:
    """Whether this process lets CUDA sum fp16 products in fp16 (torch 2.7 and later; off by default)."""
    return bool(getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False))
