"""A shadow: while attached, a new parameter object stands in the place of the host's own.

Where a parameter is read around its module's forward it holds `W0 + ΔW`; a merged layer (`merged.py`) is made
of shadows too. The host's object is kept, unwritten, and put back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib_precision_lora.adapters.adapter import AdapterError
from lib_precision_lora.branch.algebra.effective import EffectiveWeight
from lib_precision_lora.storage import DenseWeight, StoredWeight

WIDE_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class Shadow:
    """The parameter objects of one shadowed attribute."""

    module: weakref.ref[nn.Module]
    attribute: str
    original: nn.Parameter
    shadow: nn.Parameter

    @property
    def stands(self) -> bool:
        """Whether the shadow itself is what the module reads now."""
        module = self.module()
        return module is not None and module._parameters.get(self.attribute) is self.shadow

    def stands_as(self, present: Tensor, module: nn.Module, attribute: str) -> bool:
        """Whether `present`, which `module.attribute` reads, is the shadow, or the host's copy of it."""
        if present is self.shadow:
            return True
        return self.attribute == attribute and self.module() is module and self._is_copy(present)

    def attach(self) -> None:
        module = self.module()
        if module is not None:
            module._parameters[self.attribute] = self.shadow

    def placed(self) -> Iterator[Tensor]:
        """It goes where its module goes."""
        if self.shadow.device.type != "cpu":
            yield self.shadow

    def detach(self, keep: bool = True) -> None:
        """Put the original back, as the host would have moved and cast it in the meantime.

        A parameter that the host has exchanged is the host's, and stays, unless it is a copy of the shadow:
        where the host swaps layers or casts them, it makes new objects. keep: whether the shadow's values are
        needed again; where not, their memory is free before the original takes its place on the device.
        """
        module = self.module()
        present = None if module is None else module._parameters.get(self.attribute)
        ours = present is not None and (present is self.shadow or self._is_copy(present))
        place = None if present is None else (present.device, present.dtype)
        if module is not None and ours:
            module._parameters[self.attribute] = self.original
        del present
        if not keep:
            drop_values(self.shadow)
        if ours and place is not None and place != (self.original.device, self.original.dtype):
            move_values(self.original, *place)

    def _is_copy(self, present: Tensor) -> bool:
        """Whether it has the shadow's values, on whatever device and in whatever type."""
        if present is self.original or type(present) is not nn.Parameter:
            return False
        if present.shape != self.shadow.shape or not present.is_floating_point():
            return False
        with torch.inference_mode():
            return torch.equal(present.data, self.shadow.data.to(present.device, present.dtype))


def move_values(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> None:
    """Bring the values elsewhere, as `Module.to` does: the parameter stays the object that it is.

    One that was made in inference mode cannot hold values that were not.
    """
    with torch.inference_mode(parameter.is_inference()):
        parameter.data = parameter.data.to(device, dtype)


def empty_parameter(dtype: torch.dtype) -> nn.Parameter:
    """A parameter that can be given any values later, whatever mode it is made in."""
    with torch.inference_mode(False):
        return nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)


def drop_values(parameter: nn.Parameter) -> None:
    """Free the memory of a parameter that stays the object that it is."""
    with torch.inference_mode(False):
        parameter.data = torch.empty(0, dtype=parameter.dtype)


def has_dense_stand_in(parameter: Tensor, stored: StoredWeight) -> bool:
    """Whether a dense parameter can stand in its place. What it says of its own type is not enough: a
    `QuantizedTensor` says that in which its host computes."""
    return isinstance(stored, DenseWeight) and parameter.dtype in WIDE_TYPES


def make_shadow(module: nn.Module, attribute: str, original: Tensor, effective: EffectiveWeight) -> Shadow:
    """A shadow of a dense parameter, on the device of what stands in its place now.

    Raises `AdapterError` for a low-bit one, which has no dense stand-in.
    """
    present = module._parameters[attribute]
    assert present is not None
    assert isinstance(original, nn.Parameter)
    if not has_dense_stand_in(original, effective.stored):
        raise AdapterError(
            f"it is stored as {effective.stored.kind} and read outside of its layer's forward, "
            "where no branch can stand"
        )
    wide = torch.float64 if original.dtype == torch.float64 else torch.float32
    value = original.data.to(wide) + effective.delta(wide).to(original.device)
    shadow = nn.Parameter(value.to(present.device, original.dtype), requires_grad=False)
    return Shadow(weakref.ref(module), attribute, original, shadow)
