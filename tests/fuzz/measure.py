"""Time and memory of one input.

time      of the processor, all threads of the process; an alarm ends what takes long by the clock
memory    the process's peak of resident memory (`VmHWM`) while it was checked, less what it had before. Linux
          lets a process set its peak back. Elsewhere `ru_maxrss`, which only sees what goes beyond all before
"""

from __future__ import annotations

import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tests.fuzz.target import Fault

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PATIENCE = 30
"""Seconds of the clock until the alarm."""


class Alarm(BaseException):
    """Passes every `except Exception`."""


@dataclass(slots=True)
class Cost:
    """seconds of the processor; nbytes beyond the memory before."""

    seconds: float = 0.0
    nbytes: int = 0


@contextmanager
def measured(patience: float = PATIENCE) -> Iterator[Cost]:
    """The cost of what is done within, known afterwards. Raises `Fault` after `patience` seconds."""
    cost, before = Cost(), _reset()
    former = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, patience)
    start = time.process_time()
    try:
        yield cost
    except Alarm:
        raise Fault(f"it was not done after {patience:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        cost.seconds = time.process_time() - start
        cost.nbytes = max(0, _peak() - before)


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Alarm


def _reset() -> int:
    """Bytes that are resident now, which is then the peak."""
    if not RESET.exists():
        return _largest_ever()
    RESET.write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM") if RESET.exists() else _largest_ever()


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])


def _largest_ever() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
