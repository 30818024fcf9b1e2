"""What a DoRA's norms cost when it is attached: in closed form, after a change, and by reading all of W0 + Δ.

    python -m benchmarks.dora_norms [--shape 3072x3072 --shape 12288x3072 --rank 16 --repeats 5] [--json]

Times are those of this machine's CPU per parameter of the layer, the median of rounds in which all ways take
turns. `decode` is the least that any of them needs: all blocks of the stored weight in fp32, once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.family_cost import machine
from lib_precision_lora.adapters import Adapter, AdapterFile, read_adapters
from lib_precision_lora.adapters.dora import DoRA
from lib_precision_lora.adapters.lora import LoRA
from lib_precision_lora.adapters.steps import Add
from lib_precision_lora.adapters.terms import Term
from lib_precision_lora.branch import EffectiveWeight
from lib_precision_lora.branch.algebra.norms import Axis
from lib_precision_lora.branch.algebra.reading import Reader
from lib_precision_lora.storage import StoredWeight, gguf_weight, stored_weight
from lib_precision_lora.storage.bnb4 import FourBitWeight, PlainStatistics

SPREAD = 0.03
SHAPES = ((3072, 3072), (3072, 12288), (12288, 3072))
BLOCK_BYTES = 2**20
Shape = tuple[int, int]


def random_bytes(count: int) -> Tensor:
    """Bytes of which every two are a finite fp16 number."""
    return torch.randint(0, 0x30, (count,), dtype=torch.uint8)


def dense(dtype: torch.dtype, shape: Shape) -> StoredWeight:
    return stored_weight(nn.Parameter((SPREAD * torch.randn(shape)).to(dtype), requires_grad=False))


def nf4(shape: Shape) -> StoredWeight:
    values = math.prod(shape)
    packed = torch.randint(0, 256, (values // 2,), dtype=torch.uint8)
    absmax = PlainStatistics(torch.full((values // 64,), 3 * SPREAD))
    return FourBitWeight(shape, "bnb-nf4", 64, packed, torch.linspace(-1.0, 1.0, 16), absmax)


def gguf(name: str, block_size: int, block_bytes: int, shape: Shape) -> StoredWeight:
    return gguf_weight(random_bytes(math.prod(shape) // block_size * block_bytes), name, shape)


BASES: Mapping[str, Callable[[Shape], StoredWeight]] = {
    "bf16": lambda shape: dense(torch.bfloat16, shape),
    "fp8": lambda shape: dense(torch.float8_e4m3fn, shape),
    "nf4": nf4,
    "Q8_0": lambda shape: gguf("Q8_0", 32, 34, shape),
    "Q4_K": lambda shape: gguf("Q4_K", 256, 144, shape),
}


@dataclass(frozen=True)
class Cost:
    """Nanoseconds per parameter. first: a LoRA and a DoRA behind it, nothing kept; changed: with another
    strength of the LoRA; whole: by reading W0 + Δ in fp64, as it is where there is no closed form."""

    base: str
    axis: Axis
    rows: int
    columns: int
    decode: float
    first: float
    changed: float
    whole: float


def dora(shape: Shape, rank: int, axis: Axis) -> AdapterFile:
    """A LoRA, and a LoRA with magnitudes."""
    rows, columns = shape
    magnitude = torch.full((rows, 1) if axis == "row" else (1, columns), SPREAD * math.sqrt(columns))
    tensors: dict[str, Tensor] = {"decomposed.dora_scale": magnitude}
    for name in ("plain", "decomposed"):
        tensors[f"{name}.lora_up.weight"] = 0.01 * torch.randn(rows, rank).to(torch.bfloat16)
        tensors[f"{name}.lora_down.weight"] = 0.01 * torch.randn(rank, columns).to(torch.bfloat16)
    return read_adapters(tensors)


def measure(base: str, shape: Shape, axis: Axis, rank: int, repeats: int) -> Cost:
    stored, file = BASES[base](shape), dora(shape, rank, axis)
    additions = [Add(0, shape[0], term(adapter), 1.0) for adapter in file.values()]
    reader = Reader(stored, EffectiveWeight.identity(stored).pieces, additions, torch.float64)
    height = max(1, BLOCK_BYTES // (4 * shape[1]))

    def decode() -> None:
        for low in range(0, shape[0], height):
            stored.rows(low, min(low + height, shape[0]))

    def whole() -> None:
        if axis == "row":
            reader.row_squares(0, shape[0])
        else:
            reader.column_squares(0, shape[0])

    times: dict[str, list[float]] = {name: [] for name in ("decode", "first", "changed", "whole")}
    for _ in range(repeats):
        times["decode"].append(timed(decode))
        plain = EffectiveWeight.identity(stored)
        times["first"].append(timed(lambda plain=plain: both(plain, file, 1.0)))
        times["changed"].append(timed(lambda plain=plain: both(plain, file, 0.5)))
        times["whole"].append(timed(whole))
    per_parameter = 1e9 / math.prod(shape)
    return Cost(base, axis, *shape, **{k: per_parameter * statistics.median(v) for k, v in times.items()})


def term(adapter: Adapter) -> Term:
    """The change that it adds, of a DoRA before it is scaled."""
    inner = adapter.inner if isinstance(adapter, DoRA) else adapter
    assert isinstance(inner, LoRA)
    return inner.term


def both(weight: EffectiveWeight, file: AdapterFile, strength: float) -> None:
    """The LoRA at this strength and the DoRA, composed."""
    weight.apply(file["plain"], strength).apply(file["decomposed"])


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def markdown(rank: int, costs: Sequence[Cost]) -> str:
    lines = [
        f"Rank {rank} twice, ns per parameter. {machine()}.",
        "",
        "| base | layer | norm of a | decode | closed form | of decode | after a change | all of W0 + Δ "
        "| of closed form |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {c.base} | {c.rows}×{c.columns} | {c.axis} | {c.decode:.2f} | {c.first:.2f} "
        f"| {c.first / c.decode:.1f}× | {c.changed:.3f} | {c.whole:.2f} | {c.whole / c.first:.1f}× |"
        for c in costs
    ]
    return "\n".join(lines) + "\n"


def shape_of(text: str) -> Shape:
    """Rows and columns, "3072x12288"."""
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit() and int(rows) and int(columns) and int(columns) % 256 == 0):
        raise argparse.ArgumentTypeError(f"{text}: give rows x columns, the latter a multiple of 256")
    return int(rows), int(columns)


def main(arguments: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.dora_norms",
        description="What the norms of a DoRA cost when it is attached, on the CPU: in closed form, and by "
        "reading all of the weight with its change.",
    )
    top.add_argument("--shape", type=shape_of, action="append", help="rows x columns; repeatable")
    top.add_argument("--base", choices=tuple(BASES), action="append", help="only this one; repeatable")
    top.add_argument("--axis", choices=("row", "column"), action="append", help="only this one; repeatable")
    top.add_argument("--rank", type=int, default=16, help="(default: %(default)s)")
    top.add_argument("--repeats", type=int, default=5, help="rounds that are timed (default: %(default)s)")
    top.add_argument("--json", action="store_true", help="the result as one JSON object")
    options = top.parse_args(arguments)
    if options.repeats < 1 or options.rank < 1:
        top.error("rank and repeats must be at least 1")
    torch.manual_seed(0)
    with torch.no_grad():
        costs = [
            measure(base, shape, axis, options.rank, options.repeats)
            for shape in options.shape or SHAPES
            for base in options.base or tuple(BASES)
            for axis in options.axis or ("row", "column")
        ]
    if options.json:
        result = {
            "rank": options.rank,
            "machine": machine(),
            "costs": [dataclasses.asdict(cost) for cost in costs],
        }
        sys.stdout.write(f"{json.dumps(result, indent=2)}\n")
    else:
        sys.stdout.write(markdown(options.rank, costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
