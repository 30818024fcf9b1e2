"""What a call of a patched layer costs beyond the layer's own, where there is next to nothing to multiply.

    OMP_NUM_THREADS=1 python -m benchmarks.host_cost

One rank-4 file beside 16→8, 4 tokens. Microseconds of the process: the least of several rounds, since nothing
makes a call faster than it is. torch's own operations count, of which each takes one to three.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import get_args

import torch
from torch import nn

from benchmarks.forward import TYPES
from lib_precision_lora.adapters import read_adapters
from lib_precision_lora.branch import Compute, PatchSession

INPUTS, OUTPUTS, RANK, TOKENS = 16, 8, 4, 4
CALLS, ROUNDS = 1000, 7


def rows(calls: int = CALLS, rounds: int = ROUNDS) -> Iterator[tuple[str, Compute, float, float]]:
    """For each type of activations and compute mode: the layer's own µs, and those beyond."""
    file = {
        "layer.lora_down.weight": torch.randn(RANK, INPUTS),
        "layer.lora_up.weight": torch.randn(OUTPUTS, RANK),
        "layer.alpha": torch.tensor(float(RANK)),
    }
    for name, dtype in TYPES.items():
        stored = {key: tensor.to(dtype) for key, tensor in file.items()}
        adapters = read_adapters(stored, {"layer": "layer.weight"})
        x = torch.randn(TOKENS, INPUTS).to(dtype)
        bare = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=dtype)
        for compute in get_args(Compute):
            model = nn.ModuleDict({"layer": nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=dtype)})
            with PatchSession(model) as session, torch.inference_mode():
                session.apply([("file", adapters, 0.5)], compute)
                session.place(x.device, dtype)
                patched = model["layer"]
                pairs = [
                    (microseconds(partial(bare, x), calls), microseconds(partial(patched, x), calls))
                    for _ in range(rounds)
                ]
            own, whole = (min(times) for times in zip(*pairs, strict=True))
            yield name, compute, own, whole - own


def microseconds(run: Callable[[], object], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        run()
    return 1e6 * (time.process_time() - start) / calls


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_cost", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--calls", type=int, default=CALLS, help="in a row, of which the mean counts")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of which the least counts")
    parser.add_argument("--json", action="store_true", help="a list of objects instead of the table")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = list(rows(options.calls, options.rounds))
    finally:
        torch.set_num_threads(threads)
    if options.json:
        names = ("activations", "compute", "own_us", "beyond_us")
        sys.stdout.write(f"{json.dumps([dict(zip(names, row, strict=True)) for row in found])}\n")
        return 0
    lines = ["| activations | compute mode | the layer's own, µs | beyond, µs |", "|---|---|---:|---:|"]
    lines += [f"| {name} | {compute} | {own:.1f} | {beyond:.1f} |" for name, compute, own, beyond in found]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
