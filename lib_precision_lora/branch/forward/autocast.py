"""What autocast does to a module, and keeping it out of a branch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Turns autocast off, where it is on."""
    return torch.autocast(device_type, enabled=False) if _is_on(device_type) else nullcontext()


def type_within(x: Tensor) -> torch.dtype:
    """The type in which a module multiplies x: that of autocast, where it is on."""
    if x.dtype == torch.float64 or not _is_on(x.device.type):
        return x.dtype
    try:
        return torch.get_autocast_dtype(x.device.type)
    except AttributeError:  # torch 2.3
        on_cpu = x.device.type == "cpu"
        return torch.get_autocast_cpu_dtype() if on_cpu else torch.get_autocast_gpu_dtype()


def _is_on(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # torch 2.3 asks without a device
        return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()
