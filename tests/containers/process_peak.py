"""The largest memory of a process of its own: allocations of torch are in no Python counter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
PEAK = f"""
import sys
from pathlib import Path

def peak():
    lines = Path({str(STATUS)!r}).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
"""


def numbers(code: str, *arguments: Path) -> list[int]:
    """What a program prints that may call `peak()`, in bytes since its start."""
    if not STATUS.exists():
        pytest.skip("the peak of a process is read from /proc: run it on Linux")
    done = subprocess.run(
        [sys.executable, "-c", PEAK + code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]
