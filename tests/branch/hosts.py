"""Models as hosts have them, small: every kind of site, and linear layers over every stored format."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.storage.formats import StoredCase, StoredLinear, stored_variant


class Linear(StoredLinear):
    """A host's linear layer: no `nn.Linear`, but named like one."""


class Holder(nn.Module):
    """A model with one layer, `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def stored_holder(name: str, matrix: Tensor) -> tuple[Holder, StoredCase]:
    """A model whose one layer holds `matrix` in a stored format; the case knows its decoded values."""
    case = stored_variant(name, matrix)
    return Holder(Linear(case.parameter, case.expected, case.module.scale_weight)), case


class RMSNorm(nn.Module):
    """As Flux has it: its weight is called `scale`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = 1e-6
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normal * self.scale).to(x.dtype)


class T5LayerNorm(nn.Module):
    """As transformers has it: an RMS norm whose epsilon is called `variance_epsilon`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.variance_epsilon = 1e-3
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (normal * self.weight).to(x.dtype)


class Mixed(nn.Module):
    """One of every kind of site; `register` is read around any module's forward."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(10, 8)
            self.linear = nn.Linear(8, 12)
            self.second = nn.Linear(12, 12, bias=False)
            self.norm = nn.LayerNorm(12)
            self.rms = RMSNorm(12)
            self.register = nn.Parameter(torch.randn(2, 12))
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.groups = nn.GroupNorm(2, 4)
        self.requires_grad_(False)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        tokens = self.rms(self.norm(self.linear(self.embedding(ids))))
        tokens = self.second(torch.cat([tokens, self.register]))
        return torch.cat([tokens.flatten(), self.groups(self.conv(image)).flatten()])


IDS = torch.tensor([1, 5, 5, 9])
IMAGE = torch.linspace(-1.0, 1.0, 2 * 3 * 5 * 6).view(2, 3, 5, 6)
SHAPES = {
    "embedding.weight": (10, 8),
    "linear.weight": (12, 8),
    "linear.bias": (12,),
    "second.weight": (12, 12),
    "norm.weight": (12,),
    "norm.bias": (12,),
    "rms.scale": (12,),
    "register": (2, 12),
    "conv.weight": (4, 3, 3, 3),
    "conv.bias": (4,),
    "groups.weight": (4,),
    "groups.bias": (4,),
}
"""Every parameter of `Mixed`."""


def image_of(model: nn.Module) -> dict[str, tuple[int, bytes]]:
    """Every parameter's identity and bytes."""
    return {
        name: (id(value), value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, value in model.named_parameters()
    }


def hooks_of(model: nn.Module) -> int:
    """How many hooks of any kind stand on the modules of a model."""
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
            module._forward_pre_hooks,
            module._backward_hooks,
        )
    )
