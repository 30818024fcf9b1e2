"""What measuring costs the step that is measured: per branch, while nothing is measured and while it is.

    python -m benchmarks.overhead_meter [--width 64 --tokens 16 --rank 4 --calls 2000 --rounds 50] [--json]

Each figure is the fastest of the rounds, in microseconds: another program can make a call slower, but
none faster. The branch that they stand beside is a small one, on the CPU; one of a real model takes longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib_precision_lora.adapters import read_adapters
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.session.overhead import Forward, OverheadMeter, ProcessorClock


@dataclass(frozen=True)
class Cost:
    """Microseconds. branch: what a layer takes longer with one; idle, measuring: the meter's part of it."""

    branch: float
    idle: float
    measuring: float


def fastest(call: Callable[[], object], calls: int, rounds: int) -> float:
    return 1e6 * min(timeit.repeat(call, number=calls, repeat=rounds)) / calls


def measure(width: int, tokens: int, rank: int, calls: int, rounds: int) -> Cost:
    model, x = nn.ModuleDict({"layer": nn.Linear(width, width)}), torch.randn(tokens, width)
    factors = {
        "layer.lora_up.weight": torch.randn(width, rank),
        "layer.lora_down.weight": torch.randn(rank, width),
    }
    few = max(1, calls // 20)  # of what takes so much longer
    with torch.inference_mode():
        alone = fastest(lambda: model["layer"](x), few, rounds)
        with PatchSession(model) as session:
            session.apply([("file", read_adapters(factors), 1.0)])
            beside = fastest(lambda: model["layer"](x), few, rounds)

    def nothing(*_: object) -> None:
        """In the place of a branch."""

    meter = OverheadMeter()
    plain = fastest(lambda: nothing(model, x, x), calls, rounds)
    idle = fastest(lambda: meter.timed(nothing, model, x, x), calls, rounds)
    meter.forward = Forward(ProcessorClock())
    measuring = fastest(lambda: meter.timed(nothing, model, x, x), calls, rounds)
    return Cost(beside - alone, idle - plain, measuring - plain)


def main(arguments: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead_meter",
        description="What the meter of the branches' time costs per branch: idle, and measuring.",
    )
    for name, default in (("width", 64), ("tokens", 16), ("rank", 4), ("calls", 2000), ("rounds", 50)):
        top.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    top.add_argument("--json", action="store_true", help="the result as one JSON object")
    options = vars(top.parse_args(arguments))
    as_json = options.pop("json")
    for name, value in options.items():
        if value < 1:
            top.error(f"--{name} is {value}, it must be at least 1")
    cost = measure(**options)
    text = f"a branch takes {cost.branch:.2f} us; the meter adds {cost.idle:.3f} us to it while idle, "
    text += f"{cost.measuring:.3f} us while measuring"
    sys.stdout.write(json.dumps(dataclasses.asdict(cost)) if as_json else text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
