"""What a branch and its layer cost a card, each counted in multiplications per token.

    layer    max(rows · columns, NUMBER · (channels + rows)) + LAUNCH
    branch   multiplications + NUMBER · numbers + LAUNCH · kernels

NUMBER is what a card multiplies while it moves one number, LAUNCH what it multiplies for each token of a pass
while a kernel is started. Both are those of an RTX 4070 by public figures (58.3 TFLOPS in fp16 with fp32
sums, 504 GB/s) and 5 µs per launch. In fp32 it multiplies half as much while it moves twice the bytes, which
is left out. A slower card weighs a branch less, a faster one more.
`benchmarks/roofline.py` is the count of which this is the short form.
"""

from __future__ import annotations

MULTIPLICATIONS = 58.3e12 / 2
"""Per second."""

NUMBER = 2 * MULTIPLICATIONS / 504.2e9
TOKENS = 2048
"""Of one pass of SDXL at 1024² with guidance in its deeper half, or of SD 1.5 at 512² in the middle."""

LAUNCH = 5e-6 * MULTIPLICATIONS / TOKENS

PLAIN_KERNELS = 3
"""Of a plain stack in the activations' type: two products, and the scale between them."""

OTHER_KERNELS = 6
"""Of each step that is not of low rank, and of each turn: its products, and copies in fp32 around them."""


def layer_cost(rows: int, columns: int, channels: int) -> float:
    """Of [rows, columns] weights, a kernel's positions among the columns; channels: of the input."""
    return max(rows * columns, NUMBER * (channels + rows)) + LAUNCH


def branch_cost(multiplications: int, rows: int, channels: int, others: int) -> float:
    """others: steps that are not of low rank, and turns, each of which reads its input and adds to y."""
    numbers = (channels + 2 * rows) * (1 + 2 * others)  # in fp32 where it is not plain
    return multiplications + NUMBER * numbers + LAUNCH * (PLAIN_KERNELS + OTHER_KERNELS * others)
