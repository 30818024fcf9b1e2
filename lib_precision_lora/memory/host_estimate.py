"""What Forge keeps free for the generation itself: its own estimate, taken over as it is.

    max(1 GiB, 1.28 · 2 B · (height / 8) · (width / 8) · 16384 · size)

B: images of a batch, counted twice whether guided or not; size: bytes of the computation type.
Source: `KModel.memory_required`, `sampling_prepare` and `minimum_inference_memory` of Forge (dfdcbab), with
PyTorch's attention. 1 GiB is what Forge starts with; its GPU Weights slider changes it.
"""

from __future__ import annotations

MINIMUM = 2**30
SCALE = 1.28
BYTES_PER_POSITION = 16384


def host_inference_bytes(width: int, height: int, batch: int, element_bytes: int = 2) -> int:
    """The estimate for this many images of this many pixels, in bytes."""
    positions = 2 * batch * (height // 8) * (width // 8)
    return max(MINIMUM, int(SCALE * positions * element_bytes * BYTES_PER_POSITION))
