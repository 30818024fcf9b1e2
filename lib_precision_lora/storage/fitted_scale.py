"""The scale with which values are written: as it is, or larger where they leave the range that it gives."""

from __future__ import annotations

import torch
from torch import Tensor

from .weight import StorageError


def fitted_scale(
    values: Tensor, scale: Tensor, own: Tensor, limit: float, reach: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """(scale in fp32, the same as the host keeps it or None where it stays).

        s' = s where max|W| ≤ reach · |s|, else max|W| / limit        by row, where each row has its own

    values: [out, ...]; scale: [1, ...] or [out, 1, ...]; own: the host's, of any shape and type; limit: the
    largest value of the stored type; reach: the largest that is rounded to it, `limit` by default.
    Raises StorageError for values that are not finite, and for a scale that the host's type cannot hold.
    """
    scale = scale.to(values.device, torch.float32)
    largest = values.reshape(scale.numel(), -1).abs().amax(1).view(scale.shape)
    if not bool(largest.isfinite().all()):
        raise StorageError("a value of it would not be finite; lower the strengths of the LoRAs")
    too_small = largest > (limit if reach is None else reach) * scale.abs()
    if not bool(too_small.any()):
        return scale, None
    written = torch.where(too_small, largest / limit, scale).to(own.dtype).reshape(own.shape)
    scale = written.to(torch.float32).reshape(scale.shape)
    if not bool((scale[too_small].isfinite() & (scale[too_small] != 0)).all()):
        raise StorageError(
            f"it needs a scale of {float(largest.max()) / limit:.3g}, which {own.dtype} does not have; "
            "lower the strengths of the LoRAs, or store the checkpoint in a wider type"
        )
    return scale, written


def divided(values: Tensor, scale: Tensor) -> Tensor:
    """`values / scale`; by 1 where the scale is 0, since all decodes to 0 there."""
    return values / torch.where(scale == 0, torch.ones_like(scale), scale)
