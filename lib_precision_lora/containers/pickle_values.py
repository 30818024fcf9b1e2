"""What the pickle of a torch file can make: tensors by description, numbers, texts, lists, dictionaries.

A name that a pickle speaks of is never looked up in a module: it is in the tables below, or it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lib_precision_lora.containers.bounds import MOST_AXES
from lib_precision_lora.containers.content import PickleError

MOST_ARGUMENTS = 16
"""Of a call; a tensor has nine at most."""


@dataclass(frozen=True, slots=True)
class Storage:
    """key: of its bytes in the file; dtype: None for bytes without a type; count: elements, of its type."""

    key: str
    dtype: torch.dtype | None
    count: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a pickle describes it; offset and stride in elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Beside:
    """A value that is no weight and that nobody asks for: a device, a type, a count of keys."""


BESIDE = Beside()

_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("uint16", "uint32", "uint64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
DTYPES: Mapping[str, torch.dtype] = {
    f"torch.{name}": getattr(torch, name) for name in _DTYPES if hasattr(torch, name)
}

STORAGES: Mapping[str, torch.dtype | None] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": None,
    "torch.UntypedStorage": None,
}


def storage_of(identity: Any) -> Storage:
    """From `("storage", type, key, device, count, …)`, the only thing that torch leaves out of a pickle."""
    match identity:
        case ("storage", Name(path), str(key), _, int(count), *_) if path in STORAGES and count >= 0:
            return Storage(key, STORAGES[path], count)
    raise PickleError("it refers to something outside of its pickle that is no storage of weights")


@dataclass(frozen=True, slots=True)
class Name:
    """A name that is allowed, and not what it stands for."""

    path: str


def _view(dtype: torch.dtype | None, *arguments: Any) -> View:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(stride), *_) if len(shape) == len(
            stride
        ) <= MOST_AXES and all(
            type(number) is int and 0 <= number < 2**62 for number in (offset, *shape, *stride)
        ):
            dtype = dtype or storage.dtype
            if dtype is not None:
                return View(storage, dtype, offset, shape, stride)
    raise PickleError("it describes a tensor in a way that torch does not write; the file is damaged")


def _tensor(*arguments: Any) -> View:
    return _view(None, *arguments)


def _typed_tensor(*arguments: Any) -> View:
    """(storage, offset, shape, stride, requires_grad, hooks, dtype, …)."""
    match arguments:
        case (_, _, _, _, _, _, Name(path), *_) if path in DTYPES:
            return _view(DTYPES[path], *arguments)
    raise PickleError("it describes a tensor of a type that is not known here; use it as safetensors")


def _parameter(*arguments: Any) -> View:
    match arguments:
        case (View() as view, *_):
            return view
    raise PickleError("it describes a parameter that is no tensor; the file is damaged")


def _subclass(*arguments: Any) -> View:
    """(function, class, its arguments, state)."""
    match arguments:
        case (Name(function), Name(kind), tuple(inner), *_) if (
            function in _TENSORS and kind in _TENSOR_CLASSES and len(inner) <= MOST_ARGUMENTS
        ):
            return _TENSORS[function](*inner)
    raise PickleError("it describes a tensor of a class that is not known here; use it as safetensors")


def _dictionary(*arguments: Any) -> dict[str, Any]:
    """An OrderedDict; its entries are set afterwards."""
    if arguments:
        raise PickleError("it holds a dictionary from Python 2; load and save it with a newer torch")
    return {}


def _beside(*_: Any) -> Beside:
    return BESIDE


_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")

_TENSORS: Mapping[str, Callable[..., View]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}

CALLS: Mapping[str, Callable[..., Any]] = {
    **_TENSORS,
    "collections.OrderedDict": _dictionary,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": _beside,
    "torch.device": _beside,
    "torch.serialization._get_layout": _beside,
    "collections.Counter": _beside,
    "builtins.set": _beside,
    "__builtin__.set": _beside,
    "_codecs.encode": _beside,
    "numpy.dtype": _beside,
    "numpy.core.multiarray.scalar": _beside,
    "numpy._core.multiarray.scalar": _beside,
}
"""What a pickle may call → what is done instead. No function of torch, numpy or Python is called."""

NAMES = frozenset({*CALLS, *STORAGES, *DTYPES, *_TENSOR_CLASSES})


def named(module: str, name: str) -> Name:
    """Raises `PickleError` for what is no part of weights."""
    path = f"{module}.{name}"
    if path not in NAMES:
        raise PickleError(
            f"it holds more than weights: {path[:120]!r}, which could run code and was not run; do not use "
            "it, or have it as safetensors from a source that you trust"
        )
    return Name(path)
