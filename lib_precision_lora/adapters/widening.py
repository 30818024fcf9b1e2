"""Input layers: adapters and layers of different numbers of input channels.

    W: [out, in, *kernel]   Δ: [out, in', *kernel]   →   [W | 0] + [Δ | 0], max(in, in') channels

Channels that only one of the two has count as zeros in the other. A control LoRA is wider than its layer:
the channels behind the layer's own are the control image's.
"""

from __future__ import annotations

import dataclasses
import math

from torch.nn.functional import pad

from lib_precision_lora.adapters.adapter import Adapter, AdapterError
from lib_precision_lora.adapters.diff import Assign, Diff
from lib_precision_lora.adapters.lora import LoRA


def channels_of(adapter: Adapter, shape: tuple[int, ...]) -> int:
    """The input channels in' of an adapter for an input layer whose weight is `shape`: [out, in, *kernel].

    Raises `AdapterError` where anything else differs, or the adapter is of a kind whose channels must be
    those of the layer: all but LoRA, `diff` and `set`.
    """
    fitting = shape
    if len(shape) > 1:
        fitting = (shape[0], _channels(adapter, shape), *shape[2:])
    try:
        adapter.check(fitting)
    except AdapterError:
        adapter.check(shape)
        raise
    return fitting[1] if len(shape) > 1 else 1


def with_channels(adapter: Adapter, shape: tuple[int, ...]) -> Adapter:
    """The adapter for a weight of this shape, [out, channels, *kernel]: zeros in the channels behind its own.

    Itself where it fits. Raises `AdapterError` for one that has more channels, and for one of fewer that is
    no LoRA or `diff`.
    """
    try:
        adapter.check(shape)
        return adapter
    except AdapterError as error:
        if not isinstance(adapter, (LoRA, Diff)):
            raise AdapterError(
                f"a {adapter.kind} of fewer channels cannot join an input layer that another LoRA widens to "
                f"{shape[1]} ({error}); use one of the two at a time"
            ) from error
        if channels_of(adapter, shape) > shape[1]:
            raise
    if isinstance(adapter, LoRA):
        missing = math.prod(shape[1:]) - adapter.down.shape[1]
        fitting: Adapter = dataclasses.replace(adapter, down=pad(adapter.down, (0, missing)))
    else:
        kernel_axes = (0, 0) * (len(shape) - 2)
        fitting = Diff(pad(adapter.value, (*kernel_axes, 0, shape[1] - adapter.value.shape[1])))
    fitting.check(shape)
    return fitting


def _channels(adapter: Adapter, shape: tuple[int, ...]) -> int:
    if isinstance(adapter, LoRA):
        return adapter.down.shape[1] // math.prod(shape[2:])
    if isinstance(adapter, (Diff, Assign)) and adapter.value.ndim == len(shape):
        return adapter.value.shape[1]
    return shape[1]
