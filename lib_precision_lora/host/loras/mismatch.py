"""Why nothing of a file belongs to the model that is loaded: another model, another form, or no LoRA."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lib_precision_lora.adapters.layers import endings_of_known_layers
from lib_precision_lora.names.architectures import by_kind, unreadable

SHOWN_ENDINGS = 4


def why_nothing_matches(
    keys: Collection[str],
    names: Iterable[Mapping[str, Any]],
    layout: str,
    model: str,
    architecture: str | None,
) -> str:
    """One sentence for a file of which no tensor was used.

    names: the key maps of what is loaded; layout: what the file looks like; model: the name of the model's
    class; architecture: which one it is, where that is known.
    """
    form = unreadable(keys)
    if form is not None:
        return form
    endings = endings_of_known_layers(keys, names)
    if endings:
        shown = ", ".join(endings[:SHOWN_ENDINGS]) + (", …" if len(endings) > SHOWN_ENDINGS else "")
        return (
            f"it names layers of this model, but is in a form that is not known: none of its {len(keys)} "
            f"tensors can be read ({shown}); use the file as its trainer saves it for WebUIs, or report it"
        )
    kinds = by_kind(keys)
    looks = ", ".join(sorted({kind.label for kind in kinds}))
    nothing = (
        f"none of its {len(keys)} tensors ({layout} layout) belongs to a layer of {model}; they look like "
        f"{looks}"
    )
    if any(kind.models and architecture not in kind.models for kind in kinds):
        return f"it was made for another model: {nothing}"
    if any(kind.models for kind in kinds):
        return f"it is made for this kind of model, but for layers that this one does not have: {nothing}"
    return f"it is no LoRA that is known: {nothing} (the first is {next(iter(keys), '')[:120]})"
