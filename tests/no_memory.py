"""A device without memory: the k-th operator that allocates raises, as a full card's does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib_precision_lora.memory.meter import tensors_in

FOREVER = 10**9


class NoMemory(TorchDispatchMode):
    """Counts the operators that allocate; `times` of them, from the `first` on (1 is the first, 0 none),
    raise `torch.cuda.OutOfMemoryError`."""

    def __init__(self, first: int = 0, times: int = 1) -> None:
        super().__init__()
        self.first, self.times, self.allocations = first, times, 0

    def __torch_dispatch__(
        self,
        op: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs or {}))}
        result = op(*args, **(kwargs or {}))
        storages = [tensor.untyped_storage() for tensor in tensors_in(result)]
        made = sum(storage.nbytes() for storage in storages if storage._cdata not in given)
        if made:
            self.allocations += 1
            if 0 < self.first <= self.allocations < self.first + self.times:
                raise torch.cuda.OutOfMemoryError(f"no room for {made} bytes in {op}")
        return result

    @property
    def failed(self) -> bool:
        return 0 < self.first <= self.allocations
