"""A kind of input, how it is made from random numbers, and what may come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

MIB = 2**20


class Fault(AssertionError):
    """An input after which something was not as promised: a sentence."""


@dataclass(frozen=True, slots=True)
class Input:
    """files: by name, what lies in the folder while it is checked; rest: what else is given."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    rest: Any = None


Check = Callable[[Input], bool]
"""True where the input was accepted, False where it was refused. Whatever it raises is a fault."""


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of input.

    make: the same input for the same state of the random numbers; opened: what checks inputs, in a folder
    that is the current one and holds nothing else; seconds: of the processor, and nbytes: of memory beyond
    that before, that one input may take.
    """

    name: str
    make: Callable[[Random], Input]
    opened: Callable[[Path], AbstractContextManager[Check]]
    seconds: float = 2.0
    nbytes: int = 64 * MIB

    def input(self, seed: int, index: int) -> Input:
        return self.make(Random(f"{seed}/{self.name}/{index}"))
