"""Kernels and bytes: what a card counts, found without one.

A kernel is an ATen operation that makes or writes values; a view is none, nor is memory without values. Its
bytes are those of its inputs and outputs, each element once: what it writes in place counts twice, a number
that is repeated along an axis once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

NO_KERNELS = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh", "_unsafe_view")
NO_KERNEL_NAMESPACES = ("prim", "prims")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operation. flops: of a product or a convolution; 0 for any other; fp32: its operands are."""

    name: str
    bytes: int
    flops: int = 0
    fp32: bool = False


class KernelCounter(TorchDispatchMode):
    """Notes every kernel that is started while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.kernels)

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if _is_kernel(func):
            given = {name: value for name, value in kwargs.items() if name != "out"}
            moved = sum(touched_bytes(tensor) for tensor in _tensors((args, given, result)))
            fp32 = any(tensor.dtype == torch.float32 for tensor in _tensors((args, given)))
            self.kernels.append(Kernel(str(func), moved, _flops(func, args, kwargs, result), fp32))
        return result


def counted(run: Callable[[], object]) -> list[Kernel]:
    """The kernels that a call starts."""
    with KernelCounter() as counter:
        run()
    return counter.kernels


def touched_bytes(tensor: Tensor) -> int:
    """Bytes of its elements, those once that a stride of 0 repeats."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.element_size()


def _is_kernel(func: Any) -> bool:
    name = func._schema.name.partition("::")[2]
    return func.namespace not in NO_KERNEL_NAMESPACES and name not in NO_KERNELS and not func.is_view


def _flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object) -> int:
    count = flop_registry.get(func.overloadpacket)
    if count is None:
        return 0
    return int(count(*args, **{k: v for k, v in kwargs.items() if k != "out"}, out_val=result))


def _tensors(value: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
