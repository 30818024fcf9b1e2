"""benchmarks/resident.py: the peak of one piece of work, in a process of its own."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.resident import peak_resident

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux counts it: run it there")


def work(size: int) -> None:
    torch.ones(size, dtype=torch.uint8)


@linux
def test_it_is_what_the_work_takes_at_once() -> None:
    def prepare() -> object:
        before = torch.ones(64 * MIB, dtype=torch.uint8)

        def twice() -> None:
            work(before.numel() // 2)
            work(before.numel() // 2)

        return twice

    peak = peak_resident(prepare)  # type: ignore[arg-type]
    assert peak is not None
    assert 31 * MIB <= peak <= 40 * MIB


@linux
def test_work_that_fails_has_no_peak(capfd: pytest.CaptureFixture[str]) -> None:
    def prepare() -> object:
        raise ValueError("no such layer")

    with pytest.raises(RuntimeError, match="has failed"):
        peak_resident(prepare)  # type: ignore[arg-type]
    assert "no such layer" in capfd.readouterr().err


def test_another_system_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_resident(lambda: lambda: None) is None
