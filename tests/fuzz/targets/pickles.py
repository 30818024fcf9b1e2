"""Files of `torch.save`, in both forms: programs of a pickle put together wrongly, or that would run code."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.containers.hostile import Calls, tensor_pickle
from tests.fuzz.mutate import LENGTHS, mutated
from tests.fuzz.pickle_files import archive, head, program, saved_as_of_old
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

DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.bool),
    *(torch.complex64, torch.float8_e4m3fn, torch.int64),
)
WORDS = (*(b"R \x81 b o i 0 2 . ( t } ] Q".split(b" ")), b"P0\n", b"cos\nmkdir\n")
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
        content = _packed(random, program(random))
    return Input({"lora.pt": content}, random.random() < 0.5)


def _saved(random: Random, value: Any) -> bytes:
    protocol = random.randint(2, 5)
    if random.random() < 0.4:
        return saved_as_of_old(value, protocol)
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


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


def _packed(random: Random, program: bytes) -> bytes:
    """In an archive, in the older form, or as it is."""
    kind = random.random()
    if kind < 0.6:
        return _zipped(random, program)
    if kind < 0.9:
        start = head(1001 if random.random() < 0.95 else 7, random.random() < 0.95)
        keys = random.choice((["0"], [], ["0", "0"], ["0", "1"], [1], "0"))
        storage = random.choice((16, *LENGTHS)).to_bytes(8, "little") + bytes(64)
        return b"".join((*start, program, pickle.dumps(keys, 2), storage))
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
    return mutated(random, archive(entries, method)) if random.random() < 0.3 else archive(entries, method)


@contextmanager
def opened(folder: Path) -> Iterator[Check]:
    def check(given: Input) -> bool:
        content = read(folder, "lora.pt")
        inspect(folder, "lora.pt", content is not None, given.rest)
        return content is not None

    yield check


TARGET = Target("pickles", make, opened)
