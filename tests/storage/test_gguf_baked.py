"""Forge's baked GGUF layout, against a second implementation of it and, with FORGE_ROOT, against Forge."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch

from lib_precision_lora.storage import StorageError, stored_weight
from tests.storage.formats import BAKED, COMPUTE, HostGGUFParameter, gguf_blocks, gguf_forge, gguf_values

FORGE_ROOT = os.environ.get("FORGE_ROOT")
FORGE_PYTHON = os.environ.get("FORGE_PYTHON", sys.executable)
TYPES = pytest.mark.parametrize("name", BAKED)


def matrix(shape: tuple[int, ...] = (16, 256)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.05


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_baked_in_fp16_equals_gguf_bit_for_bit(name: str) -> None:
    values = matrix()
    parameter = gguf_forge(name, True, torch.float16, values).parameter
    expected = gguf_values(name, gguf_blocks(name, values), values.shape)
    assert torch.equal(stored_weight(parameter).dense(), expected)


@TYPES
@pytest.mark.parametrize("compute", COMPUTE)
def test_baking_costs_no_more_than_the_rounding_of_block_scales(name: str, compute: str) -> None:
    values = matrix()
    exact = gguf_values(name, gguf_blocks(name, values), values.shape).double()
    baked = stored_weight(gguf_forge(name, True, COMPUTE[compute], values).parameter).dense(torch.float64)
    roundings = 2 if name == "Q4_K" else 1
    span = exact.abs().max() * (2 if name in ("Q4_1", "Q4_K") else 1)
    assert (baked - exact).abs().max() <= roundings * torch.finfo(COMPUTE[compute]).eps * span


@TYPES
@pytest.mark.parametrize("shape", [(64, 20), (16, 4, 3, 4), (768,)])
def test_rows_that_cut_baked_blocks_are_read(name: str, shape: tuple[int, ...]) -> None:
    flat = matrix((1, torch.Size(shape).numel()))
    case = gguf_forge(name, True, torch.bfloat16, flat)
    parameter = HostGGUFParameter(
        case.parameter.data, **{**vars(case.parameter), "real_shape": torch.Size(shape)}
    )
    expected = case.expected.view(shape)
    weight = stored_weight(parameter)
    for start, stop in [(0, 1), (3, 11), (shape[0] - 1, shape[0]), (0, shape[0])]:
        assert torch.equal(weight.rows(start, stop), expected[start:stop])


@TYPES
def test_baked_layouts_need_no_gguf_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = gguf_forge(name, True, torch.float16, matrix())
    for module in ("gguf", "gguf.constants", "gguf.quants"):
        monkeypatch.setitem(sys.modules, module, None)
    assert torch.equal(stored_weight(case.parameter).dense(), case.expected)


@TYPES
def test_a_compute_type_that_cannot_be_baked_is_refused(name: str) -> None:
    parameter = gguf_forge(name, True, torch.float16, matrix()).parameter
    parameter.computation_dtype = torch.float32
    with pytest.raises(
        StorageError, match=rf"{name} .* fp16 or bf16, .* torch.float32; load the checkpoint again"
    ):
        stored_weight(parameter)


def test_a_wrong_number_of_baked_bytes_is_refused_with_the_numbers() -> None:
    parameter = gguf_forge("Q4_0", True, torch.float16, matrix()).parameter
    parameter.real_shape = torch.Size((15, 256))
    with pytest.raises(StorageError, match=r"\[15, 256\] needs 2160 bytes .* holds 2304"):
        stored_weight(parameter)


@pytest.mark.skipif(FORGE_ROOT is None, reason="set FORGE_ROOT to a Forge checkout to run its own classes")
def test_every_type_that_forge_loads_is_read_as_forge_reads_it(tmp_path: Path) -> None:
    names = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "BF16"]
    values = matrix((12, 512))
    cases = {}
    for name in names:
        blocks = gguf_blocks(name, values)
        cases[name] = {
            "type": int(gguf.GGMLQuantizationType[name]),
            "data": blocks.view(12, -1),
            "expected": gguf_values(name, blocks, values.shape),
        }
    torch.save(cases, tmp_path / "cases.pt")
    script = Path(__file__).with_name("read_in_forge.py")
    folders = [f"{FORGE_ROOT}/packages_3rdparty", str(FORGE_ROOT), str(Path(__file__).parents[2])]
    finished = subprocess.run(
        [FORGE_PYTHON, script, tmp_path / "cases.pt"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("read ") == 2 * len(names)
