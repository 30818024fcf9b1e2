"""Which model it is, by the names of its parameters. These are the words that messages use."""

from __future__ import annotations

import re
from collections.abc import Iterable

DENOISER = "diffusion_model."
"""How a host's names of the diffusion model's parameters begin."""

UNET, FLUX, FLUX2, SD3 = "SD 1.5 or SDXL", "Flux or Chroma", "Flux 2", "SD 3"
QWEN, WAN, ANIMA, KREA = "Qwen-Image", "Wan", "Anima", "Krea 2"
LUMINA, Z_IMAGE, ERNIE = "Lumina 2", "Z-Image", "Ernie-Image"

_SIGNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (model, re.compile(pattern))
    for model, pattern in (
        (FLUX2, r"(?:double|single)_stream_modulation"),
        (SD3, r"joint_blocks\."),
        (UNET, r"input_blocks\."),
        (QWEN, r"transformer_blocks\.\d+\.img_mod\."),
        (WAN, r"blocks\.\d+\.(?:self_attn\.o\.|ffn\.)"),
        (ANIMA, r"blocks\.\d+\.adaln_modulation_"),
        (KREA, r"txtfusion\."),
        (Z_IMAGE, r"(?:noise_refiner|layers)\.\d+\.adaLN_modulation\.0\."),
        (LUMINA, r"(?:noise_refiner|layers)\.\d+\.adaLN_modulation\.1\."),
        (ERNIE, r"layers\.\d+\.self_attention\."),
        (FLUX, r"double_blocks\."),
    )
)
"""A model, and a parameter that no other has; but Flux's blocks are those of Flux 2 as well."""


def model_of(parameters: Iterable[str]) -> str | None:
    """Which model has these parameters, by their names with or without `DENOISER`; None for one that is not
    known here."""
    paths = [parameter.removeprefix(DENOISER) for parameter in parameters]
    return next((model for model, sign in _SIGNS if any(map(sign.match, paths))), None)
