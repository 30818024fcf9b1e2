"""What the plan of a LoRA on the test's model must come to, and what a host was asked for and did."""

from __future__ import annotations

from tests.host.card import Card
from tests.host.checkpoints import TEXT_LAYER, Checkpoint
from tests.host.images import Image, distance
from tests.host.lora_files import LAYERS, LoraFile, exact_output, make_lora
from tests.host.webui import Host

EXACT = 1e-5
INFERENCE = 1000
PLENTY = 10**7
UNET = tuple(layer for layer in LAYERS if layer != TEXT_LAYER)
LINEAR, CONV = (8, 8), (4, 36)
POSITIONS = 4 * 4


def allocated(*sizes: int) -> int:
    return sum(-(-size // 512) * 512 for size in sizes)


def layer_bytes(shape: tuple[int, int], rank: int) -> int:
    """An fp32 LoRA of one layer: up, down, and two numbers per rank."""
    return allocated(4 * shape[0] * rank, 4 * rank * shape[1], 4 * rank, 4 * rank)


def factor_bytes(rank: int) -> int:
    """Of a file on the four layers of UNET."""
    return 3 * layer_bytes(LINEAR, rank) + layer_bytes(CONV, rank)


def workspace_bytes(rank: int) -> int:
    """In fp32, where activations are fp32 already: three hidden states next to a convolution's outputs, or
    two next to the larger of a linear layer's hidden state and its outputs."""
    return POSITIONS * 4 * max(3 * rank + CONV[0], 2 * rank + max(rank, LINEAR[0]))


def streaming_bytes(rank: int) -> int:
    """The two largest layers."""
    return layer_bytes(LINEAR, rank) + layer_bytes(CONV, rank)


def least_bytes(rank: int) -> int:
    return streaming_bytes(rank) + workspace_bytes(rank)


def file_of(host: Host, name: str, rank: int, modules: tuple[str, ...] = UNET, seed: int = 0) -> LoraFile:
    lora = make_lora(name, seed, rank, modules)
    lora.write(host)
    return lora


def preserved(card: Card, model: str = "Model") -> float:
    """What the host was asked to keep free in the first request for this model."""
    return next(kept for names, _, kept in card.requests if names == model)


def placed(card: Card, model: str = "Model") -> list[int]:
    return [size for name, size in card.placements if name == model]


def plain(image: Image, checkpoint: Checkpoint) -> bool:
    return distance(image, exact_output(checkpoint, "a cat")) < EXACT
