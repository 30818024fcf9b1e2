"""Law 6: no forward makes an out×in matrix, or a second copy of a large activation."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.branch import Compute, Patch, PatchSession
from tests.branch.hosts import Holder
from tests.branch.meter import metered
from tests.branch.recipes import generator, noise, recipe

MIB = 2**20
COMPUTE = pytest.mark.parametrize("compute", ["auto", "fp16", "fp32"])


def session_on(layer: nn.Module, compute: Compute, *patches: Patch) -> tuple[Holder, PatchSession]:
    holder = Holder(layer)
    session = PatchSession(holder)
    session.apply_patches(patches, compute)
    return holder, session


def test_the_meter_sees_what_is_allocated_and_freed() -> None:
    def run() -> Tensor:
        first = torch.ones(1000)
        second = first + 1
        del first
        return second.view(10, 100).add_(torch.ones(10, 1))

    meter = metered(run)
    assert (meter.largest, meter.live) == (1000, 0)
    assert 8000 <= meter.peak <= 8100


@COMPUTE
def test_no_linear_forward_makes_a_full_matrix(compute: Compute) -> None:
    out, columns = 512, 768
    patches = [
        recipe(name, (out, columns)).patch("layer.weight")[0] for name in ("lora-rank-16-bf16", "lora-rank-1")
    ]
    patches.append(recipe("lora-rank-8-fp16", (256, columns)).patch("layer.weight", 1.0, (128, 256))[0])
    holder, _ = session_on(nn.Linear(columns, out), compute, *patches)
    x = torch.ones(4, columns)
    for _ in ("the first forward, which prepares the factors", "the next"):
        meter = metered(lambda: holder(x))
        assert meter.operations > 5
        assert 0 < meter.largest < out * columns // 4


@COMPUTE
def test_no_convolution_forward_makes_a_full_kernel(compute: Compute) -> None:
    shape = (128, 128, 3, 3)
    holder, _ = session_on(
        nn.Conv2d(128, 128, 3, padding=1), compute, recipe("lora-rank-8-fp16", shape).patch("layer.weight")[0]
    )
    x = torch.ones(1, 128, 5, 5)
    for _ in ("first", "next"):
        meter = metered(lambda: holder(x))
        assert meter.operations > 5
        assert 0 < meter.largest < 128 * 128 * 9 // 4


def test_no_embedding_forward_makes_a_full_table() -> None:
    holder, _ = session_on(
        nn.Embedding(5000, 64),
        "auto",
        recipe("lora-rank-4-without-alpha", (5000, 64)).patch("layer.weight")[0],
    )
    meter = metered(lambda: holder(torch.arange(20)))
    assert meter.operations > 5
    assert 0 < meter.largest <= 5000 * 4


def test_a_dense_remainder_is_read_in_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_precision_lora.branch.forward.rows.DENSE_BLOCK_BYTES", 64 * 1024)
    for name in ("diff-bf16", "set-fp16"):
        holder, _ = session_on(nn.Linear(512, 512), "auto", recipe(name, (512, 512)).patch("layer.weight")[0])
        meter = metered(lambda holder=holder: holder(torch.ones(4, 512)))
        assert meter.operations > 16
        assert 0 < meter.largest <= 64 * 1024 // 4


@pytest.mark.parametrize(
    ("kind", "compute"),
    [
        ("linear", "auto"),
        ("linear", "fp16"),
        ("diff", "auto"),
        ("conv", "auto"),
        ("conv", "fp16"),
        ("norm", "auto"),
        ("groups", "auto"),
    ],
)
def test_a_large_activation_is_added_to_in_place_in_bounded_memory(kind: str, compute: Compute) -> None:
    dtype = torch.float32 if kind == "groups" else torch.bfloat16
    width, tokens = 512, 65536
    if kind == "conv":
        layer, x = nn.Conv2d(width, width, 1), torch.ones(1, width, 256, 256)
        patch = recipe("lora-rank-8-fp16", (width, width, 1, 1)).patch("layer.weight")[0]
    elif kind == "norm":
        layer, x = nn.LayerNorm(width), torch.ones(tokens, width)
        patch = recipe("diff-bf16", (width,)).patch("layer.weight")[0]
    elif kind == "groups":
        layer, x = nn.GroupNorm(32, width), torch.ones(1, width, 128, 128)
        patch = recipe("diff-bf16", (width,)).patch("layer.weight")[0]
    else:
        layer, x = nn.Linear(width, width), torch.ones(tokens, width)
        patch = recipe({"diff": "diff-bf16", "linear": "lora-rank-8-fp16"}[kind], (width, width)).patch(
            "layer.weight"
        )[0]
    layer, x = layer.to(dtype), x.to(dtype)
    base = torch.zeros_like(x)
    layer.forward = lambda x: base
    holder, _ = session_on(layer, compute, patch)
    meter = metered(lambda: holder(x))
    with torch.no_grad():
        assert holder(x) is base
    assert meter.operations > 3
    assert 0 < meter.peak <= 64 * MIB


@pytest.mark.parametrize("compute", ["fp16", "fp32"])
def test_each_factor_is_held_once_however_many_files_share_a_layer(compute: Compute) -> None:
    """Two files on all rows, one on a part of them, in fp16 or in the files' own types."""
    out, columns, ranks = 256, 512, (16, 8, 16)
    patches = [
        recipe("lora-rank-16-bf16", (out, columns)).patch("layer.weight")[0],
        recipe("lora-rank-8-fp16", (128, columns)).patch("layer.weight", 1.0, (64, 128))[0],
        recipe("lora-rank-16-bf16", (out, columns), 1).patch("layer.weight")[0],
    ]
    holder, session = session_on(nn.Linear(columns, out), compute, *patches)
    meter = metered(lambda: holder(torch.ones(4, columns)))
    gc.collect()
    size = 2 if compute == "fp16" else 4
    numbers = sum(ranks) * columns + (16 + 16) * out + 8 * 128
    assert numbers * 2 <= meter.live <= numbers * size + 4096
    session.apply_patches([dataclasses.replace(patch, strength=0.5) for patch in patches], compute)
    again = metered(lambda: holder(torch.ones(4, columns)))
    gc.collect()
    assert again.live <= 1024
    assert meter.live <= numbers * size + 4096


def test_nothing_of_a_forward_stays_but_the_stacked_factors() -> None:
    holder, session = session_on(
        nn.Linear(256, 256), "fp16", recipe("lora-rank-8-fp16", (256, 256)).patch("layer.weight")[0]
    )
    x = noise((64, 256), generator(1))
    meter = metered(lambda: holder(x))
    gc.collect()
    assert 0 < meter.live <= 2 * 2 * 256 * 8 + 1024
    session.release()
    assert meter.live <= 1024
