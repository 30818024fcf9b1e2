"""From the state dict of a LoRA file to its adapters, by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lib_precision_lora.adapters import diff, lora
from lib_precision_lora.adapters.adapter import Adapter
from lib_precision_lora.adapters.target import Target

SUFFIXES: Mapping[str, tuple[str, str]] = {**lora.SUFFIXES, **diff.SUFFIXES}
_ROLES: Mapping[str, frozenset[str]] = {
    "lora": frozenset({"lora_up", "lora_down", "lora_mid", "alpha"}),
    "diff": frozenset({"diff", "alpha"}),
    "set": frozenset({"set_weight", "alpha"}),
}
"""Kind of adapter → the tensors of a layer that go into it."""

_BY_LENGTH = sorted(SUFFIXES, key=len, reverse=True)


@dataclass(frozen=True, eq=False)
class AdapterFile(Mapping["str | Target", Adapter]):
    """The adapters of one file: a mapping from module name to adapter.

    A name is a string, or a `Target` where the adapter concerns some rows of a fused weight.
    unmatched: the keys that were not understood, or belong to no module of the key map;
    layout: what the file looks like, for messages ("kohya", "PEFT", …).
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


def read_adapters(state_dict: Mapping[str, Tensor], key_map: Mapping[str, Any] | None = None) -> AdapterFile:
    """The adapters of a LoRA file.

    key_map: module name in the file → target in the model, as a host makes it (`Target.parse` says in
    which forms). Without one, every module is taken under the name that the file gives it.
    Raises `AdapterError`, naming the layer, for one that is damaged: half a LoRA, zero rank, factors that
    do not meet, NaN or inf.
    """
    adapters: dict[str | Target, Adapter] = {}
    unmatched: list[str] = []
    layouts: Counter[str] = Counter()
    for name, keys in _by_module(state_dict).items():
        target = _target(name, key_map)
        if target is None:
            unmatched.extend(keys)
            continue
        roles = {SUFFIXES[key[len(name) :]][0]: key for key in keys if key != name}
        tensors = {role: state_dict[key] for role, key in roles.items()}
        weight = lora.read_lora(name, tensors) or diff.read_dense(name, tensors)
        bias = diff.read_bias(name, tensors)
        if weight is not None:
            adapters[target.name] = weight
        if bias is not None:
            adapters[target.bias().name] = bias
        used = _ROLES[weight.kind] if weight is not None else frozenset()
        understood = {key for role, key in roles.items() if role in used or role == "diff_b"}
        unmatched.extend(key for key in keys if key not in understood)
        layouts.update(SUFFIXES[key[len(name) :]][1] for key in keys if key != name)
    del layouts[""]
    layout = layouts.most_common(1)[0][0] if layouts else "unknown"
    return AdapterFile(adapters, tuple(unmatched), layout)


def _by_module(state_dict: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The file's keys, grouped by module; a key of unknown ending stands alone under its own name."""
    modules: dict[str, list[str]] = {}
    for key in state_dict:
        suffix = next((ending for ending in _BY_LENGTH if key.endswith(ending)), "")
        modules.setdefault(key.removesuffix(suffix), []).append(key)
    return modules


def _target(name: str, key_map: Mapping[str, Any] | None) -> Target | None:
    if key_map is None:
        return Target(name)
    return Target.parse(key_map[name]) if name in key_map else None
