"""Safetensors files: the library's values, in one pass, and nothing behind a header that is no header."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lib_precision_lora.containers import ContainerError, hashing, read_lora, stream
from lib_precision_lora.containers.safetensors_file import DTYPES, read_safetensors
from lib_precision_lora.ticks import untold


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


class Counting(io.BytesIO):
    """Counts the bytes that are read of it."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.taken = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.taken += len(found)
        return found

    def readinto(self, room: Any, /) -> int:
        count = super().readinto(room)
        self.taken += count
        return count


@pytest.mark.parametrize("chunk", [7, 64, 2**24])
def test_tensors_and_metadata_are_the_librarys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk)
    path = tmp_path / "lora.safetensors"
    written = {f"t.{dtype}": torch.randn(3, 5).to(dtype) for dtype in set(DTYPES.values())} | {
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 4),
    }
    safetensors.torch.save_file(written, path, {"format": "pt", "ss_tag": "ä"})
    read, expected = read_lora(path), safetensors.torch.load_file(path)
    assert set(read) == set(expected) == set(written)
    for key, value in expected.items():
        assert (read[key].dtype, read[key].shape) == (value.dtype, value.shape)
        assert read[key].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8)), key
    assert dict(read.metadata) == {"format": "pt", "ss_tag": "ä"}
    assert read.held_bytes == sum(value.nbytes for value in written.values())


@pytest.mark.parametrize("at_once", [1, 100, 2**22])
def test_digests_are_those_of_the_bytes_with_and_without_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(hashing, "AT_ONCE", at_once)
    path = tmp_path / "lora.safetensors"
    written = {"a": torch.randn(100), "b": torch.randn(3)}
    safetensors.torch.save_file(written, path, {"sshs_model_hash": "of another file"})
    content = path.read_bytes()
    behind = content[8 + int.from_bytes(content[:8], "little") :]
    read = read_lora(path)
    assert read.digest == hashlib.sha256(content).hexdigest()
    assert read.weights_digest == hashlib.sha256(behind).hexdigest()
    assert read.digest != read.weights_digest
    assert read.listed_digest == read.digest


@pytest.mark.parametrize("said", [True, False])
def test_weights_are_hashed_a_second_time_only_where_the_header_says_their_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bool
) -> None:
    fed: list[int] = []
    feed = hashing.Hashing.feed

    def counted(self: hashing.Hashing, content: memoryview) -> None:
        fed.append(len(content))
        feed(self, content)

    monkeypatch.setattr(hashing.Hashing, "feed", counted)
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1000)}, path, {"sshs_model_hash": "x"} if said else None)
    read = read_lora(path)
    assert sum(fed) == path.stat().st_size + (4000 if said else 0)
    assert (read.weights_digest != "") == said


def test_a_reading_that_is_given_up_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "AT_ONCE", 1)
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, path)
    during: list[int] = []
    before = threading.active_count()

    def give_up(done: int, total: int) -> None:
        during.append(threading.active_count())
        if done > 4000:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        read_lora(path, give_up)
    assert (max(during), threading.active_count()) == (before + 1, before)


@pytest.mark.parametrize("true", [True, False])
def test_a_digest_in_the_header_is_listed_where_it_is_true(tmp_path: Path, true: bool) -> None:
    path = tmp_path / "lora.safetensors"
    plain = safetensors.torch.save({"a": torch.ones(100)})
    weights_digest = hashlib.sha256(plain[8 + int.from_bytes(plain[:8], "little") :]).hexdigest()
    said = weights_digest if true else "0" * 64
    safetensors.torch.save_file({"a": torch.ones(100)}, path, {"sshs_model_hash": said})
    read = read_lora(path)
    assert read.weights_digest == weights_digest
    assert read.listed_digest == (weights_digest if true else read.digest)


def test_tensors_may_lie_at_any_byte(tmp_path: Path) -> None:
    """Other writers than the library align nothing."""
    header = {"flag": entry("U8", [1], 0, 1), "a": entry("F32", [2], 1, 9), "b": entry("F64", [1], 9, 17)}
    path = tmp_path / "lora.safetensors"
    path.write_bytes(file_of(header, b"\x07" + struct.pack("<2fd", 1.5, -2.0, 3.25)))
    read = read_lora(path)
    assert read["a"].tolist() == [1.5, -2.0]
    assert (read["b"].tolist(), read["flag"].tolist()) == ([3.25], [7])


GARBAGE = bytes(range(256)) * 2**12
BAD_HEADERS: dict[str, bytes] = {
    "no header": b"\xff" * 8,
    "a header beyond the file": struct.pack("<Q", 2**40),
    "a header beyond the limit": struct.pack("<Q", 2**26 + 2**20 * 64),
    "no JSON": file_of(b"x" * 1000),
    "a list": file_of([1, 2]),
    "text that is none": file_of(b"\xff\xfe" * 500),
    "an entry without sizes": file_of({"a": {"dtype": "F32"}}),
    "a place beyond the file": file_of({"a": entry("F32", [2**40], 0, 2**42)}),
    "a place that is too small": file_of({"a": entry("F32", [2**40], 0, 4)}),
    "places over each other": file_of({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}),
    "less than the file has": file_of({"a": entry("F32", [2], 0, 8)}),
    "negative sizes": file_of({"a": entry("F32", [-2, -1], 0, 8)}),
    "a type of no whole bytes": file_of({"a": entry("F4", [2 * len(GARBAGE)], 0, len(GARBAGE))}),
    "a type that is not known": file_of({"a": entry("X9", [1], 0, len(GARBAGE))}),
    "many axes": file_of({"a": entry("U8", [1] * 99 + [len(GARBAGE)], 0, len(GARBAGE))}),
    "a size that no tensor has": file_of(
        {"b": entry("F32", [0, 2**63], 0, 0), "a": entry("U8", [len(GARBAGE)], 0, len(GARBAGE))}
    ),
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_bad_header_is_refused_after_the_header(what: str) -> None:
    start = BAD_HEADERS[what]
    file = Counting(start + GARBAGE)
    with pytest.raises(ContainerError) as caught:
        read_safetensors("lora.safetensors", file, len(start) + len(GARBAGE), untold)
    assert file.taken <= len(start)
    assert len(str(caught.value)) < 500


def test_a_type_that_torch_has_not_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(file_of({"a.lora_up.weight": entry("F4", [4], 0, 2)}, b"\x12\x34"))
    with pytest.raises(
        ContainerError, match=r"^a\.lora_up\.weight is stored as F4, .* save the LoRA as fp16"
    ):
        read_lora(path)


OTHERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty; download"),
    "one byte": (b"x", "truncated"),
    "a web page": (b"\n<!DOCTYPE html><html>", "web page"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "download"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_kind_of_file_is_told_with_what_to_do(tmp_path: Path, what: str) -> None:
    content, reason = OTHERS[what]
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    with pytest.raises(ContainerError, match=reason) as caught:
        read_lora(path)
    assert str(tmp_path) not in str(caught.value)


def test_no_memory_is_a_reason_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    failures: list[Callable[[], Exception]] = [
        MemoryError,
        lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: no"),
    ]
    for failure in failures:

        def no_room(*_: object, make: Callable[[], Exception] = failure, **__: object) -> None:
            raise make()

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", no_room)
            with pytest.raises(ContainerError, match="no memory for its"):
                read_lora(path)
