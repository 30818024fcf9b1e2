"""From the state dict of a LoRA file to its adapters, by module."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lib_precision_lora.adapters import diff, dora, glora, ia3, loha, lokr, lora, oft
from lib_precision_lora.adapters.adapter import Adapter
from lib_precision_lora.adapters.additive import Additive
from lib_precision_lora.adapters.layouts import aliases
from lib_precision_lora.adapters.target import Target

SUFFIXES: Mapping[str, tuple[str, str]] = {
    ".weight": ("weight", ""),
    **{
        ending: role
        for family in (lora, dora, loha, lokr, glora, ia3, oft, diff)
        for ending, role in family.SUFFIXES.items()
    },
}
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
        place = _target(name, key_map)
        if place is None:
            unmatched.extend(keys)
            continue
        target, leading_rows = place
        roles = {SUFFIXES[key[len(name) :]][0]: key for key in keys if key != name}
        tensors = {role: state_dict[key] for role, key in roles.items()}
        weight, bias, used = read_module(name, tensors)
        if weight is not None and leading_rows and isinstance(weight, lora.LoRA):
            target = dataclasses.replace(target, rows=(0, weight.up.shape[0]))
        if weight is not None:
            adapters[target.name] = weight
        if bias is not None:
            adapters[target.bias().name] = bias
        for key in keys:
            role, layout = SUFFIXES.get(key[len(name) :], ("", ""))
            if role in used:
                layouts[layout] += 1
            else:
                unmatched.append(key)
    del layouts[""]
    layout = layouts.most_common(1)[0][0] if layouts else "unknown"
    return AdapterFile(adapters, tuple(unmatched), layout)


def read_module(
    name: str, tensors: Mapping[str, Tensor]
) -> tuple[Adapter | None, Adapter | None, frozenset[str]]:
    """One layer's tensors, by role → the adapters of its weight and of its bias, and the roles they used.

    Raises `AdapterError` for a damaged one.
    """
    bias: Adapter | None = diff.read_bias(name, tensors)
    used = {"diff_b"} if bias is not None else set()
    additive: Additive | None = (
        lora.read_lora(name, tensors) or loha.read_loha(name, tensors) or lokr.read_lokr(name, tensors)
    )
    if additive is not None:
        weight = dora.decompose(name, additive, tensors, additive.term.size[0])
        families: tuple[Any, ...] = (lora, loha, lokr, dora)
        return (
            weight,
            bias,
            frozenset(used | {role for family in families for role, _ in family.SUFFIXES.values()}),
        )
    scale, scaled_bias = ia3.read_ia3(name, tensors)
    if scale is not None:
        return scale, bias or scaled_bias, frozenset(used | {"ia3_l", "on_input", "weight"})
    for read, family in ((oft.read_oft, oft), (glora.read_glora, glora), (diff.read_dense, diff)):
        found: Adapter | None = read(name, tensors)
        if found is not None:
            return found, bias, frozenset(used | {"alpha"} | {role for role, _ in family.SUFFIXES.values()})
    return None, bias, frozenset(used)


def _by_module(state_dict: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The file's keys, grouped by module; a key of unknown ending stands alone under its own name."""
    modules: dict[str, list[str]] = {}
    for key in state_dict:
        suffix = next((ending for ending in _BY_LENGTH if key.endswith(ending)), "")
        modules.setdefault(key.removesuffix(suffix), []).append(key)
    return modules


def _target(name: str, key_map: Mapping[str, Any] | None) -> tuple[Target, bool] | None:
    """Where the module belongs, and whether the adapter is for the first rows of it."""
    if key_map is None:
        return Target(name), False
    for alias in aliases(name):
        if alias.name in key_map:
            return Target.parse(key_map[alias.name]), alias.leading_rows
    return None
