"""The blocks of a UNet, read off the names in its checkpoint: resolution, and diffusers' names for them.

`input_blocks` go down and `output_blocks` up again through the levels; a block that changes the resolution
counts at the level of its outputs. Level k works on `⌈height / 2^k⌉ · ⌈width / 2^k⌉` latent positions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import count

RESNET: Mapping[str, str] = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
"""Parts of a residual block: in the checkpoint → in diffusers. Parts of attentions have one name in both."""

OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "time_embed.0": ("time_embedding.linear_1",),
    "time_embed.2": ("time_embedding.linear_2",),
    "label_emb.0.0": ("add_embedding.linear_1", "class_embedding.linear_1"),
    "label_emb.0.2": ("add_embedding.linear_2", "class_embedding.linear_2"),
    "input_blocks.0.0": ("conv_in",),
    "out.0": ("conv_norm_out",),
    "out.2": ("conv_out",),
}
"""Layers outside of blocks: in the checkpoint → in diffusers."""

DEEPEST_BLOCK = 4
"""Steps in the longest name of a block, `input_blocks.3.0.op`."""


@dataclass(frozen=True, slots=True)
class Block:
    """One part of a UNet: its name in the checkpoint and in diffusers, and its level."""

    name: str
    diffusers: str
    level: int


def unet_blocks(names: Collection[str]) -> tuple[Block, ...]:
    """Every block of the checkpoint; names: those of its parameters."""
    prefixes = {
        ".".join(steps[:depth])
        for steps in (name.split(".", DEEPEST_BLOCK) for name in names)
        for depth in range(2, DEEPEST_BLOCK + 1)
    }
    down = tuple(_down(prefixes))
    deepest = max((block.level for block in down), default=0)
    middle = tuple(
        Block(f"middle_block.{index}", diffusers, deepest)
        for index, diffusers in enumerate(
            ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
        )
        if f"middle_block.{index}" in prefixes
    )
    return (*down, *middle, *_up(prefixes, deepest))


def diffusers_names(module: str, blocks: Mapping[str, Block]) -> tuple[str, ...]:
    """What diffusers calls a module of the checkpoint; none where it has no name for it.

    blocks: those of the model, by their names in the checkpoint.
    """
    if module in OUTSIDE:
        return OUTSIDE[module]
    steps = module.split(".", DEEPEST_BLOCK)
    for depth in range(min(len(steps), DEEPEST_BLOCK), 1, -1):
        block = blocks.get(".".join(steps[:depth]))
        if block is not None:
            part = ".".join(steps[depth:])
            return (".".join(filter(None, (block.diffusers, RESNET.get(part, part)))),)
    return ()


def _down(prefixes: Collection[str]) -> Iterator[Block]:
    level, index = 0, 0
    for number in count(1):
        name = f"input_blocks.{number}"
        if name not in prefixes:
            return
        if f"{name}.0.op" in prefixes:
            yield Block(f"{name}.0.op", f"down_blocks.{level}.downsamplers.0.conv", level + 1)
            level, index = level + 1, 0
            continue
        yield Block(f"{name}.0", f"down_blocks.{level}.resnets.{index}", level)
        if f"{name}.1" in prefixes:
            yield Block(f"{name}.1", f"down_blocks.{level}.attentions.{index}", level)
        index += 1


def _up(prefixes: Collection[str], deepest: int) -> Iterator[Block]:
    level, index = deepest, 0
    for number in count():
        name = f"output_blocks.{number}"
        if name not in prefixes:
            return
        here = f"up_blocks.{deepest - level}"
        yield Block(f"{name}.0", f"{here}.resnets.{index}", level)
        if f"{name}.1" in prefixes and f"{name}.1.conv" not in prefixes:
            yield Block(f"{name}.1", f"{here}.attentions.{index}", level)
        index += 1
        for place in (f"{name}.1.conv", f"{name}.2.conv"):
            if place in prefixes:
                yield Block(place, f"{here}.upsamplers.0.conv", max(0, level - 1))
                level, index = max(0, level - 1), 0
