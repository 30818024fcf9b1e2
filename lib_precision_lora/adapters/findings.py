"""What people should know of a file that is applied: sentences that count layers and name the first."""

from __future__ import annotations

from lib_precision_lora.names.endings import module_of

SHOWN = 200
"""Characters of a name in a sentence."""

MOST_SENTENCES = 12
"""A file that is not understood may say something else of each layer."""


class Findings:
    """Gathers what is said of layers; what is the same of several is one sentence."""

    def __init__(self) -> None:
        self._parts: dict[str, list[str]] = {}
        self._clauses: dict[str, list[str]] = {}

    def part(self, key: str) -> None:
        """A key of a layer that has an adapter, which does not use it."""
        name = module_of(key)
        ending = key[len(name) :] or f".{key.rpartition('.')[2]}"
        self._parts.setdefault(ending, []).append(key)

    def about(self, clause: str, layer: str) -> None:
        """Something that holds for this layer."""
        self._clauses.setdefault(clause, []).append(layer)

    def sentences(self) -> tuple[str, ...]:
        parts = (
            f"{_count(keys, 'tensor')} of layers that it patches {_verb(keys)} not understood, so that the "
            f"result is not what was trained ({ending[:SHOWN]}; the first is {keys[0][:SHOWN]})"
            for ending, keys in self._parts.items()
        )
        clauses = (
            f"{clause}; the tensors count ({_count(layers, 'layer')}, the first is {layers[0][:SHOWN]})"
            for clause, layers in self._clauses.items()
        )
        said = (*parts, *clauses)
        hidden = len(said) - MOST_SENTENCES
        return said if hidden <= 0 else (*said[:MOST_SENTENCES], f"and {hidden} more of such findings")


def _count(things: list[str], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


def _verb(things: list[str]) -> str:
    return "is" if len(things) == 1 else "are"
