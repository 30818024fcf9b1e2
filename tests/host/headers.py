"""Files of which only the names of the tensors matter, and names that tell how a model is stored."""

from __future__ import annotations

import json
from pathlib import Path

LAYER = "model.diffusion_model.double_blocks.0.img_attn.proj"
NF4, FP4 = (f"{LAYER}.weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
SCALED = f"{LAYER}.scale_weight"
T5 = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.k"


def write_header(path: Path, *names: str) -> Path:
    """A safetensors file of which only the names matter."""
    header = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in names})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    return path
