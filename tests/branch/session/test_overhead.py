"""Law 7: the time that branches take in a step is that of their calls, on a clock that layers and branches of
these tests move by known amounts; and whoever measures leaves no trace."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import Target
from lib_precision_lora.branch import Patch, PatchSession
from lib_precision_lora.branch.forward.linear import LinearBranch
from lib_precision_lora.branch.forward.turned_input import InputTurns
from lib_precision_lora.branch.forward.wide_input import WideInput
from lib_precision_lora.branch.session import overhead
from lib_precision_lora.branch.session.overhead import OverheadMeter, StepTime, clock_of
from tests.branch.hosts import hooks_of
from tests.branch.recipes import recipe
from tests.families import family

WIDTH, LAYERS = 8, 3
BETWEEN, LAYER, BRANCH, VIEW = 0.5, 2.0, 0.25, 4.0
"""Seconds, each a sum of powers of two: their sums are exact."""

X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)


class Time:
    """The time of a test; branch: what one branch takes."""

    def __init__(self) -> None:
        self.now, self.branch = 64.0, BRANCH


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    time, call = Time(), LinearBranch.__call__

    def slow(branch: LinearBranch, module: Any, x: Tensor, y: Tensor) -> Tensor:
        time.now += time.branch
        return call(branch, module, x, y)

    monkeypatch.setattr(overhead, "time", SimpleNamespace(perf_counter=lambda: time.now))
    monkeypatch.setattr(LinearBranch, "__call__", slow)
    return time


class Body(nn.Module):
    """inside: done in the middle of a forward."""

    def __init__(self, clock: Time | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.clock = clock
        self.inside: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        self._takes(BETWEEN)
        for index, layer in enumerate(self.layers):
            self._takes(LAYER)
            x = layer(x)
            if index == 0:
                self.inside()
        return x

    def _takes(self, seconds: float) -> None:
        if self.clock is not None:
            self.clock.now += seconds


class Model(nn.Module):
    """A host's model: only its body's forwards are steps."""

    def __init__(self, clock: Time | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = Body(clock)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


NAMES = tuple(f"body.layers.{index}" for index in range(LAYERS))
ALL = [("file", {name: recipe("lora-rank-1", (WIDTH, WIDTH)).adapter for name in NAMES}, 1.0)]


def attached(model: Model, **options: Any) -> PatchSession:
    session = PatchSession(model, timed="body")
    session.apply(ALL, **options)
    return session


def test_a_step_is_one_forward_and_its_overhead_the_sum_of_its_branches(clock: Time) -> None:
    model = Model(clock)
    session = attached(model)
    assert session.overhead.read() is None
    model(X)
    assert session.overhead.read() == StepTime(BETWEEN + LAYERS * (LAYER + BRANCH), LAYERS * BRANCH)


def test_the_second_forward_after_a_reset_counts_or_the_only_one(clock: Time) -> None:
    model = Model(clock)
    session = attached(model)
    for _ in range(2):
        read = []
        for clock.branch in (8.0, 4.0, 2.0, 1.0):
            model(X)
            step = session.overhead.read()
            assert step is not None
            read.append(step.branches)
        assert read == [LAYERS * 8.0, LAYERS * 4.0, LAYERS * 4.0, LAYERS * 4.0]
        session.overhead.reset()
        assert session.overhead.read() is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_failed_is_no_measurement(clock: Time, error: type[BaseException]) -> None:
    model = Model(clock)
    session = attached(model)

    def fail() -> None:
        raise error

    model.body.inside = fail
    for _ in range(3):
        with pytest.raises(error):
            model(X)
        assert session.overhead.read() is None
    model.body.inside = lambda: None
    clock.now += 1000
    model(X)
    assert session.overhead.read() == StepTime(BETWEEN + LAYERS * (LAYER + BRANCH), LAYERS * BRANCH)


def test_a_failure_ends_the_measuring(clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(clock)
    session = attached(model)

    def fail(*_: Any) -> None:
        assert session.overhead.forward is not None
        raise RuntimeError("no")

    monkeypatch.setattr(LinearBranch, "__call__", fail)
    with pytest.raises(RuntimeError, match="no"):
        model(X)
    assert session.overhead.forward is None
    assert session.overhead.read() is None


def test_of_forwards_within_each_other_the_innermost_is_one_step(clock: Time) -> None:
    model = Model(clock)
    session = attached(model)

    def again() -> None:
        model.body.inside = lambda: None
        clock.branch = 16.0
        model(X)
        clock.branch = BRANCH

    model.body.inside = again
    model(X)
    assert session.overhead.read() == StepTime(BETWEEN + LAYERS * (LAYER + 16.0), LAYERS * 16.0)
    assert session.overhead.forward is None


def test_a_branch_within_a_branch_counts_once(clock: Time) -> None:
    meter, module = OverheadMeter(), nn.Module()

    def branch(depth: int) -> int:
        clock.now += 1.0
        return meter.timed(branch, depth - 1) + 1 if depth else 0

    def forward(x: Tensor) -> Tensor:
        clock.now += 2.0
        assert [meter.timed(branch, depth) for depth in (2, 0)] == [2, 0]
        return x

    module.forward = forward
    meter.watch(module)
    module(X)
    assert meter.read() == StepTime(2.0 + 3.0 + 1.0, 3.0 + 1.0)


def test_what_runs_outside_of_the_timed_forward_does_not_count(clock: Time) -> None:
    model = Model(clock)
    session = attached(model)
    model.body.layers[0](X)
    assert session.overhead.read() is None
    model(X)
    model.body.layers[0](X)
    assert session.overhead.read() == StepTime(BETWEEN + LAYERS * (LAYER + BRANCH), LAYERS * BRANCH)


def test_the_view_of_a_widened_input_counts(clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = WideInput.narrow

    def slow(*given: Any) -> Any:
        clock.now += VIEW
        return narrow(*given)

    monkeypatch.setattr(WideInput, "narrow", slow)
    model = Model(clock)
    session = PatchSession(model, timed="body")
    adapter = recipe("lora-rank-1", (WIDTH, 2 * WIDTH)).adapter
    session.apply_patches([Patch("file", Target(f"{NAMES[0]}.weight"), adapter, 1.0, widens=True)])
    model(X)
    assert session.overhead.read() == StepTime(BETWEEN + LAYERS * LAYER + VIEW + BRANCH, VIEW + BRANCH)


def test_the_turn_of_an_input_counts(clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = InputTurns.apply

    def slow(*given: Any) -> Any:
        clock.now += VIEW
        return apply(*given)

    monkeypatch.setattr(InputTurns, "apply", slow)
    model = Model(clock)
    session = PatchSession(model, timed="body")
    adapter = family("ia3-in", (WIDTH, WIDTH)).adapter
    session.apply([("file", {f"{NAMES[0]}.weight": adapter}, 1.0)])
    model(X)
    assert session.overhead.read() == StepTime(BETWEEN + LAYERS * LAYER + VIEW + BRANCH, VIEW + BRANCH)


def test_nothing_stands_on_the_model_once_nothing_is_attached() -> None:
    model = Model()
    session = attached(model)
    assert len(model.body._forward_hooks) == len(model.body._forward_pre_hooks) == 1
    session.apply(ALL)
    assert len(model.body._forward_hooks) == 1
    session.clear()
    assert hooks_of(model) == 0
    session.apply(ALL)
    session.apply([])
    assert hooks_of(model) == 0
    session.apply(ALL)
    with pytest.raises(KeyError), session:
        raise KeyError
    assert hooks_of(model) == 0


def test_merged_layers_have_no_overhead_and_are_not_measured() -> None:
    model = Model()
    session = attached(model, dense="merge")
    assert session.merged == NAMES
    assert hooks_of(model) == 0
    model(X)
    assert session.overhead.read() is None
    session.apply(ALL, dense="branch")
    model(X)
    assert session.overhead.read() is not None


def test_a_session_without_a_timed_part_measures_nothing() -> None:
    model = Model()
    for timed in (None, "head"):
        with PatchSession(model, timed) as session:
            session.apply(ALL)
            model(X)
            assert session.overhead.read() is None


def test_a_body_that_is_exchanged_is_measured_from_the_next_change_on() -> None:
    model = Model()
    session, former = attached(model), model.body
    model.body = Model().body
    session.apply(ALL)
    assert hooks_of(former) == 0
    model(X)
    assert session.overhead.read() is not None


def test_a_measured_model_dies_with_its_last_owner() -> None:
    gc.disable()
    try:
        model = Model()
        session = attached(model)
        model(X)
        gone = weakref.ref(model), weakref.ref(model.body), weakref.ref(model.body.layers[0])
        del model
        assert [each() for each in gone] == [None, None, None]
        assert session.overhead.read() is not None
    finally:
        gc.enable()


@pytest.mark.parametrize("part", ["all of it", "a layer", "a function"])
def test_a_compiled_model_makes_the_same_image_in_as_many_graphs_and_is_not_measured(part: str) -> None:
    model, graphs = Model(), []
    with attached(model):
        expected = model(X)
    session = PatchSession(model, timed="body")

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    if part == "all of it":
        model.body = torch.compile(model.body, backend=backend)
    elif part == "a layer":
        model.body.layers[0].compile(backend=backend)
    run = torch.compile(model.body.forward, backend=backend) if part == "a function" else model
    session.apply(ALL)
    run(X)
    compiled = len(graphs)
    assert compiled > 0
    for _ in range(3):
        assert torch.equal(run(X), expected)
    assert len(graphs) == compiled
    assert session.overhead.read() is None


class Event:
    """A card's: its moment is there once somebody has waited for it."""

    log: ClassVar[list[str]] = []
    queue = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.moment: float | None = None

    def record(self, stream: object) -> None:
        assert stream == "the card's stream"
        Event.queue += 250.0
        self._at = Event.queue
        Event.log.append("record")

    def synchronize(self) -> None:
        Event.log.append("wait")
        self.moment = self._at

    def elapsed_time(self, after: Event) -> float:
        assert after.moment is not None
        return after.moment - self._at


def test_on_a_card_nothing_waits_before_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue of this card takes 250 ms between one event and the next."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the card's stream")
    monkeypatch.setattr(overhead, "clock_of", lambda _: overhead.CardClock(torch.device("cuda", 0)))
    monkeypatch.setattr(Event, "log", [])
    monkeypatch.setattr(Event, "queue", 0.0)
    model = Model()
    session = attached(model)
    for _ in range(4):
        model(X)
    assert Event.log == ["record"] * 2 * (2 + 2 * LAYERS)
    assert session.overhead.read() == StepTime((1 + 2 * LAYERS) * 0.25, LAYERS * 0.25)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_a_device_whose_work_has_no_clock_is_not_measured(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clock_of(torch.device(device)) is None
    monkeypatch.setattr(overhead, "clock_of", lambda _: clock_of(torch.device(device)))
    model = Model()
    session = attached(model)
    model(X)
    assert session.overhead.forward is None
    assert session.overhead.read() is None


def test_a_graph_that_a_card_records_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert (clock_of(torch.device("cuda", 0)) is None) is capturing
