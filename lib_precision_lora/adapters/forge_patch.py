"""Forge's own patch values, and adapters for those that are understood.

A value is `("lora", (up, down, alpha, mid, dora_scale))`, `("diff", (value,))`, `(value,)`,
`("set", (value,))`, or of a kind that goes the host's way.
"""

from __future__ import annotations

from typing import Any

from lib_precision_lora.adapters.adapter import Adapter
from lib_precision_lora.adapters.diff import Assign, Diff, make_assign, make_diff
from lib_precision_lora.adapters.lora import LoRA, make_lora


class ForgePatch(tuple[Any, ...]):
    """A patch value of the host that carries the adapter it was made from."""

    adapter: Adapter


def to_forge_patch(adapter: Adapter) -> ForgePatch:
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
        patch = ForgePatch((adapter.kind, (adapter,)))
    patch.adapter = adapter
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
    if kind == "lora" and content[4] is None:
        up, down, alpha, mid, _ = content
        return make_lora(name, up, down, None if alpha is None else float(alpha), mid)
    if kind == "diff":
        return make_diff(name, content[0])
    if kind == "set":
        return make_assign(name, content[0])
    return None
