"""Forge's own patch values, and adapters for those that are understood.

A value is `("lora", (up, down, alpha, mid, dora_scale))`, `("diff", (value,))`, `(value,)`,
`("set", (value,))`, or of a kind that goes the host's way.
"""

from __future__ import annotations

from typing import Any

import torch

from lib_precision_lora.adapters.adapter import Adapter
from lib_precision_lora.adapters.diff import Assign, Diff
from lib_precision_lora.adapters.dora import DoRA
from lib_precision_lora.adapters.lora import LoRA
from lib_precision_lora.adapters.reader import read_module

_ROLES = {
    "lora": ("lora_up", "lora_down", "alpha", "lora_mid", "dora_scale"),
    "loha": ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale"),
    "lokr": (
        "lokr_w1",
        "lokr_w2",
        "alpha",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
        "dora_scale",
    ),
    "diff": ("diff",),
    "set": ("set_weight",),
}
"""The host's kinds → the roles of their tensors, in the host's order. Its GLoRA with a DoRA scale, and
kinds of other extensions, are not among them."""


class ForgePatch(tuple[Any, ...]):
    """A patch value of the host that carries the adapter it was made from.

    host_readable: whether the host's own merge understands it; widens: as in `branch.Patch`.
    """

    adapter: Adapter
    host_readable: bool
    widens: bool


def to_forge_patch(adapter: Adapter, widens: bool = False) -> ForgePatch:
    """The adapter as a value that Forge, and extensions that look into its patches, understand.

    The folded form of a LoRA has no core any more and its scale is given as alpha = scale · rank.
    """
    if isinstance(adapter, LoRA):
        patch = ForgePatch(("lora", (adapter.up, adapter.down, adapter.scale * adapter.rank, None, None)))
    elif isinstance(adapter, Assign):
        patch = ForgePatch(("set", (adapter.value,)))
    elif isinstance(adapter, Diff):
        patch = ForgePatch(("diff", (adapter.value,)))
    else:
        kind = adapter.inner.kind if isinstance(adapter, DoRA) else adapter.kind
        patch = ForgePatch((kind, (adapter,)))
    patch.adapter = adapter
    patch.host_readable = isinstance(adapter, (LoRA, Diff, Assign))
    patch.widens = widens
    return patch


def from_forge_patch(name: str, value: Any) -> Adapter | None:
    """The adapter behind a patch value, or None where the value is the host's to understand.

    Raises `AdapterError` for a damaged one.
    """
    if isinstance(value, ForgePatch):
        return value.adapter
    if not isinstance(value, tuple) or len(value) not in (1, 2):
        return None
    kind, content = ("diff", value) if len(value) == 1 else value
    if kind not in _ROLES or len(content) != len(_ROLES[kind]):
        return None
    tensors = {role: part for role, part in zip(_ROLES[kind], content, strict=True) if part is not None}
    if "alpha" in tensors:
        tensors["alpha"] = torch.as_tensor(tensors["alpha"])
    weight, _, _ = read_module(name, tensors)
    return weight
