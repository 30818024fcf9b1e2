"""Law 2 in a forward of normalizations, embeddings and shadowed parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_precision_lora.adapters import AdapterError
from lib_precision_lora.branch import Compute, Patch, PatchError, PatchSession
from tests.branch.forwards import Pairs, assert_exact_forward, forward
from tests.branch.hosts import Holder, Mixed, RMSNorm, T5LayerNorm
from tests.branch.recipes import BASE_STD, generator, noise, recipe
from tests.oracles import merge, rounding_error
from tests.storage.formats import stored_variant

WIDTH = 32
TYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = pytest.mark.parametrize("dtype", TYPES, ids=str)
NORMS = {
    "LayerNorm": (nn.LayerNorm, (WIDTH,), (9, 40, WIDTH)),
    "nn.RMSNorm": (nn.RMSNorm, (WIDTH,), (9, 40, WIDTH)),
    "Flux RMSNorm": (RMSNorm, (WIDTH,), (9, 40, WIDTH)),
    "T5LayerNorm": (T5LayerNorm, (WIDTH,), (9, 40, WIDTH)),
    "GroupNorm": (nn.GroupNorm, (4, WIDTH), (3, WIDTH, 6, 7)),
    "GroupNorm of tokens": (nn.GroupNorm, (8, WIDTH), (3, WIDTH, 40)),
    "GroupNorm of vectors": (nn.GroupNorm, (2, WIDTH), (300, WIDTH)),
}


def norm(name: str, dtype: torch.dtype) -> nn.Module:
    kind, arguments, _ = NORMS[name]
    layer = kind(*arguments)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data += noise(tuple(parameter.shape), generator(seed), 0.2)
    return layer.to(dtype).requires_grad_(False)


def diffs(layer: nn.Module) -> Pairs:
    return {
        name: [recipe("diff-bf16", (WIDTH,), seed).patch(f"layer.{name}", 30.0)]
        for seed, (name, _) in enumerate(layer.named_parameters())
    }


@ACTIVATIONS
@pytest.mark.parametrize("name", NORMS)
def test_every_norm_with_each_of_its_parameters_and_all(name: str, dtype: torch.dtype) -> None:
    layer, x = norm(name, dtype), noise(NORMS[name][2], generator(3)).to(dtype)
    everything = diffs(layer)
    assert everything
    for pairs in (everything, *({key: value} for key, value in everything.items())):
        assert_exact_forward(layer, pairs, x)


@pytest.mark.parametrize("name", NORMS)
def test_a_norms_input_need_not_be_contiguous(name: str) -> None:
    layer, shape = norm(name, torch.float32), NORMS[name][2]
    x = noise((*shape, 2), generator(4))[..., 0]
    assert not x.is_contiguous()
    assert_exact_forward(layer, diffs(layer), x)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_over_several_axes_is_shadowed(kind: type[nn.Module]) -> None:
    layer = kind((4, 8)).requires_grad_(False)
    pairs = {"weight": [recipe("diff-fp32", (4, 8)).patch("layer.weight", 30.0)]}
    result = forward(layer, pairs, noise((20, 4, 8), generator(1)))
    assert result.error <= 1e-6 * float(result.exact.norm())


EMBEDDED = ("lora-rank-8-fp16", "lora-rank-16-bf16", "diff-bf16", "set-fp16")


@ACTIVATIONS
@pytest.mark.parametrize("compute", ["auto", "fp16", "fp32"])
@pytest.mark.parametrize("shape", [(), (0,), (77,), (2, 3, 11)])
def test_embeddings(dtype: torch.dtype, compute: Compute, shape: tuple[int, ...]) -> None:
    layer = nn.Embedding(50, 1024)
    layer.weight.data = noise((50, 1024), generator(1), BASE_STD)
    layer = layer.to(dtype).requires_grad_(False)
    ids = torch.randint(0, 50, shape, generator=generator(2))
    stacks = [[recipe(name, (50, 1024)).patch("layer.weight", 0.7)] for name in EMBEDDED]
    stacks.append([pair for stack in stacks[:3] for pair in stack])
    stacks.append([recipe("lora-rank-1", (20, 1024)).patch("layer.weight", 1.0, (10, 20))])
    for pairs in stacks if ids.numel() > 1 else stacks[:1]:
        assert_exact_forward(layer, {"weight": pairs}, ids, compute)


@ACTIVATIONS
def test_a_shadow_is_the_merged_parameter_rounded_once(dtype: torch.dtype) -> None:
    model = Mixed().to(dtype)
    original = model.register
    pairs = [
        recipe("diff-bf16", (2, 12)).patch("register", 9.0),
        recipe("diff-fp32", (2, 12)).patch("register", 1.0),
    ]
    exact, _ = merge(original, [step for _, step in pairs])
    with PatchSession(model) as session:
        session.apply_patches([patch for patch, _ in pairs])
        assert model.register is not original
        assert model.register.dtype == dtype
        error = float((model.register.double() - exact).norm())
        assert error <= 1.5 * rounding_error(exact, dtype) + 1e-7
    assert model.register is original


def test_a_shadow_of_a_changed_set_starts_from_the_hosts_parameter() -> None:
    model = Mixed()
    original, before = model.register, model.register.clone()
    session = PatchSession(model)
    for strength in (1.0, 0.5, -2.0, 0.5):
        patch, step = recipe("diff-fp32", (2, 12)).patch("register", strength)
        session.apply_patches([patch])
        exact, _ = merge(before, [step])
        torch.testing.assert_close(model.register.double(), exact, rtol=1e-6, atol=1e-7)
    session.clear()
    assert model.register is original
    assert torch.equal(original, before)


def test_a_parameter_that_the_host_exchanged_while_shadowed_stays_the_hosts() -> None:
    model = Mixed()
    session = PatchSession(model)
    session.apply_patches([recipe("diff-fp32", (2, 12)).patch("register")[0]])
    exchanged = nn.Parameter(torch.ones(2, 12), requires_grad=False)
    model.register = exchanged
    patch, step = recipe("diff-fp32", (2, 12)).patch("register", 2.0)
    session.apply_patches([patch])
    exact, _ = merge(torch.ones(2, 12), [step])
    torch.testing.assert_close(model.register.double(), exact, rtol=1e-6, atol=1e-7)
    session.clear()
    assert model.register is exchanged


def test_a_low_bit_parameter_without_a_branch_is_refused_by_name() -> None:
    holder = Holder(stored_variant("fp8-e4m3fn", torch.ones(4, 64)).module)
    adapter = recipe("lora-rank-1", (4, 64)).adapter
    with pytest.raises(PatchError, match=r"layer\.weight.*fp8-e4m3fn.*outside") as caught:
        PatchSession(holder).apply([("file", {"layer": adapter}, 1.0)])
    assert isinstance(caught.value, AdapterError)
    assert isinstance(recipe("lora-rank-1", (4, 64)).patch("layer.weight")[0], Patch)
