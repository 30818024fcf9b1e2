"""A card that is not there: tensors with a device, a type and a shape, and no values.

torch's `FakeTensorMode` runs the code of a card with them, beside that of the CPU. Of it, a build of torch
for the CPU alone lacks one piece: what tells operations on which device they are. The one of meta tensors,
which does nothing, then stands in for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

CARD = torch.device("cuda", 0)
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_CUDA, _META = 1, 14
"""Their numbers among torch's device types."""


@contextmanager
def fake_card() -> Iterator[None]:
    """Tensors that are made on `CARD` inside hold no memory; what asks one for a value raises."""
    if not torch.backends.cuda.is_built():
        _give_a_guard()
    with _BesideTheCPU(allow_non_fake_inputs=True):
        yield


class _BesideTheCPU(FakeTensorMode):
    """Fakes what is done with the card, and lets the CPU do its own work with its own values."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(_is_on_card(given) for given in tree_leaves((args, kwargs))):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)


def _is_on_card(given: object) -> bool:
    if isinstance(given, torch.device):
        return given.type == CARD.type
    return isinstance(given, FakeTensor)


def _give_a_guard() -> None:
    """Let the device guard of meta tensors stand for CUDA too, in a process that has no other."""
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("*c10.*"))))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, _REGISTRY)
    guards[_CUDA] = guards[_CUDA] or guards[_META]
