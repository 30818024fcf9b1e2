"""Layers as Forge Neo has them: what is not on the device, or merged on the fly, is made in each forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear


class Casting:
    """parameters_manual_cast: whether weights are made in each forward, by the functions that stand here."""

    parameters_manual_cast = False
    weight_function: tuple[Any, ...] | list[Any] = ()
    bias_function: tuple[Any, ...] | list[Any] = ()

    def forward(self: Any, x: Tensor) -> Any:
        if not self.parameters_manual_cast:
            return super().forward(x)  # type: ignore[misc]
        weight, bias = (self._made(name, x) for name in ("weight", "bias"))
        if isinstance(self, nn.Conv2d):
            return self._conv_forward(x, weight, bias)
        if isinstance(self, nn.LayerNorm):
            return layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return linear(x, weight, bias)

    def _made(self: Any, name: str, x: Tensor) -> Tensor:
        value: Tensor = getattr(self, name).to(x, copy=True)
        for function in getattr(self, f"{name}_function"):
            value = function(value)
        return value


def cast_on_the_fly(model: nn.Module) -> None:
    """Make every layer of the model one of these; parameters that stand in no layer stay as they are."""
    for module in model.modules():
        if torch.is_tensor(getattr(module, "weight", None)):
            cls = type(module)
            module.__class__ = type(cls.__name__, (Casting, cls), {})
