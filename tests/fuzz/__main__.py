"""`python -m tests.fuzz`: all targets, a table of what was tried, and exit code 1 where there was a fault."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from tests.fuzz.measure import RESET
from tests.fuzz.run import Found, Result
from tests.fuzz.target import MIB
from tests.fuzz.targets import INPUTS, target
from tests.fuzz.workers import Job, results

FOLDER = Path(".fuzz")
"""Where inputs with a fault are written."""

COLUMNS = ("target", "inputs", "accepted", "refused", "worst time", "at", "worst memory", "at", "faults")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    names = options.target or list(INPUTS)
    start = time.monotonic()
    found: list[Result] = []
    for result in results(_jobs(names, options, start), options.processes):
        found.append(result)
        say(f"{result.target}: {result.tried} inputs" + ("" if result.finished else ", not all"))
        for fault in result.faults:
            say(f"FAULT {fault.command}\n      {fault.sentence}\n      {_write(fault)}")
    seconds = time.monotonic() - start
    merged = [_merged(name, found) for name in names]
    say(table(merged))
    tried, faults = sum(each.tried for each in merged), sum(len(each.faults) for each in merged)
    say(
        f"{tried} inputs of seed {options.seed} in {seconds:.0f} s, {faults} faults. Time is the processor's;"
    )
    say(
        "memory is the peak of resident memory beyond that before the input"
        + ("." if RESET.exists() else ", where it is beyond that of all inputs before.")
    )
    if not all(result.finished for result in found):
        say("Not all inputs were tried.")
    return 1 if faults else 0


def _jobs(names: Sequence[str], options: argparse.Namespace, start: float) -> list[Job]:
    """Each target in as many parts as there are processes, so that all of them are done at about one time."""
    until = start + options.seconds
    jobs = []
    for name in names:
        if options.only is not None:
            jobs.append(Job(name, options.seed, options.only, options.only + 1, until))
            continue
        total = options.inputs or INPUTS[name]
        edges = [total * part // options.processes for part in range(options.processes + 1)]
        jobs.extend(
            Job(name, options.seed, first, last, until) for first, last in pairwise(edges) if last > first
        )
    return jobs


def _merged(name: str, found: Iterable[Result]) -> Result:
    whole = Result(name)
    for part in (each for each in found if each.target == name):
        whole.accepted += part.accepted
        whole.refused += part.refused
        whole.faults += part.faults
        whole.finished &= part.finished
        if part.worst.seconds > whole.worst.seconds:
            whole.worst.seconds, whole.slowest = part.worst.seconds, part.slowest
        if part.worst.nbytes > whole.worst.nbytes:
            whole.worst.nbytes, whole.largest = part.worst.nbytes, part.largest
    return whole


def table(rows: Sequence[Result]) -> str:
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def _cells(row: Result) -> tuple[str, ...]:
    return (
        row.target,
        *map(str, (row.tried, row.accepted, row.refused)),
        f"{1000 * row.worst.seconds:.0f} ms",
        f"#{row.slowest}",
        f"{row.worst.nbytes / MIB:.1f} MiB",
        f"#{row.largest}",
        str(len(row.faults)),
    )


def _write(fault: Found) -> Path:
    """The fault, and the files of its input, beside each other."""
    folder = FOLDER / f"{fault.target}-{fault.seed}-{fault.index}"
    folder.mkdir(parents=True, exist_ok=True)
    given = target(fault.target).input(fault.seed, fault.index)
    text = f"{fault.command}\n{fault.sentence}\n\n{fault.trace}\n{given.rest!r}\n"
    (folder / "fault.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    for name, content in given.files.items():
        (folder / name).write_bytes(content)
    return folder


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", action="append", choices=INPUTS, help="this one alone; may be repeated")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--inputs", type=int, help="of each target (default: each its own number)")
    parser.add_argument("--only", type=int, metavar="INDEX", help="this input alone, as a fault names it")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="after so many nothing is begun any more"
    )
    parser.add_argument("--processes", type=int, default=2)
    return parser


if __name__ == "__main__":
    sys.exit(main())
