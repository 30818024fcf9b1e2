"""What we rely on in the host, name by name, checked before anything is touched."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Requirement:
    """`module:path` must exist; a function that is swapped must take these parameters, in this order, for the
    host may name them.

    `path` may go through a class (`LoraLoader.refresh`). An empty `parameters` asks for existence alone. own:
    the class must define the method itself: what it would inherit does nothing. called: the function is
    called and not swapped: it must take so many arguments, whatever it calls them.
    """

    module: str
    path: str
    parameters: tuple[str, ...] = ()
    own: bool = False
    called: bool = False

    def __str__(self) -> str:
        return f"{self.module}.{self.path}"

    def failure(self) -> str | None:
        """What is wrong with it in this host, or None."""
        try:
            found: Any = importlib.import_module(self.module)
        except Exception as error:  # noqa: BLE001  importing runs the host's code, which can fail in any way
            return f"module {self.module} cannot be imported ({error})"
        for name in self.path.split("."):
            if not hasattr(found, name) or (self.own and isinstance(found, type) and name not in vars(found)):
                return f"{self} is missing"
            found = getattr(found, name)
        if not self.parameters:
            return None
        try:
            parameters = inspect.signature(found).parameters
        except (TypeError, ValueError):
            return f"{self} is not a function"
        present = list(parameters)
        if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= {
            parameter.kind for parameter in parameters.values()
        }:
            return None  # another extension's wrapper, which passes on what it gets
        if self.called:
            try:
                inspect.signature(found).bind(*self.parameters)
            except TypeError:
                return f"{self} takes ({', '.join(present)}), not ({', '.join(self.parameters)})"
            return None
        if tuple(name for name in present if name in self.parameters) != self.parameters:
            return f"{self} takes ({', '.join(present)}), not ({', '.join(self.parameters)})"
        return None


def failures(requirements: Iterable[Requirement]) -> list[str]:
    """Every requirement that this host does not meet, in words."""
    return [failure for failure in (requirement.failure() for requirement in requirements) if failure]
