"""From the state dict of a LoRA file to its adapters, by module."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lib_precision_lora.adapters import (
    diff,
    dora,
    glora,
    ia3,
    loha,
    lokr,
    lora,
    oft,
    peft_boft,
    peft_oft,
    tlora,
)
from lib_precision_lora.adapters.adapter import Adapter
from lib_precision_lora.adapters.additive import Additive
from lib_precision_lora.adapters.target import Target
from lib_precision_lora.names.endings import by_module, meaning_of
from lib_precision_lora.names.layouts import aliases, whole_norms
from lib_precision_lora.ticks import Steps, Tick, untold


@dataclass(frozen=True, eq=False)
class AdapterFile(Mapping["str | Target", Adapter]):
    """The adapters of one file: a mapping from module name to adapter.

    A name is a string, or a `Target` where the adapter concerns some rows of a fused weight.
    unmatched: the keys that were not understood, or belong to no module of the key map, or name the same
    layer under two names, the second time; layout: what the file looks like, for messages ("kohya", …).
    """

    adapters: Mapping[str | Target, Adapter]
    unmatched: tuple[str, ...]
    layout: str

    def __getitem__(self, name: str | Target) -> Adapter:
        return self.adapters[name]

    def __iter__(self) -> Iterator[str | Target]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)


def read_adapters(
    state_dict: Mapping[str, Tensor], key_map: Mapping[str, Any] | None = None, tick: Tick = untold
) -> AdapterFile:
    """The adapters of a LoRA file.

    key_map: module name in the file → target in the model, as a host makes it (`Target.parse` says in
    which forms). Without one, every module is taken under the name that the file gives it. tick: told
    before each module, whose every number is looked at.
    Raises `AdapterError`, naming the layer, for one that is damaged: half a LoRA, zero rank, factors that
    do not meet, NaN or inf.
    """
    adapters: dict[str | Target, Adapter] = {}
    unmatched: list[str] = []
    layouts: Counter[str] = Counter()
    whole = whole_norms(state_dict)
    modules = by_module(state_dict)
    step = Steps(len(modules), tick)
    for name, keys in modules.items():
        step()
        place = _target(name, key_map)
        if place is None:
            unmatched.extend(keys)
            continue
        target, leading_rows = place
        meanings = {key: meaning_of(name, key, whole) for key in keys}
        roles = {role: key for key, (role, _) in meanings.items() if role}
        weight, bias, used = read_module(name, {role: state_dict[key] for role, key in roles.items()})
        if weight is not None and leading_rows and isinstance(weight, lora.LoRA):
            target = dataclasses.replace(target, rows=(0, weight.up.shape[0]))
        found = {place.name: part for place, part in ((target, weight), (target.bias(), bias)) if part}
        if adapters.keys() & found.keys():  # the same layer under a second name
            unmatched.extend(keys)
            continue
        adapters |= found
        taken = {roles[role] for role in used}
        unmatched.extend(key for key in keys if key not in taken)
        layouts.update(meanings[key][1] for key in taken)
    del layouts[""]
    layout = layouts.most_common(1)[0][0] if layouts else "unknown"
    return AdapterFile(adapters, tuple(unmatched), layout)


def read_module(
    name: str, tensors: Mapping[str, Tensor]
) -> tuple[Adapter | None, Adapter | None, frozenset[str]]:
    """One layer's tensors, by role → the adapters of its weight and of its bias, and the roles they used.

    Raises `AdapterError` for a damaged one.
    """
    asked = Asked(tensors)
    tlora.refuse_tlora(name, asked)
    bias: Adapter | None = diff.read_bias(name, asked)
    for read_additive in (lora.read_lora, loha.read_loha, lokr.read_lokr):
        additive: Additive | None = read_additive(name, asked)
        if additive is not None:
            if bias is None and isinstance(additive, lora.LoRA):
                bias = lora.read_bias(name, asked, additive.scale)
            return dora.decompose(name, additive, asked, additive.term.size[0]), bias, frozenset(asked.used)
    weight, scaled_bias = ia3.read_ia3(name, asked)
    if weight is not None:
        return weight, bias or scaled_bias, frozenset(asked.used)
    for read in (
        oft.read_oft,
        peft_oft.read_peft_oft,
        peft_boft.read_peft_boft,
        glora.read_glora,
        diff.read_dense,
    ):
        found: Adapter | None = read(name, asked)
        if found is not None:
            return found, bias, frozenset(asked.used)
    return None, bias, frozenset(asked.used)


class Asked(Mapping[str, Tensor]):
    """A layer's tensors by role, and which of them were taken; a look whether one is there takes nothing."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.used: set[str] = set()

    def __getitem__(self, role: str) -> Tensor:
        tensor = self._tensors[role]
        self.used.add(role)
        return tensor

    def __contains__(self, role: object) -> bool:
        return role in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _target(name: str, key_map: Mapping[str, Any] | None) -> tuple[Target, bool] | None:
    """Where the module belongs, and whether the adapter is for the first rows of it."""
    if key_map is None:
        return Target(name), False
    for alias in aliases(name):
        if alias.name in key_map:
            return Target.parse(key_map[alias.name]), alias.leading_rows
    return None
