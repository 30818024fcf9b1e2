"""What an input does to the outside: files of the folder, and calls that Python tells its audit hooks of."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import O_APPEND, O_CREAT, O_RDWR, O_TRUNC, O_WRONLY
from pathlib import Path
from typing import Any

from tests.fuzz.target import Fault

WRITES = O_WRONLY | O_RDWR | O_APPEND | O_CREAT | O_TRUNC
DEVICES = ("/dev/", "/proc/")
ACTS = frozenset(
    {
        *(
            "os.rename",
            "os.remove",
            "os.mkdir",
            "os.rmdir",
            "os.link",
            "os.symlink",
            "os.truncate",
            "os.chmod",
        ),
        *(
            "os.chown",
            "os.utime",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.spawn",
            "os.fork",
            "os.putenv",
        ),
        *("subprocess.Popen", "socket.connect", "pickle.find_class", "builtins.input", "shutil.move"),
        *("shutil.copyfile", "shutil.rmtree", "tempfile.mkstemp", "tempfile.mkdtemp"),
    }
)
"""Events of Python's audit that no input may cause."""

_acts: list[str] = []
_state = {"installed": False, "watching": False}


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Raises `Fault` where something was done to a file, or run. No exception of the caller's hides it."""
    before = _listing(folder)
    _watch(True)
    try:
        yield
    finally:
        _watch(False)
        acts, _acts[:] = _acts[:], []
        if acts:
            raise Fault(f"it did what no input may: {', '.join(dict.fromkeys(acts))}")
        after = _listing(folder)
        if after != before:
            changed = sorted(
                name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
            )
            raise Fault(f"files were changed: {', '.join(map(repr, changed))}")


def _watch(watching: bool) -> None:
    if watching and not _state["installed"]:
        sys.addaudithook(_hear)
        _state["installed"] = True
    _state["watching"] = watching


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    """A hook stays as long as the process: while nobody watches it does nothing."""
    if not _state["watching"]:
        return
    if event in ACTS:
        _acts.append(event)
    elif event == "open" and len(arguments) > 2 and isinstance(arguments[2], int) and arguments[2] & WRITES:
        path = arguments[0]
        if isinstance(path, (str, bytes)) and not str(path).startswith(DEVICES):
            _acts.append(f"open {path!r} to write")


def _listing(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """What tells a file from any other, and from itself before: its mode, inode, size and times."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (
            *(status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns),
        )
    return found
