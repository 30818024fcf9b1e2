"""Streamed factors: the same bits as resident ones, one layer ahead, in an order that is learned."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import Target
from lib_precision_lora.adapters.terms import Dense, LowRank
from lib_precision_lora.branch import Patch, PatchSession
from lib_precision_lora.branch.forward import streaming
from lib_precision_lora.branch.forward.streaming import FactorStream, copied_to, map_tensors
from lib_precision_lora.branch.forward.weight_branch import WeightBranch
from tests.families import FAMILIES, family

CPU = torch.device("cpu")
SHAPE = (32, 48)


@dataclass(frozen=True)
class Card:
    """Stands for a CUDA device where there is none."""

    index: int = 0
    type: str = "cuda"


@dataclass
class Log:
    """What was asked of the card, in order."""

    calls: list[tuple[str, object]] = field(default_factory=list)

    def names(self, kind: str) -> list[object]:
        return [what for call, what in self.calls if call == kind]


class Layer:
    """A branch with operands in RAM for some cards."""

    def __init__(self, name: str, *cards: Card) -> None:
        self.name, self.cards = name, cards

    def waiting_for(self, device: Card) -> str | None:
        return self.name if device in self.cards else None


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()

    class Stream:
        def __init__(self, device: Card) -> None:
            self.inside = False

        def record_event(self) -> str:
            return f"after {log.calls[-1][1]}"

        def wait_stream(self, other: Current) -> None:
            assert isinstance(other, Current)
            self.follows = other

    class Current:
        def wait_event(self, event: str) -> None:
            log.calls.append(("wait", event))

    @contextlib.contextmanager
    def stream(side: Stream) -> Iterator[None]:
        assert isinstance(side.follows, Current), "memory that is written must have been read"
        side.inside = True
        yield
        side.inside = False

    def copied(operands: str, device: Card, non_blocking: bool = False) -> str:
        assert non_blocking
        log.calls.append(("copy", operands))
        return f"{operands} on {device.index}"

    monkeypatch.setattr(streaming.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(streaming.torch.cuda, "stream", stream)
    monkeypatch.setattr(streaming.torch.cuda, "current_stream", lambda device: Current())
    monkeypatch.setattr(streaming, "copied_to", copied)
    return log


def run(stream: FactorStream, card: Card, *layers: Layer) -> list[str]:
    return [stream.bring(layer, layer.name, card) for layer in layers]


def test_the_next_layer_is_under_way_while_one_computes(log: Log) -> None:
    card, stream = Card(), FactorStream()
    layers = [Layer(name, card) for name in "abc"]
    assert run(stream, card, *layers) == ["a on 0", "b on 0", "c on 0"]
    assert log.names("copy") == ["a", "b", "c"]
    log.calls.clear()
    assert run(stream, card, *layers) == ["a on 0", "b on 0", "c on 0"]
    assert log.calls == [
        ("copy", "a"),
        ("wait", "after a"),
        ("copy", "b"),
        ("wait", "after b"),
        ("copy", "c"),
        ("wait", "after c"),
    ]


def test_what_was_sent_ahead_and_has_changed_since_is_not_used(log: Log) -> None:
    """A change of strength between two forwards."""
    card, stream = Card(), FactorStream()
    a, b = Layer("a", card), Layer("b", card)
    run(stream, card, a, b)
    stream.bring(a, "a", card)
    assert stream.bring(b, "b at another strength", card) == "b at another strength on 0"


def test_at_most_two_layers_are_held(log: Log) -> None:
    card, stream = Card(), FactorStream()
    layers = [Layer(name, card) for name in "abcd"]
    for _ in range(2):
        for layer in layers:
            stream.bring(layer, layer.name, card)
            held = len(stream._used) + (stream._ahead is not None)
            assert held <= 2
    stream.forget()
    assert stream._used == []


def test_another_order_than_the_learned_one_costs_a_copy_and_nothing_else(log: Log) -> None:
    card, stream = Card(), FactorStream()
    a, b, c = (Layer(name, card) for name in "abc")
    run(stream, card, a, b, c)
    log.calls.clear()
    assert run(stream, card, a, c, b) == ["a on 0", "c on 0", "b on 0"]
    assert log.names("copy") == ["a", "b", "c", "b", "c"]


def test_a_layer_that_waits_for_another_card_is_not_sent_ahead(log: Log) -> None:
    first, second, stream = Card(0), Card(1), FactorStream()
    a, b = Layer("a", first), Layer("b", second)
    stream.bring(a, "a", first)
    stream.bring(b, "b", second)
    log.calls.clear()
    assert stream.bring(a, "a", first) == "a on 0"
    assert stream.bring(b, "b", second) == "b on 1"
    assert log.names("copy") == ["a", "b"]


def test_what_was_sent_to_one_card_is_not_taken_for_another(log: Log) -> None:
    first, second, stream = Card(0), Card(1), FactorStream()
    a, b = Layer("a", first), Layer("b", first, second)
    run(stream, first, a, b)
    stream.bring(a, "a", first)
    assert stream.bring(b, "b", second) == "b on 1"


def test_after_forgetting_the_order_is_learned_anew(log: Log) -> None:
    card, stream = Card(), FactorStream()
    a, b = Layer("a", card), Layer("b", card)
    run(stream, card, a, b)
    stream.forget()
    log.calls.clear()
    assert run(stream, card, b, a) == ["b on 0", "a on 0"]
    run(stream, card, b)
    assert log.names("copy") == ["b", "a", "b", "a"]


def test_a_branch_that_is_gone_is_neither_kept_alive_nor_sent(log: Log) -> None:
    card, stream = Card(), FactorStream()
    a, b = Layer("a", card), Layer("b", card)
    run(stream, card, a, b)
    gone = weakref.ref(b)
    del b
    gc.collect()
    assert gone() is None
    log.calls.clear()
    assert run(stream, card, a) == ["a on 0"]
    assert log.names("copy") == ["a"]


def model_with(*names: str, strength: float = 0.7) -> tuple[nn.Sequential, list[Patch]]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(SHAPE[1], SHAPE[0]) for _ in names]
    model = nn.Sequential(*layers).requires_grad_(False)
    patches = [
        Patch("file", Target(f"{number}.weight"), family(name, SHAPE, number).adapter, strength)
        for number, name in enumerate(names)
    ]
    return model, patches


def outputs(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [layer(x).clone() for layer in model]


X = torch.linspace(-1.0, 1.0, 5 * SHAPE[1]).view(5, SHAPE[1])


@pytest.mark.parametrize("compute", ["fp16", "fp32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_streamed_layer_has_the_bits_of_a_resident_one(name: str, compute: str) -> None:
    model, patches = model_with(name, "lora")
    session = PatchSession(model)
    bare = outputs(model, X)
    session.apply_patches(patches, compute)
    session.place(CPU, X.dtype)
    resident = outputs(model, X)
    session.place(CPU, X.dtype, resident=frozenset())
    assert session.streamed == ("0", "1")
    assert session.placed_bytes == 0
    for _ in ("the order is learned", "the order is known"):
        assert all(map(torch.equal, outputs(model, X), resident))
    assert not any(map(torch.equal, bare, resident))


def test_some_layers_stream_and_the_others_stay() -> None:
    model, patches = model_with("lora", "loha", "oft")
    session = PatchSession(model)
    session.apply_patches(patches)
    session.place(CPU, X.dtype)
    expected, whole = outputs(model, X), session.placed_bytes
    session.place(CPU, X.dtype, resident={"1"})
    assert session.streamed == ("0", "2")
    assert 0 < session.placed_bytes < whole
    assert all(map(torch.equal, outputs(model, X), expected))


def test_a_forward_after_release_finds_its_factors_again() -> None:
    model, patches = model_with("lora", "dora-out")
    session = PatchSession(model)
    session.apply_patches(patches)
    session.place(CPU, X.dtype, resident=frozenset())
    expected = outputs(model, X)
    session.release()
    assert session.streamed == ("0", "1")
    assert all(map(torch.equal, outputs(model, X), expected))


@pytest.mark.parametrize("name", ["lora", "loha-streamed", "oft", "dora-out"])
def test_a_change_of_strength_reaches_streamed_layers(name: str) -> None:
    model, patches = model_with(name, name)
    session = PatchSession(model)
    session.apply_patches(patches)
    session.place(CPU, X.dtype, resident=frozenset())
    outputs(model, X)
    _, changed = (
        model,
        [Patch(patch.source, patch.target, patch.adapter, 0.3, patch.base_factor) for patch in patches],
    )
    session.apply_patches(changed)
    assert session.streamed == ("0", "1")
    streamed = outputs(model, X)
    session.clear()
    session.apply_patches(changed)
    session.place(CPU, X.dtype)
    assert all(map(torch.equal, outputs(model, X), streamed))


def test_copies_are_made_once_each_and_dense_remainders_stay_where_they_are() -> None:
    shared, value = torch.ones(2, 3), torch.ones(4, 3)
    dense = Dense(value)
    term = LowRank(torch.ones(4, 2), shared)
    first, second, here = copied_to((term, term, dense), CPU)
    assert first.down is second.down is not shared
    assert first.down.data_ptr() != shared.data_ptr()
    assert torch.equal(first.down, shared)
    assert here is dense
    found: list[Tensor] = []
    map_tensors((term, dense, None, 3), lambda tensor: found.append(tensor) or tensor)
    assert [id(tensor) for tensor in found] == [id(term.up), id(shared)]


def test_operands_for_the_cpu_are_not_sent_to_another_device() -> None:
    model, patches = model_with("lora")
    session = PatchSession(model)
    session.apply_patches(patches)
    session.place(CPU, X.dtype, resident=frozenset())
    branch = next(iter(session._attached.values())).piece
    assert isinstance(branch, WeightBranch)
    assert branch.waiting_for(CPU) is not None
    assert branch.waiting_for(torch.device("meta")) is None
    branch.reside(None)
    assert branch.waiting_for(CPU) is None
