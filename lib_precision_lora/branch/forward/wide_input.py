"""The input of a widened layer: the module takes the channels that it has, the branch takes all of them.

y = module(x[in channels]) + branch(x),   x: in to in + extra channels; those that are not given are zeros
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from lib_precision_lora.adapters.adapter import AdapterError
from lib_precision_lora.storage import StoredWeight, WidenedWeight


class WideInput:
    """Stands before a module's forward and keeps what it was given for the branch behind it.

    own: the module's channels; whole: those of the effective weight; axis: that of the channels in x,
    counted from the last. A forward that fails leaves its input here until the next one.
    """

    def __init__(self, own: int, whole: int, axis: int) -> None:
        self.own, self.whole, self.axis = own, whole, axis
        self._given: Tensor | None = None

    @classmethod
    def of(cls, stored: StoredWeight) -> WideInput | None:
        """That of a layer with this weight, [out, in, *kernel]; None where it is not widened."""
        if not isinstance(stored, WidenedWeight):
            return None
        return cls(stored.own_channels, stored.shape[1], 1 - len(stored.shape))

    def narrow(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook: the module's first argument becomes a view of its own channels.

        Raises `AdapterError` for more channels than the LoRAs know.
        """
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        channels = x.shape[self.axis]
        if channels > self.whole:
            raise AdapterError(
                f"a layer that LoRAs widen from {self.own} to {self.whole} input channels is given "
                f"{channels}; leave out those LoRAs, or what gives the layer more channels"
            )
        self._given = x
        return with_input(self.own_part(x), args, kwargs)

    def take(self) -> Tensor:
        """What the module was given, once."""
        given, self._given = self._given, None
        assert given is not None
        return given

    def drop(self) -> None:
        """Let go of the input of a forward that failed."""
        self._given = None

    def own_part(self, x: Tensor) -> Tensor:
        """The module's own channels, as a view."""
        return x.narrow(self.axis, 0, min(self.own, x.shape[self.axis]))

    def completed(self, x: Tensor) -> Tensor:
        """x with zeros in the channels that are not given; a copy of the block at hand, if there are any."""
        missing = self.whole - x.shape[self.axis]
        return pad(x, (*(0, 0) * (-1 - self.axis), 0, missing)) if missing else x


def with_input(
    x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's arguments with another first one."""
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}
