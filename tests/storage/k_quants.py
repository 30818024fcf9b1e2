"""Random valid blocks of the K-quants, which the gguf package decodes but cannot make."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ScaleFields:
    """Where a block keeps its fp16 fields, and minimum/scale for values centred on zero."""

    scale: int
    minimum: int | None
    ratio: float


K_QUANTS = {
    "Q2_K": ScaleFields(80, 82, 1.5),
    "Q3_K": ScaleFields(108, None, 0.0),
    "Q4_K": ScaleFields(0, 2, 7.5),
    "Q5_K": ScaleFields(0, 2, 15.5),
    "Q6_K": ScaleFields(208, None, 0.0),
}


def random_blocks(name: str, count: int, spread: float, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [count, block_bytes]: random codes and sub-scales, values of standard deviation near `spread`."""
    member = gguf.GGMLQuantizationType[name]
    fields = K_QUANTS[name]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[member][1]), dtype=np.uint8)
    write_scales(blocks, fields, np.ones(count))
    unit = float(gguf.quants.dequantize(blocks, member).std())
    write_scales(blocks, fields, spread / unit * random.uniform(0.5, 1.5, count))
    return blocks


def write_scales(blocks: npt.NDArray[np.uint8], fields: ScaleFields, scale: npt.NDArray[np.float64]) -> None:
    """Puts scale [n], and minimum = ratio · scale where the type has one, into blocks [n, block_bytes]."""
    blocks[:, fields.scale : fields.scale + 2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    if fields.minimum is not None:
        minimum = (fields.ratio * scale).astype(np.float16).view(np.uint8).reshape(-1, 2)
        blocks[:, fields.minimum : fields.minimum + 2] = minimum
