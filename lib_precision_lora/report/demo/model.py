"""The demo's transformer: Flux's single-stream blocks, without positions, over weights in any stored format.

It stands for a host: it decodes a stored weight in each forward, and knows nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from lib_precision_lora.storage import stored_weight

HEAD_SIZE = 64


class Linear(nn.Module):
    """`y = x · W0ᵀ + bias`, W0 decoded to the type of x; x: [..., in], y: [..., out]."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.stored = stored_weight(weight, self)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.stored.dense(x.dtype), self.bias.to(x.dtype))


class Modulation(nn.Module):
    """`shift, scale, gate = lin(silu(vec))`, each [hidden]."""

    def __init__(self, lin: Linear) -> None:
        super().__init__()
        self.lin = lin

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        mixed: Tensor = self.lin(functional.silu(vec))
        return mixed.chunk(3, dim=-1)


class SingleBlock(nn.Module):
    """`x + gate · linear2([attention(q, k, v), gelu(h)])`;
    `q, k, v, h = linear1(norm(x) · (1 + scale) + shift)`.

    x: [tokens, hidden].
    """

    def __init__(self, modulation: Linear, linear1: Linear, linear2: Linear) -> None:
        super().__init__()
        self.modulation = Modulation(modulation)
        self.linear1 = linear1
        self.linear2 = linear2

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        hidden = x.shape[-1]
        shift, scale, gate = self.modulation(vec)
        mixed = (1 + scale) * functional.layer_norm(x, (hidden,)) + shift
        *qkv, inner = self.linear1(mixed).split([hidden, hidden, hidden, 4 * hidden], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, HEAD_SIZE)).transpose(0, 1) for part in qkv)
        attention = functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        update: Tensor = self.linear2(torch.cat((attention, functional.gelu(inner)), dim=-1))
        y: Tensor = x + gate * update
        return y


class Transformer(nn.Module):
    """The blocks in order. x: [tokens, hidden], vec: [hidden]."""

    def __init__(self, blocks: list[SingleBlock]) -> None:
        super().__init__()
        self.single_blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        for block in self.single_blocks:
            x = block(x, vec)
        return x


def build_model(parameters: Mapping[str, nn.Parameter]) -> Transformer:
    """The transformer over parameters as a file's reader gives them, by Flux's names."""

    def linear(name: str) -> Linear:
        return Linear(parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    count = len({name.split(".")[1] for name in parameters})
    return Transformer(
        [
            SingleBlock(
                linear(f"{path}.modulation.lin"), linear(f"{path}.linear1"), linear(f"{path}.linear2")
            )
            for path in (f"single_blocks.{index}" for index in range(count))
        ]
    )
