"""A forward with LoRAs over one without, and the least that arithmetic allows: ratios.

    OMP_NUM_THREADS=1 python -m benchmarks.forward [--quick --tokens 512 --dtype bf16 --base NF4] [--json]

The layer alone and the layer with each number of files take turns. `bound` is the layer's multiplications
with those of the files, over the layer's own. On a card its time is that of device events. `dense` is a
linear layer of torch; of another base the layer decodes its weight in each forward, as a host does.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.family_cost import machine
from benchmarks.family_files import FILES, Sizes
from benchmarks.interleave import Spread, machine_device, ratios, seconds
from lib_precision_lora.adapters import read_adapters
from lib_precision_lora.branch import PatchSession

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASES = ("dense", "FP8", "NF4", "Q8_0", "Q4_K")
SHAPES = ((3072, 3072), (3072, 12288))
STRENGTH = 0.7
Shape = tuple[int, int]
"""Inputs, outputs."""


@dataclass(frozen=True)
class Case:
    """One layer, of one base, with files of one family; dtype: of activations; stored: of the files."""

    shape: Shape
    tokens: int
    dtype: str
    base: str = "dense"
    family: str = "lora"
    rank: int = 16
    stored: str = "fp16"


@dataclass(frozen=True)
class Row:
    """time: with so many files, over the layer alone; bound: the same of multiplications."""

    case: Case
    files: int
    time: Spread
    bound: float

    @property
    def over_bound(self) -> float:
        return self.time.median / self.bound


def measure(case: Case, counts: Sequence[int], rounds: int, device: torch.device) -> list[Row]:
    """A row for each number of files."""
    sizes = Sizes(case.tokens, *case.shape, case.rank)
    file = FILES[case.family]
    tensors = {key: tensor.to(TYPES[case.stored]) for key, tensor in file.tensors(sizes).items()}
    adapters = {"layer.weight": read_adapters(tensors)["layer"]}
    x = torch.randn(1, case.tokens, case.shape[0], device=device).to(TYPES[case.dtype])
    make = layers(case, device)
    bare = make()
    runs: dict[str, Callable[[], object]] = {"bare": functools.partial(bare, x)}
    with ExitStack() as sessions, torch.inference_mode():
        for count in counts:
            model = nn.ModuleDict({"layer": make()})
            weight = model["layer"].weight
            session = sessions.enter_context(PatchSession(model))
            session.apply([(str(number), adapters, STRENGTH) for number in range(count)])
            session.place(device, x.dtype)
            assert model["layer"].weight is weight, "the layer is read through another weight"
            runs[str(count)] = functools.partial(model["layer"], x)
        times = ratios(seconds(runs, rounds, device), "bare")
    own = 2 * case.tokens * case.shape[0] * case.shape[1]
    return [Row(case, n, times[str(n)], 1 + n * sizes.value(file.flops) / own) for n in counts]


def layers(case: Case, device: torch.device) -> Callable[[], nn.Module]:
    """Makes layers that share one weight."""
    dtype = TYPES[case.dtype]
    values = torch.randn(case.shape[1], case.shape[0]) / case.shape[0] ** 0.5
    if case.base == "dense":
        weight = nn.Parameter(values.to(device, dtype), requires_grad=False)
        return functools.partial(dense_layer, weight)
    from lib_precision_lora.report.demo.files import FORMATS
    from lib_precision_lora.report.demo.model import Linear

    form, bias = FORMATS[case.base], torch.zeros(case.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"checkpoint{form.suffix}")
        form.write({"layer.weight": values, "layer.bias": bias}, path)
        found = form.read(path)
    return lambda: Linear(found["layer.weight"], found["layer.bias"])


def dense_layer(weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """On a card only dense layers are made: the demo's formats are read to the CPU."""
    quick = options.quick
    for shape in SHAPES[:1] if quick else SHAPES:
        for tokens in options.tokens or ((512,) if quick else (512, 4096)):
            for dtype in options.dtype or ("fp32", "bf16"):
                for base in options.base or ("dense",):
                    if base == "dense" or device.type == "cpu":
                        for family in options.family or ("lora",):
                            yield Case(shape, tokens, dtype, base, family, options.rank, options.stored)


def markdown(rows: Sequence[Row]) -> str:
    lines = [
        "| layer | tokens | activations | base | family | files | time over the layer's | bound | of bound |",
        "|---|---:|---|---|---|---:|---|---:|---:|",
    ]
    for row in rows:
        case = row.case
        lines.append(
            f"| {case.shape[0]}→{case.shape[1]} | {case.tokens} | {case.dtype} | {case.base} | {case.family} "
            f"| {row.files} | {row.time} | {row.bound:.3f}× | {row.over_bound:.3f}× |"
        )
    return "\n".join(lines) + "\n"


def where(device: torch.device) -> str:
    """The machine, as tables name it."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; device events"
    return f"{machine()}; no card was used"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{**dataclasses.asdict(row), "over_bound": row.over_bound} for row in rows]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.forward",
        description="The time of a forward with LoRAs over that of the layer alone, and its bound from "
        "arithmetic: medians with quartiles.",
    )
    for name, kind, choices in (
        ("tokens", int, None),
        ("dtype", str, tuple(TYPES)),
        ("base", str, BASES),
        ("family", str, tuple(FILES)),
        ("files", int, None),
    ):
        top.add_argument(f"--{name}", type=kind, choices=choices, action="append", help="repeatable")
    top.add_argument(
        "--stored", choices=tuple(TYPES), default="fp16", help="type of the files (default: %(default)s)"
    )
    top.add_argument("--rank", type=int, default=16, help="(default: %(default)s)")
    top.add_argument("--rounds", type=int, default=9, help="that are timed (default: %(default)s)")
    top.add_argument("--quick", action="store_true", help="the smaller layer, 512 tokens")
    top.add_argument("--json", action="store_true", help="the result as one JSON object")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    options = top.parse_args(arguments)
    if min([options.rank, options.rounds, *(options.tokens or []), *(options.files or [])]) < 1:
        top.error("tokens, files, rank and rounds must be at least 1")
    torch.manual_seed(0)
    device = machine_device()
    try:
        rows = [
            row
            for case in cases(options, device)
            for row in measure(case, options.files or (1, 4, 8), options.rounds, device)
        ]
    except ValueError as error:
        top.error(str(error))
    if options.json:
        sys.stdout.write(f"{json.dumps({'machine': where(device), 'rows': as_json(rows)}, indent=2)}\n")
    else:
        sys.stdout.write(f"Median and quartiles of {options.rounds} rounds. {where(device)}.\n\n")
        sys.stdout.write(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
