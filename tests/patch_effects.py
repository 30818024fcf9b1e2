"""What a patch does to a model's output, beside what a merge of it into the weight does.

The measure is the error of the patch's effect on the model's output,
`‖(y_ours − y₀) − (y_merged − y₀)‖ / ‖y_merged − y₀‖`, where y_merged is the output of a copy of the model in
which that parameter alone was merged in float64 and rounded to fp32 once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import Adapter, Target
from lib_precision_lora.adapters.diff import make_diff
from lib_precision_lora.adapters.lora import make_lora
from lib_precision_lora.branch import Patch, PatchError, PatchSession
from lib_precision_lora.host.loras.matching import key_map_of
from tests.tiny import Tiny
from tests.traces import attributes_of, bytes_of, hooks_of, kept_objects, parameters_of

RANK, SIZE = 3, 3.0
SMALLEST_EFFECT = 1e-4
"""Of the output; what is below it counts as none."""


@dataclass(frozen=True, slots=True, eq=False)
class Effects:
    """Of patches on each target of a model, one at a time. errors: of their effects; left: parameters that
    take no branch; never_read: of which the output does not depend; cancels: whose effect is noise; both of
    whole parameters."""

    errors: dict[Target, float] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    never_read: set[str] = field(default_factory=set)
    cancels: set[str] = field(default_factory=set)


def effects_of_every_parameter(tiny: Tiny) -> Effects:
    """Each target of the model patched and unpatched; the model must be as before afterwards."""
    parameters = parameters_of(tiny.model)
    before = bytes_of(tiny.model), attributes_of(tiny.model)
    merged_model = copy.deepcopy(tiny.model)
    base = output(tiny, tiny.model)
    found = Effects()
    for target in targets(tiny):
        adapter = random_adapter(rows_of(parameters[target.parameter], target))
        with merged(merged_model, target, adapter):
            expected = output(tiny, merged_model) - base
        try:
            with PatchSession(tiny.model) as session:
                session.apply_patches([Patch("test", target, adapter, 1.0)])
                actual = output(tiny, tiny.model) - base
        except PatchError:
            found.left.add(target.parameter)
            continue
        if target.rows is None and expected.norm() < SMALLEST_EFFECT * base.norm():
            (found.cancels if expected.any() else found.never_read).add(target.parameter)
        found.errors[target] = error_of_effect(actual, expected, base)
    assert torch.equal(output(tiny, tiny.model), base)
    assert kept_objects(tiny.model, parameters) == set(parameters)
    assert (bytes_of(tiny.model), attributes_of(tiny.model)) == before
    assert hooks_of(tiny.model) == 0
    return found


def error_of_every_layer_at_once(tiny: Tiny, size: float) -> float:
    """A patch of `size` times the weight on every parameter that has rows and columns, all in one session."""
    parameters = parameters_of(tiny.model)
    adapters = {
        Target(name): random_adapter(weight, size) for name, weight in parameters.items() if weight.ndim > 1
    }
    merged_model = copy.deepcopy(tiny.model)
    base = output(tiny, tiny.model)
    with ExitStack() as merges:
        for target, adapter in adapters.items():
            merges.enter_context(merged(merged_model, target, adapter))
        expected = output(tiny, merged_model) - base
    with PatchSession(tiny.model) as session:
        session.apply_patches([Patch("test", target, adapter, 1.0) for target, adapter in adapters.items()])
        actual = output(tiny, tiny.model) - base
    assert torch.equal(output(tiny, tiny.model), base)
    assert expected.norm() > 0.1 * base.norm()
    return error_of_effect(actual, expected, base)


def error_of_effect(actual: Tensor, expected: Tensor, base: Tensor) -> float:
    """Of the expected effect; of the output where that is noise, and all or nothing where there is none."""
    if not expected.any():
        return math.inf if actual.any() else 0.0
    noise = expected.norm() < SMALLEST_EFFECT * base.norm()
    return float((actual - expected).norm() / (base if noise else expected).norm())


def targets(tiny: Tiny) -> list[Target]:
    """Every place that a key of a file can mean, and every parameter whole, without repetition."""
    parameters = dict(tiny.model.named_parameters())
    mapped = [Target.parse(value) for value in key_map_of(tiny.model, tiny.key_map).names.values()]
    whole = [Target(name) for name in parameters]
    return [target for target in dict.fromkeys([*mapped, *whole]) if target.parameter in parameters]


def rows_of(weight: Tensor, target: Target) -> Tensor:
    return weight if target.rows is None else weight.narrow(0, *target.rows)


def random_adapter(weight: Tensor, size: float = SIZE) -> Adapter:
    """A LoRA of `size` times the weight for matrices, convolutions and embeddings; a difference of that
    spread for vectors, of which the next norm may take most away."""
    generator = torch.Generator().manual_seed(weight.numel())
    if weight.ndim < 2:
        return make_diff("test", size * torch.randn(weight.shape, generator=generator))
    up = torch.randn(weight.shape[0], RANK, generator=generator)
    down = torch.randn(RANK, *weight.shape[1:], generator=generator)
    return make_lora("test", up, down * (size * weight.std() / math.sqrt(RANK)))


def dense_delta(adapter: Adapter, shape: torch.Size) -> Tensor:
    """What the adapter adds, in float64, from its tensors alone."""
    if adapter.kind == "diff":
        return adapter.tensors()[0].double()
    up, down = adapter.tensors()
    return (up.double() @ down.double()).reshape(shape)


@contextmanager
def merged(model: nn.Module, target: Target, adapter: Adapter) -> Iterator[None]:
    """The adapter inside the weight, as the host's merge puts it, but in float64."""
    parameter = model.get_parameter(target.parameter)
    kept = parameter.data
    weight = kept.double()
    rows = rows_of(weight, target)
    delta = dense_delta(adapter, rows.shape)
    rows += delta if target.row_function is None else target.row_function(delta)
    parameter.data = weight.float()
    yield
    parameter.data = kept


def output(tiny: Tiny, model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return tiny.run(model).double()


def report(errors: Mapping[Target, float], largest: float) -> str:
    """One line for each that is off by more, the worst first; empty where none is."""
    wrong = {target: error for target, error in errors.items() if not error <= largest}
    return "\n".join(
        f"{error:.3g}  {target}" for target, error in sorted(wrong.items(), key=lambda pair: -pair[1])
    )
