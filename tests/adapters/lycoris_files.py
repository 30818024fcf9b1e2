"""Layers as `lycoris-lora` trains them, with random values: the file, and the weight that it means.

The weight is read off the library's own forward, which is what was trained: unit inputs come out as its
columns. Its `get_merged_weight` agrees, but for LoHa and LoKr, where it multiplies with alpha / rank twice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

Make = Callable[[str, nn.Module], LycorisBaseModule]

LAYERS: Mapping[str, Callable[[], nn.Module]] = {
    "linear": partial(nn.Linear, 48, 64),
    "conv": partial(nn.Conv2d, 16, 32, 3),
    "conv-1x1": partial(nn.Conv2d, 16, 32, 1),
    "conv-1d": partial(nn.Conv1d, 16, 32, 5),
}
ROTATIONS = (DiagOFTModule, ButterflyOFTModule)
"""Their Cayley transform does not run in float64."""

WD_OUT = {"weight_decompose": True, "wd_on_out": True}
WD_IN = {"weight_decompose": True, "wd_on_out": False}
FACTORED = {"lora_dim": 2, "alpha": 1, "factor": 4}
KINDS: Mapping[str, Make] = {
    "lora": partial(LoConModule, lora_dim=4, alpha=2),
    "lora-rank-stabilized": partial(LoConModule, lora_dim=4, alpha=2, rs_lora=True),
    "lora-scalar": partial(LoConModule, lora_dim=4, alpha=2, use_scalar=True),
    "lora-tucker": partial(LoConModule, lora_dim=4, alpha=2, use_tucker=True),
    "dora-out": partial(LoConModule, lora_dim=4, alpha=2, **WD_OUT),
    "dora-in": partial(LoConModule, lora_dim=4, alpha=2, **WD_IN),
    "dora-tucker": partial(LoConModule, lora_dim=4, alpha=2, use_tucker=True, **WD_OUT),
    "loha": partial(LohaModule, lora_dim=3, alpha=1),
    "loha-streamed": partial(LohaModule, lora_dim=12, alpha=4),
    "loha-tucker": partial(LohaModule, lora_dim=3, alpha=1, use_tucker=True),
    "loha-scalar": partial(LohaModule, lora_dim=3, alpha=1, use_scalar=True),
    "loha-dora-out": partial(LohaModule, lora_dim=3, alpha=1, **WD_OUT),
    "loha-dora-in": partial(LohaModule, lora_dim=3, alpha=1, **WD_IN),
    "loha-streamed-dora-out": partial(LohaModule, lora_dim=12, alpha=4, **WD_OUT),
    "lokr-full": partial(LokrModule, lora_dim=10000, alpha=3, factor=4, full_matrix=True),
    "lokr-factored": partial(LokrModule, **FACTORED),
    "lokr-square-root": partial(LokrModule, lora_dim=2, alpha=1, factor=-1),
    "lokr-unbalanced": partial(LokrModule, unbalanced_factorization=True, **FACTORED),
    "lokr-both": partial(LokrModule, lora_dim=1, alpha=0.5, factor=8, decompose_both=True),
    "lokr-tucker": partial(LokrModule, use_tucker=True, **FACTORED),
    "lokr-dora-out": partial(LokrModule, **FACTORED, **WD_OUT),
    "lokr-dora-in": partial(LokrModule, **FACTORED, **WD_IN),
    "lokr-full-dora-out": partial(LokrModule, lora_dim=10000, factor=4, full_matrix=True, **WD_OUT),
    "glora": partial(GLoRAModule, lora_dim=4, alpha=2),
    "glora-scalar": partial(GLoRAModule, lora_dim=4, alpha=2, use_scalar=True),
    "ia3-out": IA3Module,
    "ia3-in": partial(IA3Module, train_on_input=True),
    "oft": partial(DiagOFTModule, lora_dim=8),
    "oft-constraint": partial(DiagOFTModule, lora_dim=8, constraint=0.005),
    "oft-loose-constraint": partial(DiagOFTModule, lora_dim=8, constraint=10.0),
    "oft-rescale": partial(DiagOFTModule, lora_dim=8, rescaled=True),
    "oft-constraint-rescale": partial(DiagOFTModule, lora_dim=8, constraint=0.005, rescaled=True),
    "boft": partial(ButterflyOFTModule, lora_dim=8),
    "boft-rescale": partial(ButterflyOFTModule, lora_dim=8, rescaled=True),
    "boft-constraint": partial(ButterflyOFTModule, lora_dim=4, constraint=0.005),
    "full": FullModule,
    "lora-rank-dropout": partial(
        LoConModule, lora_dim=4, alpha=2, dropout=0.2, rank_dropout=0.5, rank_dropout_scale=True
    ),
}


@dataclass(frozen=True)
class Trained:
    """layer: the base in fp32; file: as the library saves it, in fp32, module name "lycoris_layer".

    weight: what the library's forward multiplies with; merged: what it merges, float64 or its best.
    """

    layer: nn.Module
    file: dict[str, Tensor]
    weight: Tensor
    merged: Tensor
    scale: float


@cache
def trained(kind: str, layer_kind: str, seed: int = 0) -> Trained:
    """One layer with random values in everything that is trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * seed + list(KINDS).index(kind))
        layer = LAYERS[layer_kind]().requires_grad_(False)
        wide = copy.deepcopy(layer)
        module = KINDS[kind]("layer", wide)
        randomize(module)
    precise = not isinstance(module, ROTATIONS)
    if precise:
        wide.double()
        module.double()
    if isinstance(module, FullModule):
        module.apply_to()
    module.eval()
    with torch.no_grad():
        file = {
            key: value.detach().clone() for key, value in module.state_dict(prefix="lycoris_layer.").items()
        }
        merged = module.get_merged_weight(1.0, layer.weight.shape)[0]
        units = unit_inputs(layer).to(merged.dtype)
        outputs = module(units) - module(torch.zeros_like(units[:1]))
    weight = outputs.flatten(1).T.reshape(layer.weight.shape)
    single = {key: value.float() if value.is_floating_point() else value for key, value in file.items()}
    return Trained(layer, single, weight.double(), merged.double(), getattr(module, "scale", 1.0))


def randomize(module: nn.Module) -> None:
    """fp32 values of the size that trainings reach, in every parameter."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            leaf = name.split(".")[-1]
            if leaf == "dora_scale":
                parameter.mul_(1.0 + 0.1 * torch.randn_like(parameter))
            elif leaf == "rescale":
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif leaf == "scalar":
                parameter.fill_(0.5)
            elif leaf == "oft_blocks":
                parameter.copy_(0.05 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.1 * torch.randn_like(parameter))


def unit_inputs(layer: nn.Module) -> Tensor:
    """One input per column of the weight: [columns, in] or [columns, in, *kernel]."""
    shape = layer.weight.shape[1:]
    return torch.eye(math.prod(shape)).reshape(-1, *shape)
