"""What is told of a file is told of the bytes that were read, however the file is replaced."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from lib_precision_lora.host.loras import files as module
from lib_precision_lora.host.loras.files import FileProblem, LoraFiles, Stamp

FIRST, SECOND = (save({"a": torch.full((64, 64), value)}) for value in (1.0, 2.0))


def replaced(path: Path, content: bytes) -> None:
    """By another file of the same size and time, as `cp -p` and `mv` leave it."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    other = path.with_suffix(".new")
    other.write_bytes(content)
    os.utime(other, ns=times)
    other.replace(path)


def test_a_file_of_the_same_size_and_time_is_read_again_with_its_own_digest(tmp_path: Path) -> None:
    path, files = tmp_path / "cats.safetensors", LoraFiles()
    path.write_bytes(FIRST)
    first = Stamp.of(str(path))
    assert files.read(first)["a"][0, 0] == 1.0
    replaced(path, SECOND)
    second = Stamp.of(str(path))
    assert (second.size, second.modified_ns) == (first.size, first.modified_ns)
    assert files.read(second)["a"][0, 0] == 2.0
    assert files.digests[first].digest == hashlib.sha256(FIRST).hexdigest()
    assert files.digests[second].digest == hashlib.sha256(SECOND).hexdigest()
    with pytest.raises(FileProblem, match="was changed while it was being read"):
        LoraFiles().read(first)


def test_a_file_that_is_replaced_while_it_is_read_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, files, read = tmp_path / "cats.safetensors", LoraFiles(), module.read_open
    path.write_bytes(FIRST)
    stamp = Stamp.of(str(path))

    def meanwhile(name: str, file: Any, *rest: Any) -> Any:
        content = read(name, file, *rest)
        path.write_bytes(SECOND)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_open", meanwhile)
        with pytest.raises(FileProblem, match=r"cats\.safetensors was changed while it was being read"):
            files.read(stamp)
    assert not files.digests
    assert files.read(Stamp.of(str(path)))["a"][0, 0] == 2.0
