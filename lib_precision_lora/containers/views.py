"""Tensors of a torch file, from how its pickle describes them to memory that the file's bytes fill."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lib_precision_lora.containers.bounds import MOST_TENSORS, REPEATS
from lib_precision_lora.containers.content import ContainerError
from lib_precision_lora.containers.pickle_values import View
from lib_precision_lora.containers.stream import Room

Place = tuple[int, int]
"""Offset in the file, bytes."""


def described(value: Any) -> dict[str, View | float]:
    """The weights among what a torch file holds: tensors, and alphas that are plain numbers.

    Checkpoints of trainings have them under `state_dict`. Raises `ContainerError` for files of other kinds.
    """
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if isinstance(value, (list, tuple)) and value and all(isinstance(entry, View) for entry in value):
        raise ContainerError(
            f"it is a list of {len(value)} tensors without names, as cloneofsimo's lora writes them, so that "
            "nothing says to which layers they belong; convert it to a safetensors file with names first"
        )
    if isinstance(value, dict) and "string_to_param" in value:
        raise ContainerError("it is a textual inversion and no LoRA; put it into the folder for embeddings")
    if not isinstance(value, dict):
        raise ContainerError("it holds no tensors by name: it is no LoRA")
    found: dict[str, View | float] = {}
    for key, entry in value.items():
        if isinstance(entry, View):
            found[key] = entry
        elif key.endswith("alpha"):
            if type(entry) not in (int, float) or abs(entry) > 2**1023:
                raise ContainerError(f"{key} is neither a tensor nor a number that can be used")
            found[key] = float(entry)
    if len(found) > MOST_TENSORS:
        raise ContainerError(f"it describes {len(found)} tensors, above the limit of {MOST_TENSORS}")
    return found


def placed(
    found: Mapping[str, View | float], place_of: Callable[[View], Place], size: int
) -> tuple[dict[str, Tensor], list[Room]]:
    """Tensors over memory that is still to be filled, and what of the file goes there.

    place_of: a tensor's storage in the file, of whose bytes there are no more than it says. All is checked
    before memory is taken; tensors of one storage share it. Raises `ContainerError`.
    """
    places: dict[str, Place] = {}
    shown = 0
    for key, view in found.items():
        if isinstance(view, View):
            place = place_of(view)
            _check(key, view, place[1])
            shown += math.prod(view.shape) * view.dtype.itemsize
            places[view.storage.key] = place
    if shown > REPEATS * size:
        raise ContainerError(
            f"its tensors show {shown} bytes, and the whole file has {size}: the same bytes stand for many; "
            "save it again with tensors of their own"
        )
    memory = {key: torch.empty(nbytes, dtype=torch.uint8) for key, (_, nbytes) in places.items()}
    rooms = [Room(places[key][0], tensor) for key, tensor in memory.items()]
    tensors = {
        key: torch.tensor(view, dtype=torch.float64)
        if isinstance(view, float)
        else memory[view.storage.key].view(view.dtype).as_strided(view.shape, view.stride, view.offset)
        for key, view in found.items()
    }
    return tensors, rooms


def _check(key: str, view: View, nbytes: int) -> None:
    """Whether a tensor lies within its storage, shows none of its elements twice, and the storage has the
    bytes that it is said to have."""
    item = view.dtype.itemsize
    stored = 1 if view.storage.dtype is None else view.storage.dtype.itemsize
    elements = math.prod(view.shape)
    if view.storage.count * stored != nbytes or nbytes % item:
        raise ContainerError(
            f"the storage of {key} is said to have {view.storage.count} elements and has {nbytes} bytes; the "
            "file is damaged, download or copy it again"
        )
    last = sum((extent - 1) * step for extent, step in zip(view.shape, view.stride, strict=True))
    here = nbytes // item
    if view.offset > here or (elements and (view.offset + last >= here or elements > here)):
        raise ContainerError(
            f"{key} of shape {list(view.shape)} needs more than the {here} values that its storage has; the "
            "file is damaged, or its tensors are no tensors of their own"
        )
