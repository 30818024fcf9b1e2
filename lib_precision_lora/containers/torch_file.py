"""Files of `torch.save`, weights only: the zip archive of torch 1.6 and later, and the older form.

archive    `…/data.pkl` describes the tensors, `…/data/KEY` has the bytes of each storage
older      three pickles (magic number, version, system), that of the tensors, that of the storages' keys, and
           for each key a count of elements (u64) with their bytes

Neither `torch.load` nor Python's `pickle` has a part in it: WebUIs wrap the first, and the second runs code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO

from torch import Tensor

from lib_precision_lora.containers.bounds import LARGEST_PICKLE, MOST_TENSORS
from lib_precision_lora.containers.content import ContainerError, LoraContent, PickleError
from lib_precision_lora.containers.pickle_values import View
from lib_precision_lora.containers.stream import Room, fill
from lib_precision_lora.containers.unpickle import DAMAGED, Unpickler
from lib_precision_lora.containers.views import Place, described, placed
from lib_precision_lora.containers.zip_directory import ZipEntry, read_directory
from lib_precision_lora.ticks import Tick

ARCHIVE_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"

_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_VERSION = 1001


def read_archive(file: BinaryIO, size: int, tick: Tick) -> LoraContent:
    """Raises `ContainerError`."""
    entries = read_directory(file, size)
    root = _root_of(entries)
    pickled = entries[f"{root}data.pkl"]
    if pickled.nbytes > LARGEST_PICKLE:
        raise PickleError(
            f"its pickle has {pickled.nbytes} bytes, above the limit of {LARGEST_PICKLE}: it holds more than "
            "weights; use it as safetensors"
        )
    order = entries.get(f"{root}byteorder")
    if order is not None and _content_of(file, order)[:3] == b"big":
        raise ContainerError("it was written with the bytes of its numbers in reverse; use it as safetensors")
    found = described(Unpickler(_content_of(file, pickled)).value())

    def place_of(view: View) -> Place:
        entry = entries.get(f"{root}data/{view.storage.key}")
        if entry is None:
            raise ContainerError(f"the bytes of storage {view.storage.key[:40]!r} are missing; {DAMAGED}")
        return entry.offset, entry.nbytes

    return _filled(file, size, *placed(found, place_of, size), tick)


def read_old(file: BinaryIO, size: int, tick: Tick) -> LoraContent:
    """Raises `ContainerError`."""
    file.seek(0)
    pickles = Unpickler(file.read(LARGEST_PICKLE))
    if (pickles.value(), pickles.value()) != (_OLD_MAGIC, _OLD_VERSION):
        raise PickleError(
            "it is a pickle, but none that torch has written; do not use it, or have it as safetensors"
        )
    system = pickles.value()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ContainerError("it was written with the bytes of its numbers in reverse; use it as safetensors")
    found = described(pickles.value())
    keys = pickles.value()
    storages = {view.storage.key: view for view in found.values() if isinstance(view, View)}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleError(DAMAGED)
    if len(keys) > MOST_TENSORS or not storages.keys() <= set(keys):
        raise PickleError(DAMAGED)
    if len(keys) > len(storages):
        raise ContainerError("it holds more than a LoRA's weights; save them alone, as safetensors")
    places = _old_places(file, size, pickles.position, keys, storages)
    return _filled(file, size, *placed(found, lambda view: places[view.storage.key], size), tick)


def _old_places(
    file: BinaryIO, size: int, here: int, keys: list[str], storages: Mapping[str, View]
) -> dict[str, Place]:
    """Where the bytes of each storage are. The file has counts of elements, their types have the tensors."""
    places: dict[str, Place] = {}
    for key in keys:
        file.seek(here)
        count = int.from_bytes(file.read(8), "little")
        dtype = storages[key].storage.dtype
        nbytes = count * (1 if dtype is None else dtype.itemsize)
        if here + 8 + nbytes > size or key in places:
            raise ContainerError(
                f"the file is truncated: it has {size} bytes, and its tensors end at {here + 8 + nbytes} or "
                "later; download or copy it again"
            )
        places[key] = here + 8, nbytes
        here += 8 + nbytes
    return places


def _filled(
    file: BinaryIO, size: int, tensors: Mapping[str, Tensor], rooms: Sequence[Room], tick: Tick
) -> LoraContent:
    digests = fill(file, size, rooms, tick)
    return LoraContent(tensors, {}, digests.whole, digests.whole)


def _root_of(entries: Mapping[str, ZipEntry]) -> str:
    """The folder that a torch archive has everything in, with its slash."""
    found = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise ContainerError("it is a zip archive, but none of torch.save's; use the LoRA as safetensors")
    root = found[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise ContainerError("it is a program of TorchScript and no LoRA; use the LoRA's own file")
    return root


def _content_of(file: BinaryIO, entry: ZipEntry) -> bytes:
    """Of an entry that is known to be small."""
    file.seek(entry.offset)
    return file.read(min(entry.nbytes, LARGEST_PICKLE))
