"""Every parameter of the host's models, one by one: a patch beside it does what a merge into it would.

The measure is the error of the patch's effect on the model's output,
`‖(y_ours − y₀) − (y_merged − y₀)‖ / ‖y_merged − y₀‖`, where y_merged is the output of a copy of the model in
which that parameter alone was merged in float64 and rounded to fp32 once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import Adapter, Target
from lib_precision_lora.adapters.diff import make_diff
from lib_precision_lora.adapters.lora import make_lora
from lib_precision_lora.branch import Patch, PatchError, PatchSession
from tests.forge.real_forge import Forge
from tests.forge.tiny_models import TINY_MODELS, Tiny
from tests.forge.traces import attributes_of, bytes_of, hooks_of, kept_objects, parameters_of

LARGEST_ERROR = 1e-3
"""Measured: at most 2e-4 for the U-Nets, 1.4e-4 for SD 3 and 3.5, 2e-5 for Flux and Chroma, 2e-6 for the text
encoders: the noise of fp32, relative to what the following norms leave of a patch."""

RANK, SIZE = 3, 3.0
SMALLEST_EFFECT = 1e-4
"""Of the output; what is below it counts as none."""

LAST_CONTEXT_QUERY = "diffusion_model.joint_blocks.1.context_block.attn.ln_q"
NEVER_READ: Mapping[str, set[str]] = {
    "SD 3": {f"{LAST_CONTEXT_QUERY}.weight", f"{LAST_CONTEXT_QUERY}.bias"},
    "SD 3.5": {f"{LAST_CONTEXT_QUERY}.weight"},
    "CLIP": {"clip_l.transformer.text_projection.weight"},
}
"""Parameters of which the host's output does not depend: neither a merge nor a branch changes it. The
last block of SD 3 drops what its context's queries find; CLIP-L's projection is not called."""

CANCELS: Mapping[str, set[str]] = {
    "CLIP": {
        f"{encoder}.transformer.text_model.encoder.layers.{layer}.self_attn.k_proj.bias"
        for encoder in ("clip_l", "clip_g")
        for layer in (0, 1)
    },
}
"""Parameters that are read, but whose change is the same for all keys and vanishes in the softmax."""

LEFT_TO_THE_HOST: Mapping[str, set[str]] = {
    "CLIP": {"clip_l.logit_scale", "clip_g.logit_scale"},
    "T5": {"t5xxl.logit_scale"},
}
"""Parameters that take no branch: a single number has no rows. The host does not read these either."""

NOT_PARAMETERS: Mapping[str, set[str]] = {
    "SD 3": {"diffusion_model.pos_embed"},
    "SD 3.5": {"diffusion_model.pos_embed"},
}
"""Buffers for which the host's key map has a name; its `add_patches` drops patches of them."""


@pytest.fixture(scope="module", params=TINY_MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tiny(forge: Forge, name: str) -> Tiny:
    return TINY_MODELS[name](forge)


def test_every_parameter_takes_a_patch_as_a_merge_would(name: str, tiny: Tiny) -> None:
    parameters = parameters_of(tiny.model)
    before = bytes_of(tiny.model), attributes_of(tiny.model)
    merged_model = copy.deepcopy(tiny.model)
    base = output(tiny, tiny.model)
    found: dict[str, set[str]] = {"left": set(), "never read": set(), "cancels": set()}
    wrong = {}
    for target in targets(tiny):
        adapter = random_adapter(rows_of(parameters[target.parameter], target))
        with merged(merged_model, target, adapter):
            expected = output(tiny, merged_model) - base
        try:
            with PatchSession(tiny.model) as session:
                session.apply_patches([Patch("test", target, adapter, 1.0)])
                actual = output(tiny, tiny.model) - base
        except PatchError:
            found["left"].add(target.parameter)
            continue
        if expected.norm() < SMALLEST_EFFECT * base.norm():
            found["cancels" if expected.any() else "never read"].add(target.parameter)
        error = error_of_effect(actual, expected, base)
        if not error <= LARGEST_ERROR:
            wrong[target] = error
    assert not wrong, report(wrong)
    assert found["left"] == of_model(LEFT_TO_THE_HOST, name)
    assert found["never read"] == of_model(NEVER_READ, name)
    assert found["cancels"] == of_model(CANCELS, name)
    assert torch.equal(output(tiny, tiny.model), base)
    assert kept_objects(tiny.model, parameters) == set(parameters)
    assert (bytes_of(tiny.model), attributes_of(tiny.model)) == before
    assert hooks_of(tiny.model) == 0


def test_every_name_of_the_key_map_that_the_model_has_is_a_parameter(name: str, tiny: Tiny) -> None:
    state, parameters = tiny.model.state_dict(), dict(tiny.model.named_parameters())
    known = {Target.parse(value).parameter for value in tiny.key_map.values()}
    assert known & set(parameters)
    assert (known & set(state)) - set(parameters) == of_model(NOT_PARAMETERS, name)


def error_of_effect(actual: Tensor, expected: Tensor, base: Tensor) -> float:
    """Of the expected effect; of the output where that is noise, and all or nothing where there is none."""
    if not expected.any():
        return math.inf if actual.any() else 0.0
    noise = expected.norm() < SMALLEST_EFFECT * base.norm()
    return float((actual - expected).norm() / (base if noise else expected).norm())


def targets(tiny: Tiny) -> list[Target]:
    """Every place that a key of a file can mean, and every parameter whole, without repetition."""
    parameters = dict(tiny.model.named_parameters())
    mapped = [Target.parse(value) for value in tiny.key_map.values()]
    whole = [Target(name) for name in parameters]
    return [target for target in dict.fromkeys([*mapped, *whole]) if target.parameter in parameters]


def rows_of(weight: Tensor, target: Target) -> Tensor:
    return weight if target.rows is None else weight.narrow(0, *target.rows)


def random_adapter(weight: Tensor) -> Adapter:
    """A LoRA of SIZE times the weight for matrices, convolutions and embeddings; a difference of spread SIZE
    for vectors, of which the next norm may take most away."""
    generator = torch.Generator().manual_seed(weight.numel())
    if weight.ndim < 2:
        return make_diff("test", SIZE * torch.randn(weight.shape, generator=generator))
    up = torch.randn(weight.shape[0], RANK, generator=generator)
    down = torch.randn(RANK, *weight.shape[1:], generator=generator)
    return make_lora("test", up, down * (SIZE * weight.std() / math.sqrt(RANK)))


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


def of_model(names: Mapping[str, set[str]], model: str) -> set[str]:
    """What a list says of this model; a model's variants share what its first word's entry says."""
    return names.get(model, names.get(model.split()[0], set()))


def report(wrong: Mapping[Target, float]) -> str:
    lines = [f"{error:.3g}  {target}" for target, error in sorted(wrong.items(), key=lambda pair: -pair[1])]
    return f"{len(lines)} parameters are off by more than {LARGEST_ERROR:g}:\n" + "\n".join(lines)
