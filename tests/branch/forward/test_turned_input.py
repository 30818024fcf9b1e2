"""A layer whose base is turned for all rows by one R runs once, on the turned input, and keeps law 2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import read_adapters
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.forward import turned_input
from lib_precision_lora.branch.forward.linear import LinearBranch
from lib_precision_lora.branch.forward.turned_input import InputTurns
from tests.branch.hosts import Holder, hooks_of
from tests.families import BASE_STD, INPUT_ROTATIONS, family
from tests.oracles import Step, allowed_error, merge, rounding_error

OUT, IN = 192, 256
ALONE = ("oft-peft", "oft-peft-shared", "ia3-in")
"""Nothing is added to what these make of the base."""

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


class Linear(nn.Linear):
    """Named as hosts name theirs. passes: how often it has multiplied."""

    passes = 0

    def forward(self, input: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(input)


class Conv(nn.Conv2d):
    passes = 0

    def forward(self, input: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(input)


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> Linear:
    torch.manual_seed(1)
    return settled(Linear(IN, OUT, bias=bias), dtype)


def conv(dtype: torch.dtype = torch.float32) -> Conv:
    torch.manual_seed(1)
    return settled(Conv(32, 96, 3, padding=1, padding_mode="circular"), dtype)


def settled(layer: Any, dtype: torch.dtype) -> Any:
    """In a model, `held`, which it keeps alive."""
    layer.requires_grad_(False).weight.normal_(0.0, BASE_STD)
    layer.__dict__["held"] = Holder(layer.to(dtype))
    return layer


def tokens(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    return torch.randn(*(shape or (64,)), IN, generator=torch.manual_seed(2)).to(dtype)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 32, 10, 12, generator=torch.manual_seed(2)).to(dtype)


def stack(layer: nn.Module, *named: tuple[str, float]) -> tuple[list[Any], Tensor]:
    """Files for the session, and the merged weight in float64."""
    made = [(family(name, tuple(layer.weight.shape)), strength) for name, strength in named]
    files = [("file", {"layer.weight": one.adapter}, strength) for one, strength in made]
    return files, merge(layer.weight, [Step(one.change, strength) for one, strength in made])[0]


def exact(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """The layer's output in float64, with another weight."""
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x.double(), weight.double(), bias)
    return layer._conv_forward(x.double(), weight.double(), bias)


def as_host(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """The layer's output in its own type, with another weight."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, layer.bias)
    return layer._conv_forward(x, weight, layer.bias)


def assert_law_2(layer: Any, x: Tensor, passes: int, *named: tuple[str, float]) -> None:
    """In fp32, whose sums err more than one rounding, beside the host's own sums of the merged weight."""
    files, weight = stack(layer, *named)
    before, host = x.clone(), layer(x)
    merged = weight.to(x.dtype) if x.dtype == torch.float32 else layer.weight
    sums, exact_sums = as_host(layer, merged, x), exact(layer, merged, x)
    with torch.no_grad(), PatchSession(layer.held) as session:
        session.apply(files)
        for given in (lambda: layer(x), lambda: layer(input=x)):
            layer.passes = 0
            y = given()
            assert layer.passes == passes
            expected = exact(layer, weight, x)
            error = float((y.double() - expected).norm())
            assert error <= allowed_error(expected, exact_sums, sums)
            assert y.shape == host.shape
            assert session._attached["layer"].piece.given is None
    assert torch.equal(x, before)
    assert torch.equal(layer(x), host)
    assert hooks_of(layer.held) == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strength", [0.2, 1.0, -1.0])
@pytest.mark.parametrize("name", ALONE)
def test_one_pass_keeps_law_2(name: str, strength: float, bias: bool) -> None:
    assert_law_2(linear(bias=bias), tokens(), 1, (name, strength))


def test_one_pass_of_a_convolution_that_scales_its_channels() -> None:
    x = images()
    for given in (x, x[0], x.to(memory_format=torch.channels_last), x.permute(0, 1, 3, 2)):
        assert_law_2(conv(), given, 1, ("ia3-in", 0.7))


@pytest.mark.parametrize(
    "named",
    [
        (("dora-in", 0.7),),
        (("lokr-dora-in", 0.7),),
        (("lora", 0.8), ("oft-peft", 0.7), ("diff", 0.3)),
        (("oft-peft", 0.7), ("oft-peft-shared", -0.6), ("dora-out", 0.5)),
        (("oft-peft", 0.7), ("oft", 0.4)),
    ],
    ids=str,
)
def test_in_fp32_a_stack_runs_once_as_well(named: tuple[tuple[str, float], ...]) -> None:
    assert_law_2(linear(), tokens(), 1, *named)
    if not any(name in INPUT_ROTATIONS for name, _ in named):
        assert_law_2(conv(), images(), 1, *named)


def test_a_butterfly_errs_less_than_in_a_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, errors = linear(), tokens(), []
    files, weight = stack(layer, ("boft-peft", 1.0))
    for before in (True, False):
        monkeypatch.setattr(LinearBranch, "can_turn", before)
        with torch.no_grad(), PatchSession(layer.held) as session:
            session.apply(files)
            layer.passes = 0
            errors.append(float((layer(x).double() - exact(layer, weight, x)).norm()))
            assert layer.passes == 2 - before
    assert 0.0 < errors[0] < errors[1]


@HALVES
@pytest.mark.parametrize("name", [*ALONE, "dora-in"])
def test_half_precision_takes_a_second_pass(name: str, dtype: torch.dtype) -> None:
    assert_law_2(linear(dtype), tokens(dtype), 2, (name, 0.2))


@HALVES
@pytest.mark.parametrize("change", [1e-3, 1e-2])
def test_because_alike_inputs_would_lose_a_small_change_alike(change: float, dtype: torch.dtype) -> None:
    """Half of the inputs, all about 1, are scaled by 1 + change, and rows nearly sum to 0."""
    layer = linear(dtype, bias=False)
    signs = torch.tensor([1.0, -1.0]).repeat(IN // 2)
    layer.weight.add_(signs)
    values = torch.where(signs > 0, change, 0.0)
    x = (1.0 + 0.005 * tokens()).to(dtype)
    tensors = {"layer.weight": values, "layer.on_input": torch.tensor(1)}
    weight = layer.weight.double() * (1.0 + values.double())
    expected = exact(layer, weight, x)
    rounded = exact(layer, layer.weight, (x.double() * (1.0 + values.double())).to(dtype))
    with torch.no_grad(), PatchSession(layer.held) as session:
        session.apply([("file", {"layer": read_adapters(tensors)["layer"]}, 1.0)])
        error = float((layer(x).double() - expected).norm())
    assert error <= 2.0 * rounding_error(expected, dtype)
    assert float((rounded - expected).norm()) > 10.0 * rounding_error(expected, dtype)


def test_types_may_take_turns_on_one_layer() -> None:
    layer = linear(torch.bfloat16)
    layer.to(torch.float32)
    files, weight = stack(layer, ("dora-in", 0.7))
    with torch.no_grad(), PatchSession(layer.held) as session:
        session.apply(files)
        for dtype, passes in ((torch.float32, 1), (torch.bfloat16, 2), (torch.float32, 1)):
            layer.to(dtype)
            layer.passes, x = 0, tokens(dtype)
            error = (layer(x).double() - exact(layer, weight, x)).norm() / exact(layer, weight, x).norm()
            assert layer.passes == passes
            assert float(error) <= 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 9), (2, 3, 4)])
def test_inputs_of_any_number_of_axes(shape: tuple[int, ...]) -> None:
    layer, x = linear(), torch.randn(*shape, IN, generator=torch.manual_seed(3))
    files, weight = stack(layer, ("oft-peft", 0.7))
    with torch.no_grad(), PatchSession(layer.held) as session:
        session.apply(files)
        torch.testing.assert_close(layer(x).double(), exact(layer, weight, x), rtol=1e-5, atol=1e-5)


def test_inputs_that_are_not_contiguous_and_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turned_input, "CACHED_BYTES", 32 * 1024)
    x = tokens(torch.float32, 3, 5, 7)
    for view in (
        x,
        x.transpose(0, 2),
        x[:, ::2],
        x[:1].expand(4, 5, 7, IN),
        x.flatten(0, 2).T.contiguous().T,
    ):
        assert_law_2(linear(), view, 1, ("oft-peft", 0.7))


def test_streamed_turns_come_once_for_each_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, brought = linear(), tokens(), []
    files, weight = stack(layer, ("oft-peft", 0.7), ("lora", 0.5))
    with torch.no_grad(), PatchSession(layer.held) as session:
        session.apply(files)
        session.place(x.device, x.dtype, resident=frozenset())
        bring = session._stream.bring
        monkeypatch.setattr(session._stream, "bring", lambda *given: (brought.append(1), bring(*given))[1])
        layer.passes = 0
        y = layer(x)
        assert (len(brought), layer.passes) == (1, 1)
        torch.testing.assert_close(y.double(), exact(layer, weight, x), rtol=1e-5, atol=1e-5)


def test_what_fails_before_the_module_is_done_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = linear(), tokens()
    files, weight = stack(layer, ("oft-peft", 0.7))
    with torch.no_grad(), PatchSession(layer.held) as session:
        session.apply(files)
        monkeypatch.setattr(InputTurns, "apply", failing)
        with pytest.raises(MemoryError):
            layer(x)
        session.rescue.listener = told = Told()
        torch.testing.assert_close(layer(x).double(), exact(layer, weight, x), rtol=1e-5, atol=1e-5)
        assert told.errors == []


def test_what_fails_behind_it_is_made_again_from_the_input_as_it_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = linear(), tokens()
    host = layer(x)
    with torch.no_grad(), PatchSession(layer.held) as session:
        session.apply(stack(layer, ("oft-peft", 0.7), ("lora", 0.5))[0])
        session.rescue.listener = told = Told()
        monkeypatch.setattr(LinearBranch, "__call__", failing)
        assert torch.equal(layer(x), host)
        assert torch.equal(layer(input=x), host)
        assert len(told.errors) == 4


def test_a_failed_forward_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = linear(), tokens()
    files, weight = stack(layer, ("oft-peft", 0.7))
    with torch.no_grad(), PatchSession(layer.held) as session:
        session.apply(files)
        with monkeypatch.context() as patch:
            patch.setattr(Linear, "forward", failing)
            with pytest.raises(MemoryError):
                layer(x)
        torch.testing.assert_close(layer(x).double(), exact(layer, weight, x), rtol=1e-5, atol=1e-5)
        session._attached["layer"].piece.release()
        assert session._attached["layer"].piece.given is None


def test_within_autocast_the_type_is_that_of_the_product() -> None:
    layer, x = linear(), tokens()
    files, weight = stack(layer, ("oft-peft", 0.2))
    expected = exact(layer, weight, x)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        PatchSession(layer.held) as session,
    ):
        session.apply(files)
        layer.passes = 0
        y = layer(x)
        assert layer.passes == 2
    assert y.dtype == torch.bfloat16
    assert float((y.double() - expected).norm() / expected.norm()) <= 3 * torch.finfo(torch.bfloat16).eps


def test_a_compiled_layer_gives_the_same() -> None:
    layer, x = linear(), tokens()
    files, weight = stack(layer, ("oft-peft", 0.7), ("lora", 0.5))
    with torch.no_grad(), PatchSession(layer.held) as session:
        session.apply(files)
        expected = layer(x)
        torch.compiler.reset()
        compiled = torch.compile(layer.held, backend="eager")
        assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x), expected)
    torch.testing.assert_close(expected.double(), exact(layer, weight, x), rtol=1e-5, atol=1e-5)


def test_only_layers_that_may_be_turned_have_something_before_them() -> None:
    layer = linear()
    with PatchSession(layer.held) as session:
        for names, hooks in ((("lora",), 0), (("oft-peft",), 1), (("dora-in",), 1), (("oft",), 0)):
            session.apply(stack(layer, *((name, 0.5) for name in names))[0])
            assert len(layer._forward_pre_hooks) == hooks


class Told:
    """A listener that changes nothing."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    def __call__(self, name: str, error: Exception, trial: object) -> None:
        self.errors.append(error)


def failing(*given: object, **named: object) -> Any:
    raise MemoryError("injected")
