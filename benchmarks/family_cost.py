"""What each family costs per step on one linear layer: by formula, and measured in a forward.

    python -m benchmarks.family_cost [--tokens 512 --inputs 3072 --outputs 3072 --rank 16] [--json]

Counted are the products (matrix products of any kind, by torch's flop counter) and, apart, the results of
elementwise operations. Bytes are those of tensors; times are those of this machine's CPU and dense fp32 base.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.family_files import FILES, FamilyFile, Sizes
from benchmarks.interleave import now
from lib_precision_lora.adapters import Adapter, read_adapters
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.memory.meter import ByteMeter

MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """One family on one layer, beside the layer's own forward.

    flops: of products; elementwise: results of elementwise operations; held: bytes that stay while it is
    attached; peak: bytes alive at once in a forward, above those of the layer's own; time: of a forward
    with the family, over that of the one without before it; the median.
    """

    family: str
    flops_formula: str
    flops_by_formula: int
    flops: int
    elementwise: int
    held_formula: str
    held_by_formula: int
    held: int
    peak: int
    time: float


class ElementwiseCounter(TorchDispatchMode):
    """Elements of the results of elementwise operations (additions, products by element, …)."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.pointwise in func.tags and isinstance(result, Tensor):  # type: ignore[attr-defined]
            self.elements += result.numel()
        return result


def measure(family: str, file: FamilyFile, sizes: Sizes, repeats: int) -> Cost:
    """Attach one family to a dense fp32 layer, and run it."""
    layer = nn.Linear(sizes.inputs, sizes.outputs).requires_grad_(False)
    model, x = nn.ModuleDict({"layer": layer}), torch.randn(sizes.tokens, sizes.inputs)
    bare = run_counted(layer, x)
    with ByteMeter() as meter:
        session = PatchSession(model)
        session.apply([("file", {"layer.weight": read(file, sizes)}, 0.7)])
        layer(x)
        gc.collect()
        held = meter.live
    with session:
        patched = run_counted(layer, x)
        seconds = [(timed(layer.forward, x), timed(layer, x)) for _ in range(repeats)]
    ratios = [with_family / without for without, with_family in seconds]
    return Cost(
        family,
        file.flops,
        sizes.value(file.flops),
        patched[0] - bare[0],
        patched[1] - bare[1],
        file.bytes,
        sizes.value(file.bytes),
        held,
        patched[2] - bare[2],
        statistics.median(ratios),
    )


def read(file: FamilyFile, sizes: Sizes) -> Adapter:
    """The adapter of a file whose other tensors are let go."""
    return read_adapters(file.tensors(sizes))["layer"]


def run_counted(layer: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """FLOPs of products, elementwise results and peak bytes of one forward."""
    with FlopCounterMode(display=False) as products:
        layer(x)
    with ElementwiseCounter() as elementwise:
        layer(x)
    with ByteMeter() as meter:
        layer(x)
    return products.get_total_flops(), elementwise.elements, meter.peak


def timed(run: Callable[[Tensor], object], x: Tensor) -> float:
    start = now()
    run(x)
    return now() - start


def markdown(sizes: Sizes, costs: Sequence[Cost]) -> str:
    """The result as a table."""
    own = 2 * sizes.tokens * sizes.outputs * sizes.inputs
    lines = [
        f"{sizes.outputs}×{sizes.inputs}, {sizes.tokens} tokens, rank {sizes.rank}; the layer alone: "
        f"{own / 1e6:.0f} MFLOP. Times: {machine()}.",
        "",
        "| family | FLOPs of products | M | measured | of the layer's | elementwise, M | bytes held "
        "| MiB | measured | peak extra, MiB | time |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    lines += [f"| {' | '.join(cells(cost, own))} |" for cost in costs]
    return "\n".join(lines) + "\n"


def cells(cost: Cost, own: int) -> tuple[str, ...]:
    """One row; own: FLOPs of the layer itself."""
    return (
        cost.family,
        cost.flops_formula,
        f"{cost.flops_by_formula / 1e6:.1f}",
        f"{cost.flops / 1e6:.1f}",
        f"{cost.flops / own:.1%}",
        f"{cost.elementwise / 1e6:.1f}",
        cost.held_formula,
        f"{cost.held_by_formula / MIB:.3f}",
        f"{cost.held / MIB:.3f}",
        f"{cost.peak / MIB:.1f}",
        f"{cost.time:.2f}×",
    )


def machine() -> str:
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.family_cost",
        description="What each LoRA family costs per step on one dense fp32 linear layer on the CPU, beside "
        "the layer's own forward: products by formula and as torch's flop counter sees them (elementwise "
        "operations apart), bytes held and at the peak of a forward, and the median ratio of times.",
    )
    for field in dataclasses.fields(Sizes):
        top.add_argument(
            f"--{field.name}", type=int, default=field.default, help=f"(default: {field.default})"
        )
    top.add_argument("--repeats", type=int, default=7, help="forwards that are timed (default: %(default)s)")
    top.add_argument("--family", choices=tuple(FILES), action="append", help="only this one; repeatable")
    top.add_argument("--json", action="store_true", help="the result as one JSON object")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    options = top.parse_args(arguments)
    if options.repeats < 1:
        top.error(f"--repeats is {options.repeats}, it must be at least 1")
    try:
        sizes = Sizes(*(getattr(options, field.name) for field in dataclasses.fields(Sizes)))
    except ValueError as error:
        top.error(str(error))
    torch.manual_seed(0)
    with torch.no_grad():
        costs = [
            measure(name, FILES[name], sizes, options.repeats) for name in options.family or tuple(FILES)
        ]
    if options.json:
        result = {
            "sizes": dataclasses.asdict(sizes),
            "machine": machine(),
            "families": [dataclasses.asdict(cost) for cost in costs],
        }
        sys.stdout.write(f"{json.dumps(result, indent=2)}\n")
    else:
        sys.stdout.write(markdown(sizes, costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
