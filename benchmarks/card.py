"""Kernels and bytes of LoRAs on a card, and the time of a roofline: counted, not timed.

    python -m benchmarks.card [--rank 16 --files 1 --files 4 --files 8 --pass flux --launch-us 5] [--json]

No card is needed: `fake_card` runs the code of one. `card_ways` says what is compared, `roofline` how a time
is made of counts. Files are stored in bf16, fp16 and fp32 for ours, in the activations' type for the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.card_layers import LAYERS, PASSES, Layer, Pass
from benchmarks.card_ways import Files, Way, bare, counting, ways
from benchmarks.kernels import Kernel
from benchmarks.roofline import CARDS, LAUNCH

COUNTED = "Counted, not timed: fake CUDA tensors, and a roofline"
STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in STORED.items()}
LIMITS = {"linear": (8, 1.3), "convolution": (10, 1.5)}
"""What a plain stack may take: kernels, and bytes over those of two products."""


@dataclass(frozen=True)
class Row:
    """One way on one layer, or on all layers of a pass, beyond their own kernels.

    milliseconds: by card; share: bytes over those of two products; over: more than `LIMITS` allows.
    """

    subject: str
    loras: int
    way: str
    stored: str
    kernels: int
    bytes: int
    flops: int
    milliseconds: dict[str, float]
    share: float
    over: bool = False

    @classmethod
    def of(
        cls,
        subject: str,
        files: Files,
        way: str,
        kernels: Sequence[Kernel],
        least: int,
        launch: float,
        over: bool = False,
    ) -> Row:
        moved, flops = sum(kernel.bytes for kernel in kernels), sum(kernel.flops for kernel in kernels)
        times = {card.name: 1e3 * card.seconds(kernels, launch) for card in CARDS}
        name = NAMES[files.dtype]
        share = moved / least if least else 0.0
        return cls(subject, files.count, way, name, len(kernels), moved, flops, times, share, over)


def compared(dtype: torch.dtype) -> Iterator[tuple[str, Way, torch.dtype]]:
    """Every way with every type of file that matters to it, for activations of this type."""
    for name, way in ways().items():
        for stored in STORED.values() if name == "ours" else (dtype,):
            yield name, way, stored


def layer_rows(layer: Layer, counts: Sequence[int], rank: int, launch: float) -> Iterator[Row]:
    """Every way on one layer."""
    limits = LIMITS["convolution" if layer.kernel else "linear"]
    two_products = ways()["two products"]
    for count in counts:
        least = moved(two_products(layer, Files(count, rank, layer.dtype)))
        for name, way, stored in compared(layer.dtype):
            files = Files(count, rank, stored)
            kernels = way(layer, files)
            over = len(kernels) > limits[0] or moved(kernels) > limits[1] * least
            yield Row.of(layer.name, files, name, kernels, least, launch, name == "ours" and over)


def pass_rows(model: Pass, counts: Sequence[int], rank: int, launch: float) -> Iterator[Row]:
    """Every way on all layers of a pass that a file changes, and first these layers' own kernels."""
    layers = model.layers()
    dtype = layers[0].dtype
    own = [kernel for layer in layers for kernel in bare(layer) * layer.count]
    yield Row.of(model.name, Files(0, rank, dtype), "the layers alone", own, 0, launch)
    for count in counts:
        least = 0
        rows = []
        for name, way, stored in compared(dtype):
            files = Files(count, rank, stored)
            kernels = [kernel for layer in layers for kernel in way(layer, files) * layer.count]
            least = moved(kernels) if name == "two products" else least
            rows.append((files, name, kernels))
        for files, name, kernels in rows:
            yield Row.of(model.name, files, name, kernels, least, launch)


def moved(kernels: Sequence[Kernel]) -> int:
    return sum(kernel.bytes for kernel in kernels)


def table(first: str, rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    """Ways beside each other, for each subject and number of LoRAs."""
    kinds = [(row.way, row.stored) if row.way == "ours" else (row.way, "") for row in rows]
    columns = list(dict.fromkeys(kinds))
    heads = [f"{way}, {stored} files" if stored else way for way, stored in columns]
    lines = [f"| {first} | LoRAs | {' | '.join(heads)} |", f"|---|---:|{'---|' * len(heads)}"]
    cells: dict[tuple[str, int], dict[tuple[str, str], str]] = {}
    for row, kind in zip(rows, kinds, strict=True):
        cells.setdefault((row.subject, row.loras), {})[kind] = cell(row)
    for (subject, loras), found in cells.items():
        lines.append(f"| {subject} | {loras} | {' | '.join(found.get(c, '') for c in columns)} |")
    return "\n".join(lines) + "\n"


def layer_cell(row: Row) -> str:
    """Kernels, MB, and MB over those of two products; * where it is more than `LIMITS` allows."""
    share = "" if row.way == "two products" else f" ({row.share:.2f}×{'*' if row.over else ''})"
    return f"{row.kernels}, {row.bytes / 1e6:.0f}{share}"


def pass_cell(row: Row) -> str:
    """Kernels and GB."""
    return f"{row.kernels}, {row.bytes / 1e9:.1f}"


def time_cell(row: Row) -> str:
    """Milliseconds on each of `CARDS`."""
    return " / ".join(f"{row.milliseconds[card.name]:.0f}" for card in CARDS)


def measure(
    counts: Sequence[int] = (1, 4, 8),
    rank: int = 16,
    passes: Sequence[str] = tuple(PASSES),
    launch: float = LAUNCH,
    layers: Sequence[Layer] = LAYERS,
) -> dict[str, list[Row]]:
    """Rows of single layers, and of whole passes."""
    ways()  # imports what it compares, while the CPU alone is there
    with counting():
        single = [row for layer in layers for row in layer_rows(layer, counts, rank, launch)]
        whole = [row for name in passes for row in pass_rows(PASSES[name], counts, rank, launch)]
    return {"layers": single, "passes": whole}


def as_json(rows: dict[str, list[Row]], rank: int, launch: float) -> dict[str, Any]:
    return {
        "measure": COUNTED,
        "torch": torch.__version__,
        "rank": rank,
        "launch_seconds": launch,
        "cards": [dataclasses.asdict(card) for card in CARDS],
        **{name: [dataclasses.asdict(row) for row in found] for name, found in rows.items()},
    }


def as_text(rows: dict[str, list[Row]], rank: int, launch: float) -> str:
    text = (
        f"{COUNTED}. torch {torch.__version__}, rank {rank}, {1e6 * launch:g} µs for each launch.\n\n"
        f"Kernels and MB beyond the layer's own, and MB over those of two products:\n\n"
        f"{table('layer', rows['layers'], layer_cell)}"
    )
    if rows["passes"]:
        names = " / ".join(card.name for card in CARDS)
        own = [row for row in rows["passes"] if row.loras == 0]
        added = [row for row in rows["passes"] if row.loras]
        alone = "; ".join(f"{row.subject}: {pass_cell(row)} GB, {time_cell(row)} ms" for row in own)
        text += (
            f"\nWhole passes, kernels and GB beyond those of the layers that a file changes:\n\n"
            f"{table('pass', added, pass_cell)}\nMilliseconds of a roofline, {names}:\n\n"
            f"{table('pass', added, time_cell)}\nThese layers alone: {alone}.\n"
        )
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.card",
        description="Kernels and bytes that LoRAs add on a card, per layer and for whole passes, and the "
        "time of a roofline for a few cards: counted, not timed.",
    )
    top.add_argument("--rank", type=int, default=16, help="(default: %(default)s)")
    top.add_argument("--files", type=int, action="append", help="LoRAs; repeatable (default: 1, 4, 8)")
    top.add_argument("--pass", dest="passes", choices=tuple(PASSES), action="append", help="repeatable")
    top.add_argument(
        "--launch-us", type=float, default=1e6 * LAUNCH, help="µs for each kernel (default: %(default)g)"
    )
    top.add_argument("--json", action="store_true", help="all rows, as one JSON object")
    options = top.parse_args(arguments)
    if options.rank < 1 or min(options.files or [1]) < 1 or options.launch_us < 0:
        top.error("rank and files must be at least 1, the launch at least 0")
    launch = options.launch_us / 1e6
    try:
        ways()
    except ValueError as error:
        top.error(str(error))
    rows = measure(options.files or (1, 4, 8), options.rank, options.passes or tuple(PASSES), launch)
    if options.json:
        sys.stdout.write(f"{json.dumps(as_json(rows, options.rank, launch), indent=2)}\n")
    else:
        sys.stdout.write(as_text(rows, options.rank, launch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
