"""Files of `torch.save` that do what none should, by what it is, and what a refusal says of each."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Written = Callable[[Path], None]
HUGE = 10 * 2**30


class Calls:
    """Unpickling it with Python's own unpickler calls this function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def tensors() -> dict[str, Any]:
    return {"a.lora_up.weight": torch.randn(8, 2), "a.lora_down.weight": torch.randn(2, 8)}


def marker_of(path: Path) -> Path:
    """What the code in a file that runs code makes, beside it."""
    return path.with_name("it-ran")


def running(wrap: Callable[[Any], Any] = lambda value: value, **options: Any) -> Written:
    """A LoRA with a command in it, that otherwise is in order."""

    def write(path: Path) -> None:
        command = wrap(Calls(os.mkdir, str(marker_of(path))))
        torch.save({**tensors(), "note": command}, path, **options)

    return write


def saved(value: Callable[[], Any]) -> Written:
    return lambda path: torch.save(value(), path)


def archive(**entries: bytes) -> Written:
    """An archive as torch's, of these entries: `pkl` for `data.pkl`, `s0` for storage 0."""

    def write(path: Path, method: int = zipfile.ZIP_STORED) -> None:
        names = {"pkl": "x/data.pkl", **{f"s{index}": f"x/data/{index}" for index in range(10)}}
        with zipfile.ZipFile(path, "w", method) as file:
            file.writestr("x/version", b"3\n")
            for name, content in entries.items():
                file.writestr(names[name], content)

    return write


def tensor_pickle(
    count: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, key: str = "0"
) -> bytes:
    """`{"a": tensor}` as torch pickles it, in protocol 2; count: of its storage, in float32."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        content = value.to_bytes(9, "little", signed=True)
        return b"\x8a" + bytes([len(content)]) + content

    def many(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(count)
    view = b"(" + storage + b"tQ" + number(offset) + many(shape) + many(stride) + b"\x89}t"
    return b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n" + view + b"Rs."


def deflated(path: Path) -> None:
    """1.5 MB that torch's own reader makes 1.5 GB of, at a tenth of that here."""
    content = archive(pkl=tensor_pickle(2**25, (2**25,), (1,)), s0=bytes(2**27))
    content(path, zipfile.ZIP_DEFLATED)  # type: ignore[call-arg]


def overlapping(path: Path) -> None:
    """Two entries of the directory for the same bytes."""
    archive(pkl=tensor_pickle(4, (4,), (1,)), s0=bytes(16), s1=bytes(16))(path)
    content = bytearray(path.read_bytes())
    places = [at for at in range(len(content)) if content[at : at + 4] == b"PK\x01\x02"]
    first, second = places[2:4]
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    path.write_bytes(content)


def other_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/b.txt", "x")


def announcing(count: int) -> Written:
    """An archive whose directory is said to be larger than it is."""

    def write(path: Path) -> None:
        archive(pkl=tensor_pickle(4, (4,), (1,)), s0=bytes(16))(path)
        content = bytearray(path.read_bytes())
        end = content.rindex(b"PK\x05\x06")
        struct.pack_into("<HHL", content, end + 8, min(count, 65534), min(count, 65534), count)
        path.write_bytes(content)

    return write


def cut(write: Written, kept: float) -> Written:
    def write_cut(path: Path) -> None:
        write(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * kept)])

    return write_cut


def raw(content: Callable[[], bytes]) -> Written:
    """An archive with this pickle and one storage."""
    return lambda path: archive(pkl=content(), s0=bytes(16))(path)


RUNNING: Mapping[str, tuple[Written, str]] = {
    "a command": (running(), "it holds more than weights: 'posix.mkdir'"),
    "a command in a list": (running(lambda value: [value]), "more than weights"),
    "a command in the older form": (running(_use_new_zipfile_serialization=False), "more than weights"),
    "a command in protocol 4": (running(pickle_protocol=4), "more than weights"),
    "eval": (
        saved(lambda: {**tensors(), "x": Calls(eval, "__import__('os').mkdir('it-ran')")}),
        "'builtins.eval'|'__builtin__.eval'",
    ),
    "getattr of what is allowed": (saved(lambda: Calls(getattr, torch.Size, "mro")), "getattr"),
    "torch.load in itself": (saved(lambda: Calls(torch.load, "other.pt")), r"torch\.serialization\.load"),
    "a plain pickle": (
        lambda path: path.write_bytes(pickle.dumps(Calls(os.mkdir, str(marker_of(path))), protocol=2)),
        "more than weights",
    ),
    "an object": (saved(lambda: {**tensors(), "x": torch.nn.Linear(2, 2)}), r"torch\.nn\.modules"),
    "an instruction that makes an object": (raw(lambda: b"\x80\x02cos\nmkdir\n)\x81."), "os.mkdir"),
    "an old instruction that calls": (raw(lambda: b"\x80\x02(S'x'\nios\nmkdir\n."), "instruction b'S'"),
    "an old instruction that calls what it names": (raw(lambda: b"(ios\nmkdir\n."), "instruction b'i'"),
}
"""Files that run code where `pickle` or an unsafe `torch.load` reads them."""

LARGE: Mapping[str, tuple[Written, str]] = {
    "no strides": (
        saved(lambda: {"a": torch.ones(1).expand(50000, 53687)}),
        r"a of shape \[50000, 53687\] needs more than the 1 values",
    ),
    "a storage larger than its entry": (
        archive(pkl=tensor_pickle(HUGE, (HUGE,), (1,)), s0=bytes(64)),
        f"said to have {HUGE} elements and has 64 bytes",
    ),
    "a view beyond its storage": (
        archive(pkl=tensor_pickle(16, (17,), (1,)), s0=bytes(64)),
        "needs more than",
    ),
    "a view that begins beyond its storage": (
        archive(pkl=tensor_pickle(16, (1,), (1,), 2**60), s0=bytes(64)),
        "needs more than",
    ),
    "strides beyond its storage": (
        archive(pkl=tensor_pickle(16, (2, 2), (2**61, 2**61)), s0=bytes(64)),
        "needs more than",
    ),
    "sizes whose product overflows": (
        archive(pkl=tensor_pickle(16, (2**32, 2**32), (0, 0)), s0=bytes(64)),
        "needs more than",
    ),
    "negative sizes": (
        archive(pkl=tensor_pickle(16, (-4, -4), (1, 1)), s0=bytes(64)),
        "torch does not write",
    ),
    "a compressed archive": (deflated, "compressed"),
    "entries over each other": (overlapping, "damaged"),
    "a directory beyond the file": (announcing(2**20), "truncated or damaged"),
    "a large directory": (announcing(2**30), "above the limits"),
    "many views of the same bytes": (
        saved(lambda: dict.fromkeys(map(str, range(100)), torch.zeros(100_000))),
        "the same bytes stand for many",
    ),
    "many axes": (archive(pkl=tensor_pickle(1, (1,) * 50, (1,) * 50), s0=bytes(4)), "torch does not write"),
    "a text without end": (raw(lambda: b"\x80\x02X\xff\xff\xff\xff."), "truncated or damaged"),
    "a memo far away": (raw(lambda: b"\x80\x02]r\xff\xff\xff\xff."), "by name"),
    "many instructions": (raw(lambda: b"\x80\x02" + b"]0" * 2**20 + b"."), "more than 1500000 instructions"),
    "a large pickle": (raw(lambda: b"\x80\x02" + b"X\x00\x00\xff\x00" + bytes(2**24)), "above the limit"),
    "nested without end": (
        raw(lambda: b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"."),
        "instructions",
    ),
    "nested deep": (raw(lambda: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."), "by name"),
    "a key that is nested deep": (
        raw(lambda: b"\x80\x02})" + b"\x85" * 10**5 + b"Ns0]."),
        "by name",
    ),
    "a long name": (saved(lambda: {"a" * 10**6: torch.ones(2)}), "a name of 1000000 characters"),
}
"""Files that are small, and would take much."""

DAMAGED: Mapping[str, tuple[Written, str]] = {
    "half an archive": (cut(saved(tensors), 0.5), "truncated or damaged"),
    "an archive without its end": (cut(saved(tensors), 0.98), "truncated or damaged"),
    "half of the older form": (
        cut(lambda path: torch.save(tensors(), path, _use_new_zipfile_serialization=False), 0.9),
        "truncated",
    ),
    "a storage that is not there": (archive(pkl=tensor_pickle(4, (4,), (1,))), "storage '0' are missing"),
    "a path for a key": (archive(pkl=tensor_pickle(4, (4,), (1,), key="../../version")), "are missing"),
    "another archive": (
        other_archive,
        "none of torch.save",
    ),
    "an empty pickle": (raw(lambda: b""), "truncated or damaged"),
    "no value": (raw(lambda: b"\x80\x02."), "truncated or damaged"),
    "a call of what is no function": (raw(lambda: b"\x80\x02K\x01)R."), "truncated or damaged"),
    "a call of a type": (raw(lambda: b"\x80\x02ctorch\nFloatStorage\n)R."), r"calls torch\.FloatStorage"),
    "something outside that is no storage": (raw(lambda: b"\x80\x02K\x01Q."), "no storage of weights"),
    "a list of tensors": (saved(lambda: [torch.ones(2, 2)] * 4), "cloneofsimo"),
    "a tensor alone": (saved(lambda: torch.ones(2)), "by name"),
    "a textual inversion": (
        saved(lambda: {"string_to_param": {"*": torch.ones(1, 4)}, "name": "cat"}),
        "textual inversion",
    ),
    "an alpha that is a text": (saved(lambda: {**tensors(), "a.alpha": "8"}), r"a\.alpha is neither"),
    "an alpha beyond all numbers": (saved(lambda: {**tensors(), "a.alpha": 10**400}), r"a\.alpha is neither"),
}
"""Files that are no LoRA, or not whole."""
