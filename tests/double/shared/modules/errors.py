"""Errors that the host reports and survives."""

from __future__ import annotations

displayed: list[tuple[Exception, str]] = []


def display(e: Exception, task: str, *, full_traceback: bool = False) -> None:
    displayed.append((e, task))


def report(message: str, *, exc_info: bool = False) -> None:
    displayed.append((RuntimeError(message), "report"))
