"""Files of `torch.save`, in both forms: programs of a pickle put together wrongly, or that would run code."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch

from lib_precision_lora.containers.pickle_values import NAMES
from lib_precision_lora.containers.unpickle import _INSTRUCTIONS
from tests.containers.hostile import Calls, tensor_pickle
from tests.fuzz.mutate import LENGTHS, mutated
from tests.fuzz.target import Check, Input, Target
from tests.fuzz.targets.files import inspect, read
from tests.fuzz.targets.safetensors import ENDINGS, LAYERS
from tests.fuzz.texts import name

CODE = (
    Calls(os.mkdir, "it-ran"),
    Calls(eval, "__import__('os').mkdir('it-ran')"),
    Calls(os.system, "touch it-ran"),
    Calls(os.rename, "lora.pt", "lora.pt.corrupted"),
    Calls(open, "it-ran", "w"),
    Calls(getattr, torch.Size, "mro"),
    Calls(torch.load, "lora.pt"),
    Calls(os.remove, "lora.pt"),
)
"""Each leaves something behind where it is called."""

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
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.bool),
    *(torch.complex64, torch.float8_e4m3fn, torch.int64),
)
WORDS = (
    b"R",
    b"\x81",
    b"b",
    b"o",
    b"i",
    b"0",
    b"2",
    b".",
    b"(",
    b"t",
    b"}",
    b"]",
    b"Q",
    b"P0\n",
    b"cos\nmkdir\n",
)
_SHARED = torch.arange(4096, dtype=torch.float32)
_VIEWS = (
    *(_SHARED[:64].view(8, 8), _SHARED[::2], _SHARED.view(64, 64).t(), torch.ones(1).expand(64, 64)),
    *(torch.nn.Parameter(_SHARED[:8]), torch.ones(0, 2**31)),
)
_BESIDE = (1.5, 7, float("nan"), 10**400, "text", None, [1], {"a": _SHARED}, True, b"bytes", {1, 2})
OTHER_ENTRIES = (
    *("x/byteorder", "x/data/1", "x/constants.pkl", "y/data.pkl", "../data.pkl", "x/data.pkl", "/it-ran"),
    *("x/../../it-ran", "x/.format_version", "", "x/data/0"),
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


def make(random: Random) -> Input:
    kind = random.random()
    if kind < 0.15:
        content = _saved(random, _state_dict(random))
    elif kind < 0.5:
        content = mutated(random, _saved(random, _state_dict(random)), WORDS)
    elif kind < 0.6:
        content = _saved(random, _with_code(random))
    elif kind < 0.75:
        content = _zipped(random, _view(random))
    else:
        content = _packed(random, _program(random))
    return Input({"lora.pt": content}, random.random() < 0.5)


def _saved(random: Random, value: Any) -> bytes:
    protocol = random.randint(2, 5)
    if random.random() < 0.4:
        return _saved_as_of_old(value, protocol)
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def _saved_as_of_old(value: Any, protocol: int) -> bytes:
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
    parts = [*_head(1001, True), buffer.getvalue(), pickle.dumps([key for key, _, _ in storages.values()], 2)]
    parts += [struct.pack("<q", count) + bytes(storage.tolist()) for _, count, storage in storages.values()]
    return b"".join(parts)


def _head(version: int, little: bool) -> list[bytes]:
    """The first three pickles of a file in the older form."""
    system = {"protocol_version": 1001, "little_endian": little, "type_sizes": {}}
    return [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, version, system)]


def _state_dict(random: Random) -> Any:
    """A LoRA, or something beside one."""
    value: dict[Any, Any] = {}
    for _ in range(random.randint(0, 6)):
        key = name(random) if random.random() < 0.1 else random.choice(LAYERS) + random.choice(ENDINGS)
        shape = [random.choice((0, 1, 2, 8, 16)) for _ in range(random.choice((0, 1, 2, 2, 4)))]
        value[key] = torch.full(shape, random.uniform(-1, 1)).to(random.choice(DTYPES))
        if random.random() < 0.15:
            value[key] = random.choice((*_VIEWS, *_BESIDE))
    if random.random() < 0.1:
        value[random.choice((1, None, ("a", 2), 2.5, b"x"))] = torch.ones(2)
    if random.random() < 0.5:
        return value
    wrapped = {"state_dict": value, "epoch": 3}
    lists = list(value.values()), [value], (value,), torch.ones(3), 5
    return random.choice((wrapped, {"state_dict": wrapped}, {"string_to_param": value}, *lists))


def _with_code(random: Random) -> Any:
    code: Any = random.choice(CODE)
    for _ in range(random.randint(0, 3)):
        code = random.choice(([code], {"a": code}, (code, 1), {"state_dict": {"x": code}}))
    return random.choice((code, {"a": torch.ones(2), "x": code}, {"state_dict": code}))


def _view(random: Random) -> bytes:
    """A tensor of any sizes, strides and offset over 64 bytes."""

    def number() -> int:
        return random.choice((0, 1, 1, 2, 4, 15, 16, 17, -1, 2**31, 2**61, 2**62, 2**63, 2**64))

    axes = random.choice((0, 1, 1, 2, 2, 3, 9))
    shape, stride = tuple(number() for _ in range(axes)), tuple(number() for _ in range(axes))
    offset = random.choice((0, 0, 0, number()))
    return tensor_pickle(random.choice((16, 16, 16, number())), shape, stride, offset, random.choice("0001x"))


def _program(random: Random) -> bytes:
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


def _packed(random: Random, program: bytes) -> bytes:
    """In an archive, in the older form, or as it is."""
    kind = random.random()
    if kind < 0.6:
        return _zipped(random, program)
    if kind < 0.9:
        head = _head(1001 if random.random() < 0.95 else 7, random.random() < 0.95)
        keys = random.choice((["0"], [], ["0", "0"], ["0", "1"], [1], "0"))
        storage = random.choice((16, *LENGTHS)).to_bytes(8, "little") + bytes(64)
        return b"".join((*head, program, pickle.dumps(keys, 2), storage))
    return program


def _zipped(random: Random, program: bytes) -> bytes:
    """As torch's archives, whose dates are always the same."""
    entries: list[tuple[str, bytes]] = [
        ("x/data.pkl", program),
        ("x/version", b"3\n"),
        ("x/data/0", bytes(64)),
    ]
    if random.random() < 0.2:
        entries.append((random.choice(OTHER_ENTRIES), random.choice((b"big", b"", program))))
    method = zipfile.ZIP_DEFLATED if random.random() < 0.05 else zipfile.ZIP_STORED
    return mutated(random, _archive(entries, method)) if random.random() < 0.3 else _archive(entries, method)


def _archive(entries: Sequence[tuple[str, bytes]], method: int) -> bytes:
    buffer, written = io.BytesIO(), set[str]()
    with zipfile.ZipFile(buffer, "w") as file:
        for each, content in entries:
            if each in written:
                file.filelist.append(file.filelist[0])  # twice in the directory; `writestr` would warn
                continue
            written.add(each)
            file.writestr(zipfile.ZipInfo(each), content, method)
    return buffer.getvalue()


@contextmanager
def opened(folder: Path) -> Iterator[Check]:
    def check(given: Input) -> bool:
        content = read(folder, "lora.pt")
        inspect(folder, "lora.pt", content is not None, given.rest)
        return content is not None

    yield check


TARGET = Target("pickles", make, opened)
