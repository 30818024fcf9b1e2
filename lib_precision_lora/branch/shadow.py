"""A shadow: while attached, a new parameter object `W0 + ΔW` stands in the place of the host's own.

For the few parameters that are read around their module's forward. The host's object is kept, unwritten,
and put back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib_precision_lora.adapters.adapter import AdapterError
from lib_precision_lora.branch.effective import EffectiveWeight


@dataclass(frozen=True, slots=True, eq=False)
class Shadow:
    """The parameter objects of one shadowed attribute."""

    module: weakref.ref[nn.Module]
    attribute: str
    original: nn.Parameter
    shadow: nn.Parameter

    def attach(self) -> None:
        module = self.module()
        if module is not None:
            module._parameters[self.attribute] = self.shadow

    def placed(self) -> Iterator[Tensor]:
        yield self.shadow

    def detach(self) -> None:
        """Put the original back, on the device to which the host has moved its stand-in since.

        A parameter that the host has exchanged in the meantime is the host's, and stays.
        """
        module = self.module()
        if module is None or module._parameters.get(self.attribute) is not self.shadow:
            return
        if self.original.device != self.shadow.device:
            self.original.data = self.original.data.to(self.shadow.device)
        module._parameters[self.attribute] = self.original


def make_shadow(module: nn.Module, attribute: str, original: Tensor, effective: EffectiveWeight) -> Shadow:
    """A shadow of a dense parameter, on the device of what stands in its place now.

    Raises `AdapterError` for a low-bit one, which has no dense stand-in.
    """
    present = module._parameters[attribute]
    assert present is not None
    assert isinstance(original, nn.Parameter)
    if original.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise AdapterError(
            f"it is stored as {effective.stored.kind} and read outside of its layer's forward, "
            "where no branch can stand"
        )
    wide = torch.float64 if original.dtype == torch.float64 else torch.float32
    value = original.data.to(wide) + effective.delta(wide).to(original.device)
    shadow = nn.Parameter(value.to(present.device, original.dtype), requires_grad=False)
    return Shadow(weakref.ref(module), attribute, original, shadow)
