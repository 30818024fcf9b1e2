"""One layer's tensors, and which of them its reader took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError, widened
from lib_precision_lora.names.endings import NO_FACTORS


class Asked(Mapping[str, Tensor]):
    """A layer's tensors by role, each widened when it is taken; a look whether one is there takes nothing.

    name: of the layer, for messages; used: the roles that were taken. Raises `AdapterError` for a tensor of a
    type that cannot be read, and for a factor without values, once it is asked for.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._name = name
        self._tensors = tensors
        self._widened: dict[str, Tensor] = {}
        self.used: set[str] = set()

    def __getitem__(self, role: str) -> Tensor:
        if role not in self._widened:
            tensor = self._tensors[role]
            if tensor.numel() == 0 and role not in NO_FACTORS:
                raise AdapterError(
                    f"{self._name}: {role} has shape {list(tensor.shape)} and holds no values: the rank is "
                    "zero, or the file is incomplete"
                )
            self._widened[role] = widened(self._name, role, tensor)
            self.used.add(role)
        return self._widened[role]

    def __contains__(self, role: object) -> bool:
        return role in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
