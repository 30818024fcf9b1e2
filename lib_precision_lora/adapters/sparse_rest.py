"""The sparse rest of a layer's change: what LyCORIS keeps of it beside the low-rank part of an extraction.

    ΔW = alpha / rank · up · down + S        S[i, j] = bias_values[k] where bias_indices[:, k] = (i, j)

S is [out, in · kernel], of which `bias_size` says the size. Source: LyCORIS, `extract_locon` with
`--use_sparse_bias`; its "bias" is a part of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError, as_float_factor, require_finite
from lib_precision_lora.adapters.additive import Additive, require_parts, require_shape
from lib_precision_lora.adapters.dora import DoRA
from lib_precision_lora.adapters.steps import Add, Running, Step
from lib_precision_lora.adapters.terms import Sparse

WHOLE_NUMBERS = (torch.int16, torch.int32, torch.int64, torch.uint8)
ROLES = ("bias_indices", "bias_values", "bias_size")


@dataclass(frozen=True, slots=True, eq=False)
class WithRest:
    """inner: the structured part; rest: S, whose scale is 1 whatever alpha is."""

    inner: Additive
    rest: Sparse

    @property
    def kind(self) -> str:
        return f"{self.inner.kind} with a sparse rest"

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.inner.tensors(), *self.rest.tensors()

    def check(self, shape: tuple[int, ...]) -> None:
        self.inner.check(shape)
        require_shape(*self.rest.size, shape)

    def reordered(self, order: Tensor) -> WithRest:
        inner: Additive = self.inner.reordered(order)  # type: ignore[assignment]
        return WithRest(inner, self.rest.reordered(order))

    def compose(self, running: Running, strength: float) -> tuple[Step, ...]:
        return *self.inner.compose(running, strength), Add(0, running.shape[0], self.rest, strength)


def with_rest(name: str, inner: Additive | DoRA, tensors: Mapping[str, Tensor]) -> Additive | DoRA | WithRest:
    """The adapter with the sparse rest among its layer's tensors, by role; itself where there is none.

    bias_indices: [2, n] integers; bias_values: [n]; bias_size: [2] integers. Raises `AdapterError`: a part is
    missing, sizes that do not meet, an index outside, NaN, inf, a DoRA scale beside it.
    """
    if not any(role in tensors for role in ROLES):
        return inner
    require_parts(name, tensors, *ROLES)
    if isinstance(inner, DoRA):
        raise AdapterError(f"{name}: a sparse rest (bias_values) beside a DoRA scale is not supported")
    indices, size = tensors["bias_indices"], tensors["bias_size"]
    values = as_float_factor(name, "bias_values", tensors["bias_values"])
    require_finite(name, bias_values=values)
    shapes = f"bias_indices {list(indices.shape)}, bias_values {list(values.shape)}"
    if indices.dtype not in WHOLE_NUMBERS or size.dtype not in WHOLE_NUMBERS or size.numel() != 2:
        raise AdapterError(f"{name}: bias_indices and bias_size are no whole numbers of a matrix ({shapes})")
    if values.ndim != 1 or indices.shape != (2, values.numel()):
        raise AdapterError(f"{name}: the parts of the sparse rest do not meet ({shapes})")
    rows, columns = (int(length) for length in size.tolist())
    places = indices.long()
    bounds = torch.tensor([[rows], [columns]])
    if ((places < 0) | (places >= bounds)).any():
        raise AdapterError(
            f"{name}: bias_indices lie outside of the {rows}×{columns} matrix of bias_size; the file is "
            "damaged"
        )
    row, column = (part.to(torch.int32) for part in places)
    return WithRest(inner, Sparse(row, column, values, (rows, columns)))
