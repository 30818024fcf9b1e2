"""SHA-256 in a thread beside the one that reads, which takes about as long."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

AT_ONCE = 4 * 2**20
"""Bytes that are worth handing over. They are held, and once more as many while the former are hashed."""


class Hashing:
    """One digest. Memory that is fed must keep its content until `digest`, or the end of the context."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._waiting: list[memoryview] = []
        self._size = 0
        self._thread: ThreadPoolExecutor | None = None
        self._busy: Future[None] | None = None

    def feed(self, content: memoryview) -> None:
        """The next bytes."""
        self._waiting.append(content)
        self._size += len(content)
        if self._size >= AT_ONCE:
            self._hand_over()

    def digest(self) -> str:
        """Of everything that was fed, in hexadecimal digits."""
        self._wait()
        self._update(self._waiting)
        self._waiting, self._size = [], 0
        return self._hash.hexdigest()

    def __enter__(self) -> Hashing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def _hand_over(self) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "Precision LoRA: SHA-256")
        self._wait()
        self._busy = self._thread.submit(self._update, self._waiting)
        self._waiting, self._size = [], 0

    def _wait(self) -> None:
        if self._busy is not None:
            self._busy.result()
            self._busy = None

    def _update(self, contents: list[memoryview]) -> None:
        for content in contents:
            self._hash.update(content)
