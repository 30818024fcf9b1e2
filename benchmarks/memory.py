"""What LoRAs take on Flux's layers: a stock-like merge, and ours as planned and as measured.

    python -m benchmarks.memory [--files 8 --rank 32 --tokens 4096] [--json]

Bytes of tensors that are alive at once beyond the layer's own, on the CPU, counted by `memory.meter`. One
double block's image stream and one single block, bf16 activations. Streamed: a layer's factors at a time,
those in RAM not counted; on a card the next layer's are there too. Beside the meter, the kernel's own count
of the peak while factors are placed and a forward runs (Linux), of a process in which nothing else was done.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.flux_layers import ONE_TOKEN, SHAPES, flux_layers, inputs, loras
from benchmarks.resident import peak_resident
from lib_precision_lora.adapters import LoRA
from lib_precision_lora.branch import Patch, PatchSession
from lib_precision_lora.memory.meter import ByteMeter
from lib_precision_lora.report.demo.stock_merge import STOCK_FORMATS, stock_like_merge
from lib_precision_lora.storage import GGUFParameter

MIB = 2**20
CPU = torch.device("cpu")
MERGE_SIDE = 2048
"""The merge's transient is proportional to the layer: one of this height and width is measured."""


@dataclass(frozen=True)
class Layer:
    """One layer's bytes; resident: placing, then a forward; streamed: a forward.

    resident_peak: of the first two, the kernel's count for a process of its own (`resident.py`).
    """

    name: str
    rows: int
    columns: int
    tokens: int
    factors_planned: int
    factors_measured: int
    workspace_planned: int
    workspace_measured: int
    streamed_planned: int
    streamed_measured: int
    merge_transient: int
    resident_peak: int | None


def merge_bytes_per_parameter() -> float:
    """Peak bytes of a stock-like merge into Q8_0, with one LoRA of rank 32, per parameter of the layer."""
    blocks = torch.full((MERGE_SIDE * MERGE_SIDE // 32, 34), 1, dtype=torch.uint8)
    weight = GGUFParameter(blocks, "Q8_0", (MERGE_SIDE, MERGE_SIDE))
    factors = torch.full((MERGE_SIDE, 32), 0.01, dtype=torch.bfloat16)
    lora = LoRA(factors, factors.T.contiguous(), 1.0)
    with torch.no_grad(), ByteMeter() as meter:
        stock_like_merge(STOCK_FORMATS["Q8_0"], weight, lora)
    return meter.peak / MERGE_SIDE**2


def measure(files: int, rank: int, tokens: int) -> list[Layer]:
    """Every layer alone: factors of several layers add up, and of their workspaces one is there at a time."""
    patches: dict[str, list[Patch]] = {name: [] for name in SHAPES}
    for patch in loras(files, rank):
        patches[patch.target.parameter.removesuffix(".weight")].append(patch)
    peaks = {  # first, while no heap is in pieces
        name: peak_resident(functools.partial(ready_to_run, name, own, tokens))
        for name, own in patches.items()
    }
    per_parameter = merge_bytes_per_parameter()
    return [measure_layer(name, own, tokens, per_parameter, peaks[name]) for name, own in patches.items()]


def measure_layer(
    name: str, patches: Sequence[Patch], tokens: int, per_parameter: float, resident_peak: int | None
) -> Layer:
    model = flux_layers(CPU)
    session, x = PatchSession(model), inputs(name, tokens, CPU)
    planned = session.footprints(patches, "auto", CPU, x.dtype)[name]
    count = x.numel() // x.shape[-1]
    session.apply_patches(patches)
    output = model[name].forward(x)
    model[name].forward = lambda x: output
    with torch.no_grad():
        with ByteMeter() as placing:
            session.place(CPU, x.dtype)
        placed = session.placed_bytes
        with ByteMeter() as forward:
            model[name](x)
        session.place(CPU, x.dtype, resident=frozenset())
        with ByteMeter() as streaming:
            model[name](x)
    assert placing.live <= placed
    return Layer(
        name,
        *SHAPES[name],
        count,
        planned.factor_bytes,
        placed,
        planned.workspace_bytes(count),
        forward.peak,
        planned.factor_bytes + planned.workspace_bytes(count),
        streaming.peak,
        int(per_parameter * SHAPES[name][0] * SHAPES[name][1]),
        resident_peak,
    )


def ready_to_run(name: str, patches: Sequence[Patch], tokens: int) -> Callable[[], None]:
    """What places the layer's factors and runs it, which was done once with few tokens."""
    model, x = flux_layers(CPU), inputs(name, tokens, CPU)
    session = PatchSession(model)
    session.apply_patches(patches)
    output = model[name].forward(x).zero_()
    model[name].forward = lambda x: output[:, : x.shape[1]]

    def run(x: torch.Tensor) -> None:
        with torch.no_grad():
            session.place(CPU, x.dtype)
            model[name](x)

    run(x[:, :64])
    session.release()
    return lambda: run(x)


def table(layers: Sequence[Layer]) -> str:
    """MiB, as Markdown."""
    lines = [
        "| layer | shape | tokens | factors planned | measured | workspace planned | measured "
        "| streamed planned | measured | stock-like merge | peak RSS |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for layer in layers:
        sizes = list(asdict(layer).values())[4:]
        cells = " | ".join("" if size is None else f"{size / MIB:.1f}" for size in sizes)
        lines.append(f"| {layer.name} | {layer.rows}×{layer.columns} | {layer.tokens} | {cells} |")
    factors = [sum(getattr(layer, f"factors_{kind}") for layer in layers) for kind in ("planned", "measured")]
    largest = [
        max(getattr(layer, name) for layer in layers)
        for name in (
            "workspace_planned",
            "workspace_measured",
            "streamed_planned",
            "streamed_measured",
            "merge_transient",
        )
    ]
    cells = " | ".join(f"{size / MIB:.1f}" for size in (*factors, *largest))
    return "\n".join([*lines, f"| all: sum of factors, largest of the others | | | {cells} | |"]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description="The memory of LoRAs on the layers of one double and one single block of Flux, planned "
        f"and measured on the CPU, beside a stock-like merge. {', '.join(ONE_TOKEN)} see one vector.",
    )
    for name, default in (("files", 8), ("rank", 32), ("tokens", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="bytes, as one JSON object")
    options = parser.parse_args(arguments)
    for name in ("files", "rank", "tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, it must be at least 1")
    layers = measure(options.files, options.rank, options.tokens)
    if options.json:
        sizes = {name: getattr(options, name) for name in ("files", "rank", "tokens")}
        sys.stdout.write(f"{json.dumps({**sizes, 'layers': [asdict(each) for each in layers]}, indent=2)}\n")
    else:
        sys.stdout.write(table(layers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
