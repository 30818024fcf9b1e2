"""Rotations from skew-symmetric matrices: Cayley's transform, exact and truncated.

    Q = −Qᵀ        R = (I + Q) · (I − Q)⁻¹ = I + 2 Q + 2 Q² + 2 Q³ + …        R(−Q) = R(Q)ᵀ

Only deviations R − I are returned. All in fp64; Q: [..., b, b].
"""

from __future__ import annotations

import torch
from torch import Tensor


def cayley_deviation(skew: Tensor) -> Tensor:
    """`R − I = 2 Q (I − Q)⁻¹`."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    deviation: Tensor = 2.0 * torch.linalg.solve(identity - skew, skew, left=False)
    return deviation


def truncated_deviation(skew: Tensor) -> Tensor:
    """`R₅ − I = 2 Q + 2 Q² + 2 Q³ + Q⁴`, the series of five terms with the last one halved.

    `R₅ = (I − Q⁴) R`, exactly: where Q turns by θ, R₅ shrinks by θ⁴, and R turns by 2θ / √(1 + θ²).
    Source: OFTv2 (arXiv 2506.19847), with PEFT 0.18's last term.
    """
    square = skew @ skew
    return 2.0 * (skew + square + square @ skew) + square @ square


def unpacked_skew(packed: Tensor, size: int) -> Tensor:
    """Q from its upper triangle by rows: [count, size · (size − 1) / 2] → [count, size, size]."""
    skew = packed.new_zeros(packed.shape[0], size, size)
    above, right = torch.triu_indices(size, size, 1, device=packed.device)
    skew[:, above, right] = packed
    return skew - skew.transpose(-1, -2)


def triangle_size(elements: int) -> int | None:
    """The size of the matrix whose strict upper triangle has so many elements; None where there is none."""
    size = round((1.0 + (1.0 + 8.0 * elements) ** 0.5) / 2.0)
    return size if size > 1 and size * (size - 1) // 2 == elements else None
