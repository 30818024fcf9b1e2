"""Inputs and outputs of a linear module, some tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def token_chunks(x: Tensor, y: Tensor, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching chunks [≤ tokens, in] of x and [≤ tokens, out] of y; views of both, whatever x's strides."""
    if x.is_contiguous():
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if x.ndim == 1:
        x, y = x[None], y[None]
    if x.ndim == 2 and x.shape[0] <= tokens:
        if x.shape[0]:
            yield x, y
        return
    if x.ndim == 2:
        for start in range(0, x.shape[0], tokens):
            yield x[start : start + tokens], y[start : start + tokens]
        return
    for index in range(x.shape[0]):
        yield from token_chunks(x[index], y[index], tokens)
