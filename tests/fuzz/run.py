"""Inputs of one target, one after the other, in this process."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.guard import guarded
from tests.fuzz.measure import PATIENCE, Cost, measured
from tests.fuzz.target import MIB, Check, Fault, Input, Target

MOST_FAULTS = 5
"""After so many the target is given up: they are seldom of more than one kind."""


@dataclass(frozen=True, slots=True)
class Found:
    """A fault, and how it comes again: `Target.input(seed, index)`."""

    target: str
    seed: int
    index: int
    sentence: str
    trace: str = ""

    @property
    def command(self) -> str:
        return f"python -m tests.fuzz --target {self.target} --seed {self.seed} --only {self.index}"


@dataclass(slots=True)
class Result:
    """accepted, refused: numbers of inputs; worst: of each cost, apart; finished: not out of time."""

    target: str
    accepted: int = 0
    refused: int = 0
    worst: Cost = field(default_factory=Cost)
    slowest: int = -1
    largest: int = -1
    finished: bool = True
    faults: list[Found] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.accepted + self.refused + len(self.faults)


def run(
    target: Target,
    seed: int,
    indices: Iterable[int],
    until: float = float("inf"),
    before: Callable[[int], None] = lambda index: None,
    patience: float = PATIENCE,
) -> Result:
    """Try these inputs. until: by `time.monotonic`; before: told of each index; patience: see `measured`."""
    result = Result(target.name)
    with _own_folder() as folder, target.opened(folder) as check:
        for index in indices:
            if time.monotonic() > until or len(result.faults) == MOST_FAULTS:
                result.finished = False
                break
            before(index)
            given = target.input(seed, index)
            try:
                accepted, cost = _try(target, check, folder, given, patience)
            except Fault as fault:
                trace = "".join(traceback.format_exception(fault))
                result.faults.append(Found(target.name, seed, index, str(fault), trace))
                continue
            result.accepted += accepted
            result.refused += not accepted
            if cost.seconds > result.worst.seconds:
                result.worst.seconds, result.slowest = cost.seconds, index
            if cost.nbytes > result.worst.nbytes:
                result.worst.nbytes, result.largest = cost.nbytes, index
    return result


def _try(target: Target, check: Check, folder: Path, given: Input, patience: float) -> tuple[bool, Cost]:
    """Whether it was accepted, and what it took. Raises `Fault`.

    What goes beyond a bound is measured a second time: the first of its kind may import modules.
    """
    with _placed(folder, given.files):
        accepted, cost = _once(check, folder, given, patience)
        if cost.seconds > target.seconds or cost.nbytes > target.nbytes:
            accepted, cost = _once(check, folder, given, patience)
    if cost.seconds > target.seconds:
        raise Fault(f"it took {cost.seconds:.2f} s of the processor, above {target.seconds:g} s")
    if cost.nbytes > target.nbytes:
        raise Fault(f"it took {cost.nbytes / MIB:.0f} MiB of memory, above {target.nbytes / MIB:.0f} MiB")
    return accepted, cost


def _once(check: Check, folder: Path, given: Input, patience: float) -> tuple[bool, Cost]:
    try:
        with guarded(folder), measured(patience) as cost:
            accepted = check(given)
    except Fault:
        raise
    except (Exception, SystemExit) as error:
        raise Fault(f"it raised {type(error).__name__}: {str(error)[:300]!r}") from error
    return accepted, cost


@contextmanager
def _placed(folder: Path, files: Mapping[str, bytes]) -> Iterator[None]:
    """The input's files beside those that the target has there for all of them."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        yield
    finally:
        for name in files:
            (folder / name).unlink(missing_ok=True)


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A new folder, that is the current one meanwhile: what a file names without a path lies there."""
    former = Path.cwd()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(former)
        shutil.rmtree(folder, ignore_errors=True)
