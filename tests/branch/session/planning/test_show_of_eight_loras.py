"""Eight rank-32 LoRAs on Flux's layers take their factors and at most 64 MiB, in place."""

from __future__ import annotations

import pytest
import torch

from benchmarks.flux_layers import SHAPES, flux_layers, inputs, loras
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.arithmetic import plain_form
from lib_precision_lora.memory.allocator import allocated_bytes
from lib_precision_lora.memory.meter import ByteMeter
from tests.branch.meter import metered

MIB = 2**20
CPU = torch.device("cpu")
TOKENS, FILES, RANK = 4096, 8, 32
FACTORS = sum(2 * FILES * RANK * (out + width) for out, width in SHAPES.values())
"""Bytes of bf16 factors, by hand."""


@pytest.fixture(params=[False, True], ids=["products in fp32", "products in bf16"], autouse=True)
def multiplies_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whatever this processor has."""
    multiplies = bool(request.param)
    monkeypatch.setattr(plain_form, "multiplies_bf16", lambda device: multiplies)
    return multiplies


def test_eight_loras_take_their_factors_and_at_most_64_mib_in_place(multiplies_bf16: bool) -> None:
    model, patches = flux_layers(CPU), loras(FILES, RANK)
    session = PatchSession(model)
    planned = session.footprints(patches, "auto", CPU, torch.bfloat16)
    session.apply_patches(patches)
    with torch.no_grad(), ByteMeter() as placing:
        session.place(CPU, torch.bfloat16)
    vectors = 1 if multiplies_bf16 else 2  # scales, and exponents of which they are made
    scales = sum(vectors * 4 * FILES * RANK for _ in SHAPES)
    assert session.placed_bytes == FACTORS + scales == sum(each.factor_bytes for each in planned.values())
    peaks = {}
    for name in ("img_attn_qkv", "img_mlp_out", "linear1", "linear2"):
        layer, x = model[name], inputs(name, TOKENS, CPU)
        output = layer.forward(x)
        layer.forward = lambda x, output=output: output
        with torch.no_grad(), ByteMeter() as meter:
            assert layer(x) is output
        peaks[name] = meter.peak
        assert meter.live <= 1024
        assert 0 < meter.peak <= planned[name].workspace_bytes(TOKENS) + 2 * MIB
        del layer.forward
    assert placing.live + max(peaks.values()) <= FACTORS + 64 * MIB


@pytest.mark.parametrize("name", ["img_mlp_out", "linear1"])
def test_no_operation_makes_a_tensor_of_64_mib(name: str) -> None:
    model = flux_layers(CPU)
    session = PatchSession(model)
    session.apply_patches(
        [patch for patch in loras(FILES, RANK) if patch.target.parameter == f"{name}.weight"]
    )
    session.place(CPU, torch.bfloat16)
    x = inputs(name, TOKENS, CPU)
    output = model[name].forward(x)
    model[name].forward = lambda x: output
    meter = metered(lambda: model[name](x))
    assert meter.operations > 5
    assert 0 < 4 * meter.largest < 64 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run this file on a GPU machine")
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cards_own_count_is_the_one_predicted(dtype: torch.dtype, streamed: bool) -> None:
    """Law 4 by `torch.cuda.max_memory_allocated`: within max(5 %, 32 MiB), resident and streamed."""
    cuda = torch.device("cuda", torch.cuda.current_device())
    model, patches = flux_layers(cuda), loras(FILES, RANK)
    given = {name: inputs(name, TOKENS, cuda).to(dtype) for name in SHAPES}
    session = PatchSession(model)
    planned = session.footprints(patches, "auto", cuda, dtype)

    def peak() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            for name, x in given.items():
                model[name](x)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    torch.ones(1, 1, device=cuda) @ torch.ones(1, 1, device=cuda)  # cuBLAS's own workspace
    bare = {}
    for name in SHAPES:
        bare[name] = given[name].numel() // given[name].shape[-1] * SHAPES[name][0] * 2
    before = torch.cuda.memory_allocated()
    session.apply_patches(patches)
    session.place(cuda, dtype, frozenset() if streamed else None)
    peak()  # the order is learned, and libraries take their workspaces
    extra = peak() - before - max(bare.values())
    sizes = sorted(allocated_bytes(each.factors) for each in planned.values())
    factors = sum(sizes[-2:]) if streamed else sum(sizes)
    workspace = max(each.workspace_bytes(TOKENS) for each in planned.values())
    assert abs(factors + workspace - extra) <= max(0.05 * extra, 32 * MIB)
