"""The least time that a card needs for kernels whose bytes and products are counted: a roofline.

    time = Σ over kernels of max(bytes / bandwidth, flops / peak) + launch

It is no measurement. Kernels reach neither figure in full, and what stays in a card's cache between two
kernels is counted as if it came from memory each time. Both hold for every way that is compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.kernels import Kernel

HALF_FLOPS, FP32_FLOPS = 512, 256
"""Per clock and multiprocessor: dense fp16 or bf16 products summed in fp32 in tensor cores, and fp32 ones
outside of them. The same for GeForce cards of Ampere and Ada: NVIDIA's whitepapers "Ampere GA102" (GeForce
3080: 59.5 TFLOPS in fp16 with fp32 sums) and "Ada" (GeForce 4090: 165.2)."""

LAUNCH = 5e-6
"""Seconds per kernel that PyTorch starts one by one. An assumption: 3 to 10 µs are usual. Where the card is
busy with the kernel before, a launch costs less."""


@dataclass(frozen=True, slots=True)
class Card:
    """bandwidth: bytes per second; clock: boost, in Hz."""

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float

    def peak(self, fp32: bool) -> float:
        """FLOPs per second of dense products."""
        return self.multiprocessors * self.clock * (FP32_FLOPS if fp32 else HALF_FLOPS)

    def seconds(self, kernels: Iterable[Kernel], launch: float = LAUNCH) -> float:
        return sum(
            max(kernel.bytes / self.bandwidth, kernel.flops / self.peak(kernel.fp32)) + launch
            for kernel in kernels
        )


CARDS = (
    Card("RTX 3060", 360e9, 28, 1.777e9),
    Card("RTX 4070", 504.2e9, 46, 2.475e9),
    Card("RTX 4090", 1008e9, 128, 2.52e9),
)
"""Of 12, 12 and 24 GB. From NVIDIA's specifications of these products: memory bandwidth, number of streaming
multiprocessors (CUDA cores / 128), boost clock."""
