"""Where a parameter is read, and so what runs beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import Diff
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.session.sites import find_parameter, find_site
from tests.branch.hosts import Mixed, RMSNorm, T5LayerNorm
from tests.branch.recipes import recipe

SITES = {
    "embedding.weight": "embedding",
    "linear.weight": "linear",
    "linear.bias": "linear",
    "conv.weight": "conv",
    "conv.bias": "conv",
    "norm.weight": "norm",
    "norm.bias": "norm",
    "groups.weight": "norm",
    "rms.scale": "norm",
    "register": "shadow",
}


@pytest.mark.parametrize("name", SITES)
def test_every_parameter_has_its_kind_of_site(name: str) -> None:
    model = Mixed()
    site = find_site(model, name)
    assert site.kind == SITES[name]
    assert site.parameter is dict(model.named_parameters())[name]


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Embedding(4, 4, max_norm=1.0), "shadow"),
        (nn.LayerNorm((4, 4)), "shadow"),
        (nn.RMSNorm((4, 4)), "shadow"),
        (nn.RMSNorm(4), "norm"),
        (T5LayerNorm(4), "norm"),
        (nn.ConvTranspose2d(4, 4, 1), "shadow"),
        (nn.Bilinear(4, 4, 4), "shadow"),
        (type("DynamicSwap_Linear", (nn.Linear,), {})(4, 4), "linear"),
        (type("NonDynamicallyQuantizableLinear", (nn.Linear,), {})(4, 4), "shadow"),
        (nn.Conv1d(4, 4, 1), "conv"),
        (nn.Conv3d(4, 4, 1), "conv"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_layers_that_read_their_weight_in_another_way_are_shadowed(layer: nn.Module, kind: str) -> None:
    assert find_site(nn.ModuleDict({"layer": layer}), "layer.weight").kind == kind


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("linear", "linear.weight"),
        ("linear.weight", "linear.weight"),
        ("linear.bias", "linear.bias"),
        ("rms", "rms.scale"),
        ("register", "register"),
        ("second.bias", None),
        ("nowhere", None),
        ("linear.weight.weight", None),
        ("", None),
    ],
)
def test_a_name_stands_for_a_parameter_or_the_weight_of_a_module(name: str, parameter: str | None) -> None:
    assert find_parameter(Mixed(), name) == parameter


class Wrapped(nn.Module):
    """As a host wraps an embedding for textual inversion: the weight is aliased."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = nn.Embedding(6, 4)
        self.weight = self.wrapped.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.wrapped(ids)


def test_a_wrapped_embedding_is_patched_where_it_is_read() -> None:
    model = nn.ModuleDict({"token_embedding": Wrapped()}).requires_grad_(False)
    plain = model["token_embedding"](torch.arange(6))
    one = recipe("diff-fp32", (6, 4))
    assert one.delta is not None
    with PatchSession(model) as session:
        session.apply([("file", {"token_embedding": one.adapter}, 1.0)])
        patched = model["token_embedding"](torch.arange(6))
    torch.testing.assert_close(patched - plain, one.delta.float())


def test_the_parameter_behind_a_shadow_is_the_hosts() -> None:
    model = Mixed()
    original = model.register
    session = PatchSession(model)
    session.apply_patches([recipe("diff-fp32", (2, 12)).patch("register")[0]])
    shadows = [attached.piece for attached in session._attached.values()]
    assert find_site(model, "register").parameter is model.register
    assert find_site(model, "register", shadows).parameter is original


def test_an_rms_norm_of_a_host_uses_its_own_epsilon() -> None:
    for layer in (RMSNorm(4), T5LayerNorm(4), nn.RMSNorm(4)):
        name = "scale" if isinstance(layer, RMSNorm) else "weight"
        holder = nn.ModuleDict({"layer": layer}).requires_grad_(False)
        x = torch.full((2, 4), 1e-3)
        plain = layer(x)
        value = torch.ones(4)
        with PatchSession(holder) as session:
            session.apply([("file", {f"layer.{name}": Diff(value)}, 1.0)])
            torch.testing.assert_close(layer(x), 2.0 * plain)
