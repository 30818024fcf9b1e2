"""Law 6 for every family: no forward makes an out×in matrix, and norms are read in bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_precision_lora.branch import EffectiveWeight, PatchSession
from lib_precision_lora.branch.forward.rows import DENSE_BLOCK_BYTES
from lib_precision_lora.storage import stored_weight
from tests.branch.meter import metered
from tests.families import BASE_STD, FAMILIES, family

MIB = 2**20
STREAMED = ("diff", "loha-streamed")
"""What is read in row blocks of D; the others have factors."""

COLUMN_NORMS = ("dora-in", "loha-dora-in", "lokr-dora-in")


@pytest.mark.parametrize("compute", ["fp32", "fp16"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in STREAMED])
def test_no_linear_forward_makes_a_full_matrix(name: str, compute: str) -> None:
    rows, columns = 512, 768
    layer = nn.Linear(columns, rows).requires_grad_(False)
    model, x = nn.ModuleDict({"layer": layer}), torch.ones(4, columns)
    session = PatchSession(model)
    session.apply([("file", {"layer.weight": family(name, (rows, columns)).adapter}, 0.7)], compute)
    for _ in ("the first forward, which prepares the factors", "the next"):
        meter = metered(lambda: layer(x))
        assert meter.operations > 3
        assert 0 < meter.largest < rows * columns // 4


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in STREAMED])
def test_no_convolution_forward_makes_a_full_kernel(name: str) -> None:
    shape = (128, 128, 3, 3)
    layer = nn.Conv2d(128, 128, 3, padding=1).requires_grad_(False)
    model, x = nn.ModuleDict({"layer": layer}), torch.ones(1, 128, 5, 5)
    session = PatchSession(model)
    session.apply([("file", {"layer.weight": family(name, shape).adapter}, 0.7)])
    for _ in ("first", "next"):
        meter = metered(lambda: layer(x))
        assert meter.operations > 3
        assert 0 < meter.largest < 128 * 128 * 9 // 3


@pytest.mark.parametrize("name", STREAMED)
def test_what_is_dense_is_read_in_row_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DENSE_BLOCK_BYTES == 8 * MIB
    monkeypatch.setattr("lib_precision_lora.branch.forward.rows.DENSE_BLOCK_BYTES", 32 * 1024)
    layer = nn.Linear(256, 256).requires_grad_(False)
    model, x = nn.ModuleDict({"layer": layer}), torch.ones(4, 256)
    session = PatchSession(model)
    session.apply([("file", {"layer.weight": family(name, (256, 256)).adapter}, 1.0)])
    meter = metered(lambda: layer(x))
    assert meter.operations > 16
    assert 0 < meter.largest <= 32 * 1024 // 4


@pytest.mark.parametrize(
    "name", ["dora-out", "dora-in", "loha-dora-out", "lokr-dora-out", "lokr-dora-in", "glora"]
)
def test_norms_of_a_large_layer_are_read_within_64_mib(name: str) -> None:
    """A 66 M-parameter layer; blocks do not depend on its height, so its full width is what matters."""
    shape = (21504 // 3, 3072)
    weight = nn.Parameter(torch.full(shape, BASE_STD, dtype=torch.float16), requires_grad=False)
    adapter = family(name, shape).adapter
    identity = EffectiveWeight.identity(stored_weight(weight))
    meter = metered(lambda: identity.apply(adapter, 1.0))
    assert meter.operations > 10
    assert 2 * MIB < meter.peak <= 64 * MIB


def test_norms_after_a_rotation_are_read_by_column_within_64_mib() -> None:
    shape = (6144, 768)
    weight = nn.Parameter(torch.full(shape, BASE_STD, dtype=torch.float16), requires_grad=False)
    rotated = EffectiveWeight.identity(stored_weight(weight)).apply(family("oft", shape).adapter)
    adapter = family("dora-out", shape).adapter
    meter = metered(lambda: rotated.apply(family("lora", shape).adapter).apply(adapter, 1.0))
    assert meter.operations > 10
    assert 5 * MIB < meter.peak <= 64 * MIB
