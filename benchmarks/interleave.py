"""Times of several runs that take turns, as ratios: what slows the machine down slows all of them.

On the CPU with one thread they are times of this process, which others do not lengthen by taking turns with
it; with several threads they are those of the clock on the wall. On a card each run lies between two events
of the device, and the host waits for them once, after the last round: a run that asks the device for a value
shows in its time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Spread:
    """The median of all rounds, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(*values * 3)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f}× ({self.low:.3f} to {self.high:.3f})"


def machine_device() -> torch.device:
    """A card where there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else CPU


def now() -> float:
    """Seconds of what times are taken from on the CPU."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(runs: Mapping[str, Run], rounds: int, device: torch.device = CPU) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one that is not timed.

    Each round begins with another run than the one before.
    """
    for run in runs.values():
        run()
    clock = _on_card if device.type == "cuda" else _on_cpu
    names = list(runs)
    found: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(clock(runs[name]))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: [read() for read in times] for name, times in found.items()}


def ratios(times: Mapping[str, Sequence[float]], base: str) -> dict[str, Spread]:
    """Each run's time over that of one of them, round by round."""
    return {
        name: Spread.of([own / bare for own, bare in zip(found, times[base], strict=True)])
        for name, found in times.items()
        if name != base
    }


def _on_cpu(run: Run) -> Callable[[], float]:
    start = now()
    run()
    taken = now() - start
    return lambda: taken


def _on_card(run: Run) -> Callable[[], float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    return lambda: start.elapsed_time(end) / 1e3
