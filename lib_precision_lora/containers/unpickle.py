"""The instructions of a pickle, as torch writes them, read as data.

One table from instruction to what it does with the stack. Nothing that a pickle names is looked up or called
(`pickle_values` says what is made instead), no instruction takes more memory than its bytes are worth, and
what torch does not write is refused.

Source: `pickletools` of Python's library, protocols 2 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from lib_precision_lora.containers.bounds import LARGEST_PICKLE, LONGEST_KEY, MOST_STEPS
from lib_precision_lora.containers.content import PickleError
from lib_precision_lora.containers.pickle_values import (
    BESIDE,
    CALLS,
    MOST_ARGUMENTS,
    Name,
    named,
    storage_of,
)

DAMAGED = "its pickle is truncated or damaged; download or copy it again"


class Unpickler:
    """Reads one value after another from the same bytes."""

    def __init__(self, content: bytes) -> None:
        if len(content) > LARGEST_PICKLE:
            raise PickleError(
                f"its pickle has {len(content)} bytes, above the limit of {LARGEST_PICKLE}: it holds more "
                "than weights; use it as safetensors"
            )
        self._content = content
        self.position = 0
        self._steps = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def value(self) -> Any:
        """The next value. Raises `PickleError`."""
        self._stack, self._below, self._memo = [], [], {}
        try:
            while True:
                code = self._bytes(1)
                if code == b".":
                    return self._stack.pop()
                if code not in _INSTRUCTIONS:
                    raise PickleError(
                        f"its pickle has the instruction {code!r}, which no weights need; use it as "
                        "safetensors"
                    )
                self._steps += 1
                if self._steps > MOST_STEPS:
                    raise PickleError(
                        f"its pickle has more than {MOST_STEPS} instructions: it holds more than weights; "
                        "use it as safetensors"
                    )
                _INSTRUCTIONS[code](self)
        except (IndexError, KeyError, AttributeError, struct.error, UnicodeError) as error:
            raise PickleError(DAMAGED) from error

    def _bytes(self, count: int) -> bytes:
        stop = self.position + count
        if stop > len(self._content):
            raise PickleError(DAMAGED)
        found = self._content[self.position : stop]
        self.position = stop
        return found

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        stop = self._content.find(b"\n", self.position)
        if stop < 0:
            raise PickleError(DAMAGED)
        text = self._content[self.position : stop]
        self.position = stop + 1
        return text.decode("utf-8")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        values = self._stack
        self._stack = self._below.pop()
        return values

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _skip_frame(self) -> None:
        self._bytes(8)

    def _skip_protocol(self) -> None:
        self._bytes(1)

    def _number_of_bytes(self) -> None:
        self._push(int.from_bytes(self._bytes(self._number("<B")), "little", signed=True))

    def _text(self, layout: str) -> None:
        self._push(self._bytes(self._number(layout)).decode("utf-8", "surrogatepass"))

    def _old_text(self, layout: str) -> None:
        self._push(self._bytes(self._number(layout)).decode("latin-1"))

    def _raw(self, layout: str) -> None:
        self._bytes(self._number(layout))
        self._push(BESIDE)

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise PickleError(DAMAGED)
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._push(values)

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)

    def _set(self, values: list[Any]) -> None:
        """Into a dictionary, what has a text for its key: others name no weight."""
        target = self._stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise PickleError(DAMAGED)
        for key, value in zip(values[::2], values[1::2], strict=True):
            if isinstance(key, str):
                if len(key) > LONGEST_KEY:
                    raise PickleError(f"it has a name of {len(key)} characters, {key[:40]!r}…; it is no LoRA")
                target[key] = value

    def _global(self) -> None:
        module = self._line()
        self._push(named(module, self._line()))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError(DAMAGED)
        self._push(named(module, name))

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if (
            not isinstance(function, Name)
            or not isinstance(arguments, tuple)
            or len(arguments) > MOST_ARGUMENTS
        ):
            raise PickleError(DAMAGED)
        if function.path not in CALLS:
            raise PickleError(f"its pickle calls {function.path}, which is no way to make a tensor")
        self._push(CALLS[function.path](*arguments))

    def _build(self) -> None:
        """The state of an object: of those that are made here, none has any."""
        self._stack.pop()

    def _keep(self, index: int) -> None:
        self._memo[index] = self._stack[-1]


_INSTRUCTIONS: Mapping[bytes, Callable[[Unpickler], object]] = {
    b"\x80": Unpickler._skip_protocol,
    b"\x95": Unpickler._skip_frame,
    b"(": Unpickler._mark,
    b"0": lambda self: self._stack.pop(),
    b"N": lambda self: self._push(None),
    b"\x88": lambda self: self._push(True),
    b"\x89": lambda self: self._push(False),
    b"J": lambda self: self._push(self._number("<i")),
    b"K": lambda self: self._push(self._number("<B")),
    b"M": lambda self: self._push(self._number("<H")),
    b"\x8a": Unpickler._number_of_bytes,
    b"G": lambda self: self._push(self._number(">d")),
    b"X": lambda self: self._text("<I"),
    b"\x8c": lambda self: self._text("<B"),
    b"U": lambda self: self._old_text("<B"),
    b"T": lambda self: self._old_text("<I"),
    b"C": lambda self: self._raw("<B"),
    b"B": lambda self: self._raw("<I"),
    b")": lambda self: self._push(()),
    b"t": lambda self: self._push(tuple(self._since_mark())),
    b"\x85": lambda self: self._tuple(1),
    b"\x86": lambda self: self._tuple(2),
    b"\x87": lambda self: self._tuple(3),
    b"]": lambda self: self._push([]),
    b"a": lambda self: self._append([self._stack.pop()]),
    b"e": lambda self: self._append(self._since_mark()),
    b"\x8f": lambda self: self._push(BESIDE),
    b"\x90": Unpickler._since_mark,
    b"}": lambda self: self._push({}),
    b"s": lambda self: self._set([self._stack.pop(-2), self._stack.pop()]),
    b"u": lambda self: self._set(self._since_mark()),
    b"q": lambda self: self._keep(self._number("<B")),
    b"r": lambda self: self._keep(self._number("<I")),
    b"\x94": lambda self: self._keep(len(self._memo)),
    b"h": lambda self: self._push(self._memo[self._number("<B")]),
    b"j": lambda self: self._push(self._memo[self._number("<I")]),
    b"c": Unpickler._global,
    b"\x93": Unpickler._stack_global,
    b"Q": lambda self: self._push(storage_of(self._stack.pop())),
    b"R": Unpickler._call,
    b"b": Unpickler._build,
}
"""Instruction → what it does with the stack."""
