"""A card that is not there: tensors with a device, a type and a shape, and no values.

torch's `FakeTensorMode` runs the code of a card with them. Of that, a build of torch for the CPU alone lacks
one piece: what tells operations on which device they are. The one of meta tensors, which does nothing, then
stands in for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

CARD = torch.device("cuda", 0)
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_CUDA, _META = 1, 14
"""Their numbers among torch's device types."""


@contextmanager
def fake_card() -> Iterator[None]:
    """Tensors that are made on `CARD` inside hold no memory; what asks one for a value raises."""
    if not torch.backends.cuda.is_built():
        _give_a_guard()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _give_a_guard() -> None:
    """Let the device guard of meta tensors stand for CUDA too, in a process that has no other."""
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("*c10.*"))))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, _REGISTRY)
    guards[_CUDA] = guards[_CUDA] or guards[_META]
