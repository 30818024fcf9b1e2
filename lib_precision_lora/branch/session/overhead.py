"""What branches cost in a step: their time within one forward of the model, beside that of the whole forward.

    branches = Σ (moment after a branch − moment before it)      whole = moment after the forward − before it

On the CPU a moment is read off a clock. On a CUDA card it is an event in the queue of the work, which is read
when somebody asks, after the work: nothing waits while the model samples. Other devices are not measured.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

P = ParamSpec("P")
R = TypeVar("R")

MEASURED_FORWARDS = 2
"""After a reset. The first one warms up, and may place factors; the last of them is what counts."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """One forward of the model, in seconds. branches: with the wait for streamed factors."""

    whole: float
    branches: float


class Clock(Protocol):
    def now(self) -> Any: ...

    def seconds(self, before: Any, after: Any) -> float: ...


class ProcessorClock:
    """For work that is done when a call returns."""

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, before: float, after: float) -> float:
        return after - before


class CardClock:
    """For work that a card does later: a moment lies between what was asked of it before and after."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, before: torch.cuda.Event, after: torch.cuda.Event) -> float:
        after.synchronize()
        milliseconds: float = before.elapsed_time(after)
        return milliseconds / 1000


def clock_of(device: torch.device) -> Clock | None:
    """None where there is none, and while a card records a graph."""
    if device.type == "cpu":
        return ProcessorClock()
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return CardClock(device)
    return None


class Forward:
    """A forward that is being measured."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._inside = False
        self._branches: list[tuple[Any, Any]] = []
        self._begun = self._ended = clock.now()

    def timed(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The call's result; its time counts, unless it is part of a call that counts."""
        if self._inside:
            return call(*args, **kwargs)
        self._inside = True
        before = self._clock.now()
        try:
            return call(*args, **kwargs)
        finally:
            self._branches.append((before, self._clock.now()))
            self._inside = False

    def end(self) -> None:
        self._ended = self._clock.now()

    def read(self) -> StepTime | None:
        """None where no branch has run in it."""
        if not self._branches:
            return None
        seconds = self._clock.seconds
        whole = seconds(self._begun, self._ended)
        return StepTime(whole, sum(seconds(before, after) for before, after in self._branches))


class OverheadMeter:
    """Measures the first forwards of one module after each `reset`, and keeps the last of them.

    forward: the one that is being measured, None at all other times. A forward that fails is no measurement;
    of forwards within each other the innermost is one. What is compiled has its branches fused into it, and
    is not measured. The module is not kept alive.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._module: weakref.ref[nn.Module] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was measured, and measure anew."""
        self.forward: Forward | None = None
        self._last: Forward | None = None
        self._left = MEASURED_FORWARDS

    def read(self) -> StepTime | None:
        """The last forward that was measured since `reset`; on a card this waits for its end."""
        last = self._last
        return None if last is None else last.read()

    def watch(self, module: nn.Module | None) -> None:
        """Measure this module's forwards from now on, and no other's; None: nobody's."""
        watched = None if self._module is None else self._module()
        if self._handles and watched is module:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forward, self._module = None, None
        if module is not None:
            self._module = weakref.ref(module)
            self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._end, always_call=True))

    def timed(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of a branch's call, which is timed while a forward is being measured."""
        # the first question is decided while a graph is made: the graph then does not depend on the second
        if torch.compiler.is_compiling() or self.forward is None:
            return call(*args, **kwargs)
        return self.forward.timed(call, *args, **kwargs)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self.forward = None  # one that was interrupted, or that stands around this one
        if not self._left or _compiled(module):
            return
        device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        clock = None if device is None else clock_of(device)
        self.forward = None if clock is None else Forward(clock)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        forward, self.forward = self.forward, None
        if forward is None or output is None:  # after an exception there is no output
            return
        forward.end()
        self._last = forward
        self._left -= 1


def _compiled(module: nn.Module) -> bool:
    """Whether it, or a part of it, was given to `torch.compile`."""
    return any(
        each._compiled_call_impl is not None or "_orig_mod" in each._modules for each in module.modules()
    )
