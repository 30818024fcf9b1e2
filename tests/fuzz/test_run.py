"""The runner finds a fault of each kind, names the input, and finds nothing where there is none."""

from __future__ import annotations

import mmap
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import __main__ as command
from tests.fuzz import workers
from tests.fuzz.measure import RESET, measured
from tests.fuzz.run import MOST_FAULTS, Result, run
from tests.fuzz.target import MIB, Check, Fault, Input, Target
from tests.fuzz.texts import check_said
from tests.hostile_text import NAMES

BAD = 3
"""The number of the input after which a planted fault shows."""


def planted(fault: Callable[[Path], object], **bounds: float) -> Target:
    """A target that is in order, but for one input."""

    def make(random: Random) -> Input:
        return Input({"lora.pt": b"as it was"}, random.random())

    bad = Target("planted", make, _unopened).input(1, BAD).rest

    @contextmanager
    def opened(folder: Path) -> Iterator[Check]:
        def check(given: Input) -> bool:
            if given.rest == bad:
                fault(folder)
            return True

        yield check

    return Target("planted", make, opened, **bounds)  # type: ignore[arg-type]


@contextmanager
def _unopened(folder: Path) -> Iterator[Check]:
    yield lambda given: True


def _raise(error: BaseException) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        raise error

    return fault


def _work(folder: Path) -> None:
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass


def _take(folder: Path) -> None:
    with mmap.mmap(-1, 32 * MIB) as taken:  # new memory: an allocator may have some left over
        for start in range(0, len(taken), mmap.PAGESIZE):
            taken[start] = 1


def _swallowed(folder: Path) -> None:
    """As a library may that catches everything."""
    try:
        (folder / "it-ran").mkdir()
        raise RuntimeError
    except Exception:  # noqa: BLE001
        return


def _put_back(folder: Path) -> None:
    """Nothing is seen of it afterwards."""
    (folder / "lora.pt").rename(folder / "lora.pt.corrupted")
    (folder / "lora.pt.corrupted").rename(folder / "lora.pt")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another exception": (_raise(KeyError("x")), r"it raised KeyError: \"'x'\""),
    "no memory": (_raise(MemoryError()), "it raised MemoryError"),
    "an exit": (_raise(SystemExit(2)), "it raised SystemExit"),
    "a sentence of the check": (_raise(Fault("it is wrong")), "it is wrong"),
    "a path in a message": (lambda folder: check_said(f"{folder}/x", folder), "path of a folder"),
    "a character that acts": (lambda folder: check_said("a\x1b[2J", folder), "what is said has"),
    "a second line": (lambda folder: check_said("a\nb", folder), "what is said has"),
    "time": (_work, r"it took 0\.\d+ s of the processor, above 0\.1 s"),
    "a hang": (lambda folder: time.sleep(60), r"it was not done after 0\.5 s"),
    "memory": (_take, r"it took \d+ MiB of memory, above 16 MiB"),
    "a file made": (lambda folder: (folder / "x").write_bytes(b""), "to write"),
    "a file written over": (lambda folder: (folder / "lora.pt").write_bytes(b"as it is"), "to write"),
    "a file renamed and put back": (_put_back, "os.rename"),
    "a file removed": (lambda folder: (folder / "lora.pt").unlink(), "os.remove"),
    "a folder made, and the error swallowed": (_swallowed, "os.mkdir"),
    "a program": (lambda folder: os.system("true"), "os.system"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_found_with_the_input_that_shows_it(kind: str) -> None:
    fault, sentence = FAULTS[kind]
    target = planted(fault, seconds=0.1, nbytes=16 * MIB)
    result = run(target, 1, range(6), patience=0.5 if kind == "a hang" else 60)
    (found,) = result.faults
    assert found.index == BAD
    assert re.search(sentence, found.sentence), found.sentence
    assert found.command == f"python -m tests.fuzz --target planted --seed 1 --only {BAD}"
    assert (result.tried, result.accepted) == (6, 5)
    assert run(target, 1, range(BAD)).faults == []


def test_the_guard_sees_what_python_is_not_told_of(tmp_path: Path) -> None:
    """A file that is written by a mapping, or by a library of C."""

    def write(folder: Path) -> None:
        with open(handles[0].name, "rb") as file, mmap.mmap(handles[0].fileno(), 0) as mapped:
            mapped[:2] = b"AS"
            assert file.read(2) == b"AS"

    handles = []

    @contextmanager
    def opened(folder: Path) -> Iterator[Check]:
        path = folder / "kept"
        path.write_bytes(b"as it was")
        with path.open("r+b") as file:
            handles.append(file)
            yield lambda given: bool(write(folder) or True)

    result = run(Target("planted", lambda random: Input(), opened), 1, range(1))
    assert [found.sentence for found in result.faults] == ["files were changed: 'kept'"]


def test_a_target_with_many_faults_is_given_up() -> None:
    def make(random: Random) -> Input:
        return Input()

    @contextmanager
    def opened(folder: Path) -> Iterator[Check]:
        yield lambda given: bool(1 / 0)

    result = run(Target("planted", make, opened), 1, range(100))
    assert (len(result.faults), result.finished) == (MOST_FAULTS, False)


def test_out_of_time_nothing_is_begun_any_more() -> None:
    result = run(planted(lambda folder: None), 1, range(10), until=time.monotonic() - 1)
    assert (result.tried, result.finished) == (0, False)


@pytest.mark.skipif(not RESET.exists(), reason="the peak of a process is set back on Linux alone")
def test_memory_that_was_taken_before_is_none_of_an_inputs() -> None:
    with measured() as first:
        _take(Path())
    with measured() as second:
        pass
    assert 30 * MIB < first.nbytes < 40 * MIB
    assert second.nbytes < MIB


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("<")])
def test_every_name_that_acts_is_one_that_no_message_may_have(name: str) -> None:
    with pytest.raises(Fault):
        check_said(name, Path("/nowhere"))


def test_a_process_that_ends_is_a_fault_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does whose memory a tensor has written over."""

    class Ended(workers._Worker):
        def __init__(self, job: workers.Job) -> None:
            super().__init__(job)
            self.process.join()

    monkeypatch.setattr(workers, "_work", _die)
    monkeypatch.setattr(workers, "_Worker", Ended)
    (result,) = workers.results([workers.Job("pickles", 1, 5, 20, float("inf"))], 1)
    (found,) = result.faults
    assert (found.index, found.sentence) == (7, "the process ended with the code 9")


def _die(job: workers.Job, index: object, sender: object) -> None:
    index.value = 7  # type: ignore[attr-defined]
    os._exit(9)


def test_a_fault_is_written_with_its_input_and_gives_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = command.Found("pickles", 1, 5, "it is wrong", "Traceback")

    def results(jobs: object, processes: int) -> Iterator[Result]:
        yield Result("pickles", 3, 2, faults=[found])

    monkeypatch.setattr(command, "results", results)
    assert command.main(["--target", "pickles"]) == 1
    assert "python -m tests.fuzz --target pickles --seed 1 --only 5" in capsys.readouterr().out
    folder = tmp_path / ".fuzz" / "pickles-1-5"
    assert "it is wrong" in (folder / "fault.txt").read_text()
    assert (folder / "lora.pt").read_bytes() == command.target("pickles").input(1, 5).files["lora.pt"]


def test_a_run_without_faults_gives_exit_code_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "results", lambda jobs, processes: [Result("api", 3, 2), Result("api", 1)])
    assert command.main(["--target", "api"]) == 0
    assert "api" in (out := capsys.readouterr().out)
    assert "6 inputs of seed 1" in out
