"""What an encoder makes of values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .weight import StoredWeight


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """entries: what the module's state dict holds, by name, all of it new memory; what is not named stays as
    it was. weight: what they decode to."""

    entries: Mapping[str, Tensor]
    weight: StoredWeight
