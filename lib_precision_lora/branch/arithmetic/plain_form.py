"""The form of a plain stack: which types its products take, and what they take of memory.

A stack is plain where nothing but low-rank terms is added, in the activations' own type: on a card, and for
bf16 beside a linear module on a CPU for which torch has products of bf16.

    hidden = x · downᵀ               fp32; fp16 where `narrow`
    parts  = hidden · scale          in the activations' type, `columns` for each rank
    y     += factor · parts · upᵀ    one rounding

    bf16    down, up      one part of a bf16 factor, two of any other
            hidden        two parts: h ≈ h₀ + h₁
            h · u       = h₀ u₀ − (−h₁) u₀ + h₀ u₁
    fp16    down, up      one part each, every row of down and column of up at a power of two of its own
            hidden        one part, at a power of two below which it stays in range whatever x is
    fp32    down, up      as they are, in fp32

A CPU has no products of bf16 that leave in fp32. Where `apart`, two products make the two parts of hidden:

    h₀ = x · downᵀ               h₁ = x · downᵀ − h₀, rounded once: what the first has lost
    h · u = h₀ u₀ + h₁ u₀ + h₀ u₁
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lib_precision_lora.branch.arithmetic.parts import part_count
from lib_precision_lora.branch.arithmetic.product import Compute, half_sums_allowed
from lib_precision_lora.memory.chunks import FP32, WORKSPACE_BYTES
from lib_precision_lora.strict_product import rounding_of

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)

WIDENED_BYTES = 2 * WORKSPACE_BYTES
"""What an fp32 copy of x may take, where a card cannot sum half-precision products into fp32."""

PLAIN_HIDDEN_BYTES = WORKSPACE_BYTES // 4
"""What hidden of several samples of a convolution takes at once, unless that of one takes more."""


@dataclass(frozen=True, slots=True)
class PlainForm:
    """activations: their type, which the products take; down_parts, up_parts: of the factors.

    widens: x is brought to fp32 for the first product; narrow: hidden leaves it in fp16; apart: hidden leaves
    two products in two parts.
    """

    activations: torch.dtype
    down_parts: int
    up_parts: int
    widens: bool
    narrow: bool
    apart: bool = False

    @classmethod
    def of(
        cls,
        compute: Compute,
        device: torch.device,
        activations: torch.dtype,
        factors: Iterable[tuple[torch.dtype, torch.dtype]],
        convolution: bool,
    ) -> PlainForm | None:
        """That of a stack; None where its products are made with more care.

        factors: types of up and down, of each low-rank term; convolution: in which nothing but fp16 can be
        summed in fp32 without a copy of x.
        """
        apart = not is_card(device)
        if apart and (activations != torch.bfloat16 or convolution or not multiplies_bf16(device)):
            return None
        if not _keeps_its_type(compute, activations):
            return None
        half = activations == torch.float16
        if (convolution and not half) or (half and half_sums_allowed()):
            return None
        if activations == torch.float32 and rounding_of(device, convolution) != "none":
            return None
        sums = apart or activations == torch.float32 or sums_in_fp32(device)
        ups, downs = zip(*factors, strict=True)
        return cls(
            activations,
            max(part_count(source, activations) for source in downs),
            max(part_count(source, activations) for source in ups),
            widens=not sums and not half,
            narrow=half and (convolution or not sums),
            apart=apart,
        )

    @property
    def columns(self) -> int:
        """Columns of the second product for each rank."""
        return 1 + self.up_parts if self.activations == torch.bfloat16 else 1

    def down_bytes(self, rank: int, inputs: int) -> int:
        return self.down_parts * rank * inputs * self.activations.itemsize

    def up_bytes(self, rank: int, rows: int) -> int:
        """Of one range of rows."""
        return self.up_parts * rank * rows * self.activations.itemsize

    @property
    def signed(self) -> bool:
        """Whether the second part of hidden is minus what the first has lost."""
        return self.columns > 1 and not self.apart

    @property
    def signs_bytes(self) -> int:
        """Of the signs of two parts; 0 without them."""
        return 2 * self.activations.itemsize if self.signed else 0

    def columns_bytes(self, rank: int, rows: int) -> int:
        """Of the columns that a forward makes of one range of rows; 0 where they are the factor itself."""
        return self.columns * rank * rows * self.activations.itemsize if self.columns > 1 else 0

    def widened_bytes(self, rank: int, inputs: int) -> int:
        """Of down in fp32, where a forward makes it."""
        return FP32 * self.down_parts * rank * inputs if self.widens else 0

    def hidden_bytes(self, rank: int) -> int:
        """Of one token, or of one position of a convolution; where `apart`, with what is beside it."""
        if self.apart:
            # the two products, what is scaled in fp32 and both parts of it; or these and the parts together
            halves = max(self.down_parts + 3, self.columns + 2)
            return rank * (self.activations.itemsize * halves + FP32) - self.parts_bytes(rank)
        size = self.activations.itemsize if self.narrow else FP32
        return size * self.down_parts * rank

    def parts_bytes(self, rank: int) -> int:
        """Of one token; 0 where the parts take the place of hidden."""
        in_place = self.narrow or self.activations == torch.float32
        return 0 if in_place else self.activations.itemsize * self.columns * rank

    def token_bytes(self, rank: int) -> int:
        return self.hidden_bytes(rank) + self.parts_bytes(rank)


def is_card(device: torch.device) -> bool:
    """Whether this device counts kernels and bytes rather than multiplications."""
    return device.type == "cuda"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether torch multiplies bf16 on this device with instructions for it, or as fast as it multiplies at
    all, and `addmm` rounds its sum once.

    Elsewhere (a CPU without AVX-512) products of bf16 take about as long as the layer, and fp32 ones do not.
    """
    return device.type == "cpu" and _cpu_multiplies_bf16()


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    try:
        supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return False
    return supported and keeps_what_is_lost()


def keeps_what_is_lost() -> bool:
    """Whether `x · w − round(x · w)` leaves `addmm` as a number: 1 + 2⁻¹⁰ is 1 in bf16, and 2⁻¹⁰ is lost."""
    x = torch.tensor([[1.0, 2.0**-10]], dtype=torch.bfloat16).repeat(32, 32)
    w = torch.ones(64, 32, dtype=torch.bfloat16)
    high = torch.mm(x, w)
    low = torch.addmm(high, x, w, beta=-1)
    return bool((high.double() + low.double() == 32 * (1 + 2.0**-10)).all())


def _keeps_its_type(compute: Compute, activations: torch.dtype) -> bool:
    """Whether the compute mode multiplies activations in their own type."""
    if activations not in ACTIVATIONS:
        return False
    wanted = {"auto": activations, "fp16": torch.float16, "fp32": torch.float32}[compute]
    return wanted == activations


def sums_in_fp32(device: torch.device) -> bool:
    """Whether this build and device give half-precision products in fp32 (torch 2.8 and later)."""
    return _sums_in_fp32(device.type)


@functools.cache
def _sums_in_fp32(device_type: str) -> bool:
    one = torch.ones(1, 1, dtype=torch.float16, device=device_type)
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except torch.cuda.OutOfMemoryError:  # says nothing of the build
        raise
    except (TypeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return False
    return True
