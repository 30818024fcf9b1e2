"""Files of `torch.save`, each time of the same bytes, and programs of a pickle that torch never wrote."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch

from lib_precision_lora.containers.pickle_values import NAMES
from lib_precision_lora.containers.unpickle import _INSTRUCTIONS
from tests.fuzz.mutate import LENGTHS
from tests.fuzz.texts import name

HOSTILE_NAMES = (
    *("posix\nsystem", "os\nmkdir", "builtins\neval", "builtins\nexec", "builtins\ngetattr", "torch\nload"),
    *("torch.serialization\nload", "torch._utils\n_rebuild_qtensor", "torch._utils\n_rebuild_sparse_tensor"),
    *(
        "torch.storage\n_load_from_bytes",
        "torch.jit\nload",
        "numpy\nload",
        "__main__\nx",
        "\x1b[31m\ny",
        "a\n" * 9,
    ),
)
STEPS = tuple(_INSTRUCTIONS)
OTHER_STEPS = (
    b"S'x'\n",
    b"I1\n",
    b"L1L\n",
    b"F1.5\n",
    b"V\xc3\xa9\n",
    b"o",
    b"\x81",
    b"\x92",
    b"1",
    b"2",
    b"l",
    b"d",
)


def saved_as_of_old(value: Any, protocol: int) -> bytes:
    """As torch before 1.6, with numbers for keys: those of torch are places in memory, never the same."""
    storages: dict[int, tuple[str, int, torch.UntypedStorage]] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, torch.storage.TypedStorage):
                kind, untyped, count = (
                    getattr(torch, obj._pickle_storage_type()),
                    obj._untyped_storage,
                    obj._size(),
                )
            elif isinstance(obj, torch.UntypedStorage):
                kind, untyped, count = torch.UntypedStorage, obj, obj.nbytes()
            else:
                return None
            key = storages.setdefault(untyped.data_ptr(), (str(len(storages)), count, untyped))[0]
            return "storage", kind, key, "cpu", count, None

    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    parts = [*head(1001, True), buffer.getvalue(), pickle.dumps([key for key, _, _ in storages.values()], 2)]
    parts += [struct.pack("<q", count) + bytes(storage.tolist()) for _, count, storage in storages.values()]
    return b"".join(parts)


def head(version: int, little: bool) -> list[bytes]:
    """The first three pickles of a file in the older form."""
    system = {"protocol_version": 1001, "little_endian": little, "type_sizes": {}}
    return [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, version, system)]


def archive(entries: Sequence[tuple[str, bytes]], method: int) -> bytes:
    buffer, written = io.BytesIO(), set[str]()
    with zipfile.ZipFile(buffer, "w") as file:
        for each, content in entries:
            if each in written:
                file.filelist.append(file.filelist[0])  # twice in the directory; `writestr` would warn
                continue
            written.add(each)
            file.writestr(zipfile.ZipInfo(each), content, method)
    return buffer.getvalue()


def program(random: Random) -> bytes:
    """Instructions of a pickle, known ones and others, most of them with what they need before them."""
    made = [b"\x80", bytes([random.randint(0, 6)])]
    if random.random() < 0.2:
        deep = random.choice((10, 1000, 50_000))
        made.append(
            random.choice((b"]" * deep + b"a" * (deep - 1), b"(" * deep, b"\x85" * deep, b"})" * deep))
        )
    for _ in range(random.randint(0, 40)):
        step = random.choice(STEPS) if random.random() < 0.93 else random.choice(OTHER_STEPS)
        made.append(step + _OPERANDS.get(step, _nothing)(random))
    return b"".join((*made, random.choice((b".", b".", b"}.", b"]."))))


def _nothing(random: Random) -> bytes:
    return b""


def _number(form: str) -> Callable[[Random], bytes]:
    size = struct.calcsize(form)
    return lambda random: (random.choice((random.randint(0, 5), *LENGTHS)) % 256**size).to_bytes(
        size, "little"
    )


def _sized(form: str) -> Callable[[Random], bytes]:
    """A text with its length before it, which now and then is another's."""

    def write(random: Random) -> bytes:
        text = random.choice(("storage", "cpu", "0", "a.lora_up.weight", "a.alpha", name(random)))
        content, size = text.encode("utf-8", "surrogatepass")[:200], struct.calcsize(form)
        length = len(content) if random.random() < 0.95 else random.choice(LENGTHS) % 256**size
        return length.to_bytes(size, "little") + content

    return write


def _named(random: Random) -> bytes:
    path = random.choice(tuple(sorted(NAMES))).rpartition(".")
    text = f"{path[0]}\n{path[2]}" if random.random() < 0.8 else random.choice(HOSTILE_NAMES)
    return text.encode() + b"\n"


_OPERANDS: dict[bytes, Callable[[Random], bytes]] = {
    **{step: _number("<B") for step in (b"\x80", b"K", b"q", b"h")},
    **{step: _number("<I") for step in (b"J", b"r", b"j")},
    **{step: _sized("<B") for step in (b"\x8a", b"\x8c", b"U", b"C")},
    **{step: _sized("<I") for step in (b"X", b"T", b"B")},
    b"M": _number("<H"),
    b"\x95": _number("<Q"),
    b"G": lambda random: struct.pack(">d", random.choice((0.0, 1.5, float("nan"), float("inf"), 1e308))),
    b"c": _named,
}
