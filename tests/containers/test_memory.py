"""Reading a file takes what the file has, and little more: measured in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.containers.process_peak import numbers

MIB = 2**20
READ = """
from lib_precision_lora.containers import read_lora

read_lora(Path(sys.argv[1]))
before = peak()
held = read_lora(Path(sys.argv[2]))
print(peak() - before, held.held_bytes)
"""


def older(tensors: dict[str, Any], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [save_file, torch.save, older], ids=["safetensors", "zip", "older"])
def test_the_peak_is_at_most_a_tenth_above_the_files_size(tmp_path: Path, save: Callable[..., None]) -> None:
    """The first reading, of a small file, loads what both need."""
    save({"a": torch.ones(2)}, tmp_path / "small")
    save({str(index): torch.ones(48 * MIB // 300) for index in range(300)}, tmp_path / "large")
    size = (tmp_path / "large").stat().st_size
    peak, held = numbers(READ, tmp_path / "small", tmp_path / "large")
    assert held > 0.99 * size
    assert 0.9 * size < peak < 1.1 * size, peak / size
