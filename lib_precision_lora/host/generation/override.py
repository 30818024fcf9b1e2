"""What one generation is to do differently: how it is asked for, and what of it is in effect.

`GenerationOverrides` sees to it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

from lib_precision_lora.host.generation.low_bits import low_bits_options
from lib_precision_lora.host.generation.notices import tell
from lib_precision_lora.host.page.arguments import shown
from lib_precision_lora.host.page.settings import Settings
from lib_precision_lora.ui.choices import AS_SET, COMPUTE_CHOICES, OURS, PATCHERS

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Override:
    """A field with its default overrides nothing; in a nested generation it is then the outer one's.

    low_bits: a name of the host's list; compute: a compute mode; patcher: whose code applies LoRAs.
    """

    low_bits: str = AS_SET
    compute: str = AS_SET
    patcher: str = OURS

    def within(self, outer: Override) -> Override:
        """This one inside a generation that has another."""
        ours = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(outer, **{name: value for name, value in ours.items() if value != _DEFAULTS[name]})


_DEFAULTS = {item.name: item.default for item in fields(Override)}


class ByObject(Generic[Value]):
    """Values by object, for as long as it lives. The host's processing objects are not hashable."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[weakref.ref[Any], Value]] = {}

    def get(self, key: Any) -> Value | None:
        found = self._values.get(id(key))
        return None if found is None else found[1]

    def set(self, key: Any, value: Value) -> None:
        number = id(key)
        self._values[number] = weakref.ref(key, lambda _: self._values.pop(number, None)), value

    def forget(self, key: Any) -> None:
        self._values.pop(id(key), None)


@dataclass(slots=True)
class Generation:
    """One that runs. settings: the user's own, as they were when it began; refused: why its storage type is
    not that of the checkpoint at hand; failed: reasons by loading parameters that could not be loaded."""

    wanted: Override
    settings: Settings
    refused: str | None = None
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def in_effect(self) -> Override:
        return self.wanted if self.refused is None else replace(self.wanted, low_bits=AS_SET)


requests: ByObject[Override] = ByObject()
generations: ByObject[Generation] = ByObject()


def low_bits_choices() -> list[str]:
    """What can be asked for as `Override.low_bits`."""
    return [AS_SET, *low_bits_options()]


def request(p: Any, override: Override) -> None:
    """Ask for an override of the generations that are made from this processing object.

    To be called before the checkpoint is loaded, in `before_process` at the latest. The last call counts.
    """
    requests.set(p, override)


def in_effect(p: Any) -> Override:
    """What is in effect for the generation that is being made from this processing object: what was asked
    for, with what surrounds it, without what was refused. No override where none is being made."""
    generation = generations.get(p)
    return Override() if generation is None else generation.in_effect


def offered(p: Any, override: Override) -> Override:
    """Without what this WebUI, or this extension, does not offer; its generation is told."""
    for name, title, choices in (
        ("low_bits", "Diffusion in Low Bits is", low_bits_choices()),
        ("compute", "Compute mode is", COMPUTE_CHOICES),
        ("patcher", "LoRAs are applied by", PATCHERS),
    ):
        value = getattr(override, name)
        if value not in choices:
            default, there = _DEFAULTS[name], ", ".join(choices)
            tell(p, f"{title} {default}: there is no {shown(value)} here, but {there}")
            override = replace(override, **{name: default})
    return override
