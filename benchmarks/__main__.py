"""All benchmarks in one process: tables, or one JSON object.

    make bench                          or: make bench BENCH="--quick", BENCH="--only card --json"
    OMP_NUM_THREADS=1 python -m benchmarks [--quick] [--only card --only forward] [--json]

What runs on the machine runs on its card where torch finds one, else on its CPU, and the output says which.
`card` is always counted, never timed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import card, dora_norms, family_cost, forward, host_cost, memory, overhead_meter, ready
from benchmarks.forward import where
from benchmarks.interleave import machine_device

Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Benchmark:
    """quick: its arguments where a minute has to do; device: whether it runs on a card where there is one."""

    title: str
    main: Main
    quick: tuple[str, ...]
    device: bool = False


BENCHMARKS: Mapping[str, Benchmark] = {
    "memory": Benchmark("Memory, planned and measured", memory.main, ("--files", "1", "--tokens", "256")),
    "card": Benchmark("Kernels and bytes on a card", card.main, ("--files", "1", "--files", "4")),
    "forward": Benchmark("A forward with LoRAs", forward.main, ("--quick", "--rounds", "5"), True),
    "ready": Benchmark(
        "From files to a ready model", ready.main, ("--blocks", "2", "--files", "1", "--files", "2"), True
    ),
    "overhead": Benchmark(
        "The meter of the branches' time", overhead_meter.main, ("--calls", "200", "--rounds", "10")
    ),
    "family": Benchmark(
        "Families",
        family_cost.main,
        ("--tokens", "64", "--inputs", "768", "--outputs", "768", "--repeats", "3"),
    ),
    "host_cost": Benchmark(
        "What a call costs beyond the layer's own", host_cost.main, ("--calls", "200", "--rounds", "3")
    ),
    "dora": Benchmark("Norms of a DoRA", dora_norms.main, ("--shape", "768x768", "--repeats", "3")),
}


def output_of(benchmark: Benchmark, arguments: Sequence[str]) -> str:
    """What it prints. Raises `RuntimeError` where it fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = benchmark.main(arguments)
    if code:
        raise RuntimeError(f"{benchmark.title}: ended with {code}")
    return printed.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="All benchmarks, in one process.")
    top.add_argument("--only", choices=tuple(BENCHMARKS), action="append", help="this one; repeatable")
    top.add_argument("--quick", action="store_true", help="small sizes, few rounds: about a minute")
    top.add_argument("--json", action="store_true", help="everything as one JSON object")
    options = top.parse_args(arguments)
    device = machine_device()
    results = {}
    if not options.json:
        sys.stdout.write(f"# Benchmarks\n\nOn {where(device)}.\n")
    for name in options.only or tuple(BENCHMARKS):
        benchmark = BENCHMARKS[name]
        given = [*(benchmark.quick if options.quick else ()), *(["--json"] if options.json else [])]
        printed = output_of(benchmark, given)
        if options.json:
            results[name] = json.loads(printed)
            continue
        place = " (without the card)" if device.type == "cuda" and not benchmark.device else ""
        sys.stdout.write(f"\n## {benchmark.title}{place}\n\n{printed.rstrip()}\n")
        sys.stdout.flush()
    if options.json:
        sys.stdout.write(f"{json.dumps({'machine': where(device), **results}, indent=2)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
