"""Targets in processes of their own, two at a time: one that crashes or hangs ends its process alone."""

from __future__ import annotations

import multiprocessing
import resource
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.fuzz.measure import PATIENCE, STATUS
from tests.fuzz.run import Found, Result, run
from tests.fuzz.target import MIB
from tests.fuzz.targets import target

ROOM = 4096 * MIB
"""Address space beyond that of the start: what asks for more fails, before the machine runs out of it."""


@dataclass(frozen=True, slots=True)
class Job:
    """The inputs `start` to `stop` of a target. until: by `time.monotonic`, which processes share."""

    target: str
    seed: int
    start: int
    stop: int
    until: float


def results(jobs: Sequence[Job], processes: int) -> Iterator[Result]:
    """As they come."""
    waiting, running = list(jobs), list[_Worker]()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                running.append(_Worker(waiting.pop(0)))
            wait([worker.receiver for worker in running], timeout=1.0)
            for worker in list(running):
                result = worker.result()
                if result is not None:
                    running.remove(worker)
                    yield result
    finally:
        for worker in running:
            worker.process.kill()


class _Worker:
    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.job = job
        self._index = context.Value("q", -1, lock=False)
        self._last, self._since = -1, time.monotonic()
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(job, self._index, sender), daemon=True)
        self.process.start()
        sender.close()

    def result(self) -> Result | None:
        """None while there is none. Of a process that is gone, or does not move, it is a fault."""
        if self.receiver.poll():
            try:
                found: Result = self.receiver.recv()
            except EOFError:
                self.process.join()
                return self._ended(f"the process ended with the code {self.process.exitcode}")
            self.process.join()
            return found
        now, index = time.monotonic(), int(self._index.value)
        if index != self._last:
            self._last, self._since = index, now
        if index >= 0 and now - self._since > 3 * PATIENCE:
            self.process.kill()
            self.process.join()
            return self._ended(f"the process did not move for {3 * PATIENCE} s")
        return None

    def _ended(self, sentence: str) -> Result:
        index = max(int(self._index.value), self.job.start)
        tried = index - self.job.start
        fault = Found(self.job.target, self.job.seed, index, sentence)
        return Result(self.job.target, refused=tried, finished=False, faults=[fault])


def _work(job: Job, index: Any, sender: Connection) -> None:
    import torch

    warnings.simplefilter("ignore")  # of casts, which inputs are made with
    torch.set_num_threads(1)
    if STATUS.exists():
        limit_memory()

    def tell(number: int) -> None:
        index.value = number

    sender.send(run(target(job.target), job.seed, range(job.start, job.stop), job.until, tell))
    sender.close()


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, most))
