"""How many bytes of tensors were alive at once: a meter that works on every device, the CPU too."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class ByteMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`peak = max over time of Σ nbytes` of the storages that torch operators made while it was active.

    Storages that existed before, and memory that torch did not allocate (numpy's, in the decoders of the
    `gguf` package), are not counted. It slows operators down: measure time in another run.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for tensor in tensors_in((args, kwargs or {})):
            self._know(tensor, counted=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._know(tensor, counted=True)
        return result

    def _know(self, tensor: Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class PeakMeter:
    """The largest use of a card since this object was made, bytes.

    A card keeps one such figure, since its statistics were last reset. reset: reset them now, where nobody
    else relies on them; where not, the figure is ours once it is another one than it is now.
    """

    def __init__(self, device: torch.device, reset: bool) -> None:
        self._device = device
        self._before: int | None = None
        if device.type == "cuda":
            if reset:
                torch.cuda.reset_peak_memory_stats(device)
            else:
                self._before = torch.cuda.max_memory_allocated(device)

    def read(self) -> int | None:
        """None for other devices, and where what was there before has hidden it."""
        if self._device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self._device)
        return None if peak == self._before else peak


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
