"""Which diffusion model a checkpoint holds, and how many tokens its layers see.

Names are those of host checkpoints, below `model.diffusion_model.` or without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lib_precision_lora.names.models import ANIMA, ERNIE, FLUX2, KREA, LUMINA, QWEN, WAN, Z_IMAGE, model_of

FlowKind = Literal["once", "text", "image", "joint", "positions", "vectors"]
Family = Literal[
    "UNet", "MMDiT", "Flux", "Flux 2", "Qwen-Image", "Wan", "Anima", "Krea 2", "NextDiT", "Ernie-Image"
]
LATENT = 8
"""Pixels of one latent position, each way."""

PATCH = 2
"""Latent positions of one token of a transformer, each way. Flux 2 and Ernie-Image have 16 pixels in a
position, and a token in each: as many tokens."""


class UnknownArchitectureError(ValueError):
    """The names and shapes are of no known diffusion model; one sentence."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What flows through a layer, for each image: one vector (`once`: embeddings, modulation), the prompt's
    tokens `count` times, the image's, both (`joint`), latent positions halved `level` times, or `count`
    vectors."""

    kind: FlowKind
    level: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Architecture:
    """guided: CFG runs each image twice; half: the host computes in fp16, else in bf16; text_tokens: of one
    prompt of usual length, as the host pads it."""

    name: str
    family: Family
    guided: bool
    half: bool
    text_tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be made: width and height in pixels; images: in one forward, guidance included."""

    width: int
    height: int
    images: int
    text_tokens: int

    def tokens(self, flow: Flow) -> int:
        """Rows of the matrix that a layer of this flow multiplies in one forward."""
        return self.images * self.tokens_per_image(flow)

    def tokens_per_image(self, flow: Flow) -> int:
        latent = (-(-self.height // LATENT), -(-self.width // LATENT))
        image = -(-latent[0] // PATCH) * -(-latent[1] // PATCH)
        scale = 1 << flow.level
        return {
            "once": 1,
            "text": self.text_tokens * flow.count,
            "image": image,
            "joint": image + self.text_tokens,
            "positions": -(-latent[0] // scale) * -(-latent[1] // scale),
            "vectors": flow.count,
        }[flow.kind]


SD15 = Architecture("SD 1.5", "UNet", guided=True, half=True, text_tokens=77)
SD2 = Architecture("SD 2", "UNet", guided=True, half=True, text_tokens=77)
SDXL = Architecture("SDXL", "UNet", guided=True, half=True, text_tokens=77)
SDXL_REFINER = Architecture("SDXL refiner", "UNet", guided=True, half=True, text_tokens=77)
SD3_MEDIUM = Architecture("SD 3 medium", "MMDiT", guided=True, half=True, text_tokens=77 + 256)
SD35_MEDIUM = Architecture("SD 3.5 medium", "MMDiT", guided=True, half=True, text_tokens=77 + 256)
SD35_LARGE = Architecture("SD 3.5 large", "MMDiT", guided=True, half=True, text_tokens=77 + 256)
FLUX_DEV = Architecture("Flux dev", "Flux", guided=False, half=False, text_tokens=256)
FLUX_SCHNELL = Architecture("Flux schnell", "Flux", guided=False, half=False, text_tokens=256)
CHROMA = Architecture("Chroma", "Flux", guided=True, half=False, text_tokens=256)
QWEN_IMAGE = Architecture(QWEN, "Qwen-Image", guided=False, half=False, text_tokens=256)
FLUX_2 = Architecture(FLUX2, "Flux 2", guided=False, half=False, text_tokens=512)
WAN_2 = Architecture(WAN, "Wan", guided=False, half=True, text_tokens=512)
ANIMA_2B = Architecture(ANIMA, "Anima", guided=True, half=False, text_tokens=512)
KREA_2 = Architecture(KREA, "Krea 2", guided=False, half=False, text_tokens=256)
LUMINA_2 = Architecture(LUMINA, "NextDiT", guided=True, half=False, text_tokens=256)
Z_IMAGE_6B = Architecture(Z_IMAGE, "NextDiT", guided=False, half=False, text_tokens=256)
ERNIE_IMAGE = Architecture(ERNIE, "Ernie-Image", guided=False, half=False, text_tokens=256)
"""Those of Forge Neo: guided as its presets are; the tokens of a prompt that it does not pad are a guess. Of
Wan, whose images are frames, one frame is counted."""

KNOWN = (
    *(SD15, SD2, SDXL, SDXL_REFINER, SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE),
    *(FLUX_DEV, FLUX_SCHNELL, CHROMA),
    *(QWEN_IMAGE, FLUX_2, WAN_2, ANIMA_2B, KREA_2, LUMINA_2, Z_IMAGE_6B, ERNIE_IMAGE),
)
_BY_NAME = {known.name: known for known in KNOWN}

_BY_CONTEXT = {768: SD15, 1024: SD2, 1280: SDXL_REFINER, 2048: SDXL}
_CROSS_KEYS = re.compile(r"input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight")


def recognize(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """The architecture of a diffusion model; shapes: of its parameters, by name.

    Raises `UnknownArchitectureError`.
    """
    known = _BY_NAME.get(model_of(shapes) or "")
    if known is not None:
        return known
    if "double_blocks.0.img_attn.qkv.weight" in shapes:
        if any(name.startswith("distilled_guidance_layer.") for name in shapes):
            return CHROMA
        return FLUX_DEV if "guidance_in.in_layer.weight" in shapes else FLUX_SCHNELL
    if "joint_blocks.0.context_block.attn.qkv.weight" in shapes and "x_embedder.proj.weight" in shapes:
        if sum(shapes["x_embedder.proj.weight"][:1]) > 24 * 64:
            return SD35_LARGE
        dual = "joint_blocks.0.x_block.attn2.qkv.weight" in shapes
        return SD35_MEDIUM if dual else SD3_MEDIUM
    if "input_blocks.0.0.weight" in shapes:
        context = {sum(shape[1:2]) for name, shape in shapes.items() if _CROSS_KEYS.fullmatch(name)}
        if len(context) == 1 and context <= _BY_CONTEXT.keys():
            return _BY_CONTEXT[context.pop()]
        raise UnknownArchitectureError(
            f"a UNet whose prompt has {sorted(context)[:3]} features is none of "
            f"{', '.join(f'{known.name} ({size})' for size, known in _BY_CONTEXT.items())}"
        )
    raise UnknownArchitectureError(
        f"none of its {len(shapes)} tensors has a name by which a diffusion model is known "
        f"({', '.join(known.name for known in KNOWN)})"
    )
