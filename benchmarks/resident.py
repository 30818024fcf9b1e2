"""The peak of a process's resident memory (RSS) in one piece of work, as the kernel of Linux counts it.

An independent measure beside `memory.meter`: it sees what libraries allocate for themselves, and pages
instead of tensors. The work runs in a process of its own, forked from this one, with one thread; what this
one has freed before and its heap still holds is taken again, and not given back.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

_MMAP_THRESHOLD = -3
"""Its number in glibc's `mallopt`."""

_LARGE = 2**16
"""Allocations from here on are given back when they are freed, so that no heap keeps them."""


def peak_resident(prepare: Callable[[], Callable[[], object]]) -> int | None:
    """Bytes at the peak of what `prepare` returns, beyond those before it; None on another system.

    prepare: is run in the process, first; it may run the work once, so that code is in memory.
    Raises `RuntimeError` where the process fails.
    """
    if sys.platform != "linux" or not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    told, tells = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(tells, str(_peak(prepare)).encode())
        except Exception:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(tells)
    with os.fdopen(told) as answer:
        text = answer.read()
    os.waitpid(process, 0)
    if not text:
        raise RuntimeError("the process that measures its memory has failed; its error is above")
    return int(text)


def _peak(prepare: Callable[[], Callable[[], object]]) -> int:
    library = ctypes.CDLL(None)
    torch.set_num_threads(1)
    library.mallopt(_MMAP_THRESHOLD, _LARGE)
    work = prepare()
    gc.collect()
    library.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes of an entry of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
