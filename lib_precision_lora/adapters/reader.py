"""From the state dict of a LoRA file to its adapters, by module."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
from lib_precision_lora.adapters.asked import Asked
from lib_precision_lora.adapters.declared import Declared
from lib_precision_lora.adapters.findings import Findings
from lib_precision_lora.adapters.header_scale import added_by_header, disagreements
from lib_precision_lora.adapters.layers import layers_of
from lib_precision_lora.adapters.sparse_rest import with_rest
from lib_precision_lora.adapters.target import Target
from lib_precision_lora.ticks import Steps, Tick, untold


@dataclass(frozen=True, eq=False)
class AdapterFile(Mapping["str | Target", Adapter]):
    """The adapters of one file: a mapping from module name to adapter.

    A name is a string, or a `Target` where the adapter concerns some rows of a fused weight.
    unmatched: the keys that were not understood, or belong to no module of the key map, or name the same
    layer under two names, the second time; layout: what the file looks like, for messages ("kohya", …);
    parts: those of `unmatched` that belong to a layer which has an adapter, whose result they would change;
    findings: what people should know of the file, a sentence each; alphas: of those modules whose scale has
    one, as the file or its header gives it.
    """

    adapters: Mapping[str | Target, Adapter]
    unmatched: tuple[str, ...]
    layout: str
    parts: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    alphas: Mapping[str | Target, float] = field(default_factory=dict)

    def __getitem__(self, name: str | Target) -> Adapter:
        return self.adapters[name]

    def __iter__(self) -> Iterator[str | Target]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)


def read_adapters(
    state_dict: Mapping[str, Tensor],
    key_map: Mapping[str, Any] | None = None,
    tick: Tick = untold,
    metadata: Mapping[str, str] | None = None,
) -> AdapterFile:
    """The adapters of a LoRA file.

    key_map: module name in the file → target in the model, as a host makes it (`Target.parse` says in
    which forms). Without one, every module is taken under the name that the file gives it. tick: told
    before each module, whose every number is looked at. metadata: of the file's header, where alphas and
    ranks may stand; by default what the state dict itself carries as `metadata`.
    Raises `AdapterError`, naming the layer, for one that is damaged: half a LoRA, zero rank, factors that
    do not meet, NaN or inf.
    """
    adapters: dict[str | Target, Adapter] = {}
    alphas: dict[str | Target, float] = {}
    parts: list[str] = []
    layouts: Counter[str] = Counter()
    declared = Declared(getattr(state_dict, "metadata", {}) if metadata is None else metadata)
    layers, strays = layers_of(state_dict, key_map)
    unmatched = list(strays)
    findings = Findings()
    step = Steps(len(layers), tick)
    for layer in layers:
        step()
        tensors = {role: state_dict[key] for role, key in layer.roles.items()}
        training = declared.of_layer(layer.name)
        added = {} if training is None else added_by_header(tensors, training)
        weight, bias, used = read_module(layer.name, tensors | added)
        target = layer.target
        if weight is not None and layer.leading_rows and isinstance(weight, lora.LoRA):
            target = dataclasses.replace(target, rows=(0, weight.up.shape[0]))
        found = {place.name: part for place, part in ((target, weight), (target.bias(), bias)) if part}
        if adapters.keys() & found.keys():
            unmatched.extend([*layer.roles.values(), *layer.rest])
            continue
        adapters |= found
        layouts.update(layer.layouts[role] for role in used & layer.roles.keys())
        left = [key for role, key in layer.roles.items() if role not in used] + layer.rest
        if not found:
            unmatched.extend(left)
            continue
        left = [key for key in left if key != layer.roles.get("alpha")]  # where it scales nothing
        unmatched.extend(left)
        parts.extend(left)
        for key in left:
            findings.part(key)
        if training is not None:
            for disagreement in disagreements(tensors, training):
                findings.about(disagreement, layer.name)
        if weight is not None and "alpha" in used:
            told = training.alpha if training is not None else None
            alpha = float(tensors["alpha"]) if "alpha" in tensors else told
            if alpha is not None:
                alphas[target.name] = alpha
    del layouts[""]
    said = (*(declared.findings if adapters else ()), *findings.sentences())
    layout = layouts.most_common(1)[0][0] if layouts else "unknown"
    return AdapterFile(adapters, tuple(unmatched), layout, tuple(parts), said, alphas)


def read_module(
    name: str, tensors: Mapping[str, Tensor]
) -> tuple[Adapter | None, Adapter | None, frozenset[str]]:
    """One layer's tensors, by role → the adapters of its weight and of its bias, and the roles they used.

    Raises `AdapterError` for a damaged one.
    """
    asked = Asked(name, tensors)
    tlora.refuse_tlora(name, asked)
    bias: Adapter | None = diff.read_bias(name, asked)
    for read_additive in (lora.read_lora, loha.read_loha, lokr.read_lokr):
        additive: Additive | None = read_additive(name, asked)
        if additive is not None:
            if bias is None and isinstance(additive, lora.LoRA):
                bias = lora.read_bias(name, asked, additive.scale)
            weight = with_rest(name, dora.decompose(name, additive, asked, additive.term.size[0]), asked)
            return weight, bias, frozenset(asked.used)
    scaled, scaled_bias = ia3.read_ia3(name, asked)
    if scaled is not None:
        return scaled, bias or scaled_bias, frozenset(asked.used)
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
