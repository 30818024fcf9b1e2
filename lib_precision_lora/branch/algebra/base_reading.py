"""One reading of W0 for the squares of its rows or columns, and for its products with low-rank terms.

Blocks are decoded and multiplied where W0 lies; the sums alone are copied to the CPU, once each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lib_precision_lora.branch.algebra.low_rank_form import LowRankForm, ScaledTerm
from lib_precision_lora.branch.algebra.reading import has_fp64
from lib_precision_lora.storage import StoredWeight
from lib_precision_lora.strict_product import multiply, rounding_of

BLOCK_BYTES = 4 * 2**20
"""One block of W0 in fp32, at most."""

CACHED_BLOCK_BYTES = 2**20
"""The same on a CPU, for its caches."""


def reading_bytes(form: LowRankForm, stored: StoredWeight) -> int:
    """What reading W0 for the squares of a form takes at most: blocks, factors in fp32, and sums."""
    device = stored.rows(0, 0).device
    width = math.prod(stored.shape[1:])
    block = 4 * width * min(form.rows, _block_height(stored))
    copies = 5 if rounding_of(device, convolution=False) == "tf32" else 3
    return copies * block + 12 * form.rank * width + 32 * max(form.rows, width)


def row_reading(
    stored: StoredWeight, start: int, rows: int, terms: Sequence[ScaledTerm]
) -> tuple[Tensor, list[Tensor]]:
    """`‖W0ᵢ‖²`, and ⟨W0ᵢ Vᵀ, Uᵢ⟩ for each term on its rows; fp64 on the CPU, copied there at the end."""
    own: list[Tensor] = []
    crossed: list[list[Tensor]] = [[] for _ in terms]
    down: Tensor | None = None
    for low, high, block in _blocks(stored, start, rows):
        own.append(torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square_())
        if not terms:
            continue
        if down is None:
            down = torch.cat([term.term.down.to(block) for term in terms])
        hidden = multiply(block, down.T).split_with_sizes([term.term.rank for term in terms], 1)
        for term, seen, found in zip(terms, hidden, crossed, strict=True):
            first, last = max(low, term.start), min(high, term.stop)
            if first < last:
                up = term.up.narrow(0, first - term.start, last - first).to(block.device, torch.float64)
                found.append((up * seen.narrow(0, first - low, last - first)).sum(1))
    return torch.cat(own).cpu(), [torch.cat(found).cpu() for found in crossed]


def column_reading(
    stored: StoredWeight, start: int, rows: int, terms: Sequence[ScaledTerm]
) -> tuple[Tensor, list[Tensor]]:
    """`‖W0ⱼ‖²` of columns, and ⟨W0ⱼᵀ U, Vⱼ⟩ for each term, which all have all rows; fp64 on the CPU."""
    ranks, width = [term.term.rank for term in terms], math.prod(stored.shape[1:])
    own = hidden = torch.empty(0)
    for low, high, block in _blocks(stored, start, rows):
        if not low:
            own = torch.zeros(width, dtype=torch.float64, device=block.device)
            hidden = own.new_zeros(sum(ranks), width)
        own.add_(block.double().square_().sum(0))
        if terms:
            up = torch.cat([term.up.narrow(0, low, high - low).to(block) for term in terms], 1)
            hidden.add_(multiply(up.T, block))
    crossed = [
        (term.term.down.to(seen) * seen).sum(0)
        for term, seen in zip(terms, hidden.split_with_sizes(ranks), strict=True)
    ]
    return own.cpu(), [each.cpu() for each in crossed]


def _blocks(stored: StoredWeight, start: int, rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """Rows of W0 as (low, high, values), counted from `start`: fp32 [high − low, columns], where fp64 is."""
    height = _block_height(stored)
    for low in range(0, rows, height):
        high = min(low + height, rows)
        block = stored.rows(start + low, start + high).flatten(1)
        yield low, high, block if has_fp64(block.device) else block.cpu()


def _block_height(stored: StoredWeight) -> int:
    """Rows of one block, where these lie."""
    on_cpu = stored.rows(0, 0).device.type == "cpu"
    return max(1, (CACHED_BLOCK_BYTES if on_cpu else BLOCK_BYTES) // (4 * math.prod(stored.shape[1:])))
