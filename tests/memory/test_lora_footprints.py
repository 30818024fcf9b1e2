"""What a plan takes from a file's header is what the branches take: their footprint, and their tensors."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_precision_lora.adapters import read_adapters
from lib_precision_lora.adapters.target import Target
from lib_precision_lora.adapters.terms import Dense
from lib_precision_lora.branch import Compute, Patch, PatchSession
from lib_precision_lora.branch.arithmetic import plain_form
from lib_precision_lora.branch.session.planning.footprint import Footprint
from lib_precision_lora.memory.architecture import Flow, Request
from lib_precision_lora.memory.checkpoint import Layer
from lib_precision_lora.memory.header_footprint import HeaderFootprint
from lib_precision_lora.memory.lora_footprints import Plain, factor_sizes, layer_footprints, workspace_bytes
from lib_precision_lora.memory.lora_header import LoraLayer, read_lora_header
from lib_precision_lora.memory.naming import Place
from tests.families import FAMILIES, family

TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
CPU = torch.device("cpu")
SHAPES = {"linear": (64, 96), "conv": (16, 32, 3, 3), "square": (32, 32), "wide": (8, 4, 3)}
AXIS_UNTOLD = ("ia3-out", SHAPES["square"])
CASES = [
    pytest.param(name, shape, id=f"{name}-{kind}")
    for name in FAMILIES
    for kind, shape in SHAPES.items()
    if (name, shape) != AXIS_UNTOLD
]
File = dict[str, Tensor]


def of_family(name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None, seed: int = 0) -> File:
    tensors = family(name, shape, seed).tensors
    return {
        f"layer.{key}": (value.to(dtype) if dtype is not None and value.ndim > 1 else value).contiguous()
        for key, value in tensors.items()
    }


def headers(files: list[File], shape: tuple[int, ...], rows: list[tuple[int, int]], path: Path) -> Any:
    """The files' adapters from their headers, each for its rows of one layer."""
    layer = Layer("layer", *shape[:2], shape[2:], "F32", 4 * math.prod(shape), Flow("positions"))
    found: list[LoraLayer] = []
    for number, (tensors, (start, stop)) in enumerate(zip(files, rows, strict=True)):
        place = Place("diffusion model", layer, start, stop)
        places = SimpleNamespace(find=lambda name, place=place: place)
        save_file(tensors, path / f"{number}.safetensors")
        found += read_lora_header(path / f"{number}.safetensors", places).model  # type: ignore[arg-type]
    return found


def attached(
    files: list[File],
    shape: tuple[int, ...],
    rows: list[tuple[int, int]],
    compute: Compute,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> tuple[Footprint, PatchSession, nn.Module]:
    """The footprint that a session tells of these files, and the session with them attached."""
    kind = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}[len(shape)]
    layer = kind(shape[1], shape[0], *(shape[2:3]), bias=False).requires_grad_(False)
    model = nn.ModuleDict({"layer": layer})
    session = PatchSession(model)
    patches = []
    for number, (tensors, (start, stop)) in enumerate(zip(files, rows, strict=True)):
        part = None if (start, stop) == (0, shape[0]) else (start, stop - start)
        adapter = next(iter(read_adapters(tensors).values()))
        patches.append(Patch(f"file {number}", Target("layer.weight", part), adapter, 1.0))
    footprint = session.footprints(patches, compute, device, dtype)["layer"]
    session.apply_patches(patches, compute)
    return footprint, session, layer


def held_by(value: Any, seen: dict[int, int]) -> dict[int, int]:
    """Storage → bytes, of every tensor in nested dataclasses and collections; dense remainders stay away."""
    if isinstance(value, Tensor):
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif dataclasses.is_dataclass(value) and not isinstance(value, (Dense, type)):
        for field in dataclasses.fields(value):
            held_by(getattr(value, field.name), seen)
    elif isinstance(value, dict):
        held_by(tuple(value.values()), seen)
    elif isinstance(value, (tuple, list)):
        for item in value:
            held_by(item, seen)
    return seen


def made(session: PatchSession, layer: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes that the branch holds for its device."""
    (here,) = session._attached.values()
    x = torch.ones(1, shape[1], *(5 for _ in shape[2:]))
    operands, stack = here.piece.operands(x, None), here.piece._stack  # type: ignore[union-attr]
    return sum(held_by((operands, stack), {}).values())


def assert_same_workspace(planned: HeaderFootprint, told: Footprint) -> None:
    """Law 4's bound; headers do not tell what a forward makes at which stage, nor what reads the base."""
    for tokens in (77, 4096):
        difference = planned.workspace_bytes(tokens) - told.workspace_bytes(tokens)
        assert abs(difference) <= 32 * 2**20


@pytest.mark.parametrize("compute", ["fp16", "fp32"])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_header_tells_what_the_branch_of_every_family_takes(
    name: str, shape: tuple[int, ...], compute: Compute, tmp_path: Path
) -> None:
    files, rows = [of_family(name, shape)], [(0, shape[0])]
    adapters = headers(files, shape, rows, tmp_path)
    planned = layer_footprints(adapters, compute == "fp16")["layer"]
    told, session, layer = attached(files, shape, rows, compute)
    assert sorted(planned.factors) == sorted(told.factors)
    assert_same_workspace(planned, told)
    assert sum(planned.factors) == pytest.approx(made(session, layer, shape), abs=4 * sum(shape[:2]))


@pytest.mark.parametrize(("plain", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
@pytest.mark.parametrize("types", [("F16",), ("BF16",), ("F32",), ("BF16", "F16"), ("BF16", "BF16", "F32")])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_header_tells_what_a_plain_stack_takes_on_a_card(
    shape: tuple[int, ...],
    types: tuple[str, ...],
    plain: Plain,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plain_form, "sums_in_fp32", lambda device: True)
    files = [{k: v.to(TYPES[t]) for k, v in of_family("lora", shape).items()} for t in types]
    rows = [(0, shape[0])] * len(files)
    adapters = headers(files, shape, rows, tmp_path)
    planned = layer_footprints(adapters, dtype == torch.float16, plain)["layer"]
    told, _, _ = attached(files, shape, rows, "auto", torch.device("cuda"), dtype)
    assert sorted(planned.factors) == sorted(told.factors)
    assert_same_workspace(planned, told)


@pytest.mark.parametrize("compute", ["fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_header_tells_what_a_sparse_rest_takes(
    shape: tuple[int, ...], compute: Compute, tmp_path: Path
) -> None:
    columns = torch.Size(shape[1:]).numel()
    kept = torch.rand(shape[0], columns, generator=torch.manual_seed(2)) < 0.1
    rest = {
        "layer.bias_indices": kept.nonzero().T.contiguous().to(torch.int16),
        "layer.bias_values": torch.ones(int(kept.sum()), dtype=torch.float16),
        "layer.bias_size": torch.tensor(kept.shape, dtype=torch.int16),
    }
    files, rows = [of_family("lora", shape) | rest], [(0, shape[0])]
    planned = layer_footprints(headers(files, shape, rows, tmp_path), compute == "fp16")["layer"]
    told, session, layer = attached(files, shape, rows, compute)
    assert sorted(planned.factors) == sorted(told.factors)
    assert_same_workspace(planned, told)
    assert sum(planned.factors) == pytest.approx(made(session, layer, shape), abs=4 * sum(shape[:2]))
    bare = [of_family("lora", shape)]
    less = layer_footprints(headers(bare, shape, rows, tmp_path), compute == "fp16")["layer"]
    assert sum(planned.factors) - sum(less.factors) == 10 * int(kept.sum())


@pytest.mark.parametrize("compute", ["fp16", "fp32"])
def test_a_scale_whose_axis_no_header_tells_is_planned_as_the_costlier_one(
    compute: Compute, tmp_path: Path
) -> None:
    shape = SHAPES["square"]
    files = [of_family("ia3-out", shape)]
    (planned,) = layer_footprints(headers(files, shape, [(0, 32)], tmp_path), compute == "fp16").values()
    told, _, _ = attached(files, shape, [(0, 32)], compute)
    assert planned.factors == told.factors
    assert_same_workspace(planned, told)
    assert planned.workspace_bytes(77) > told.workspace_bytes(77)


STACKS = {
    "two files": [("lora", None), ("lora", None)],
    "fp16 beside bf16": [("lora", torch.float16), ("lora", torch.bfloat16)],
    "mixed": [("lora", torch.bfloat16), ("loha", None), ("dora-out", torch.bfloat16), ("lora", None)],
    "a turn of inputs behind": [("lora", torch.bfloat16), ("dora-in", torch.bfloat16)],
    "everything": [("glora", None), ("lora", torch.float16), ("oft", None), ("lora", None), ("diff", None)],
}


@pytest.mark.parametrize("compute", ["fp16", "fp32"])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_what_several_files_put_beside_one_layer_is_counted_together(
    stack: list[tuple[str, torch.dtype | None]], compute: Compute, tmp_path: Path
) -> None:
    shape = SHAPES["linear"]
    files = [of_family(name, shape, dtype, seed) for seed, (name, dtype) in enumerate(stack)]
    rows = [(0, shape[0])] * len(files)
    planned = layer_footprints(headers(files, shape, rows, tmp_path), compute == "fp16")["layer"]
    told, session, layer = attached(files, shape, rows, compute)
    assert sorted(planned.factors) == sorted(told.factors)
    assert_same_workspace(planned, told)
    assert sum(planned.factors) == pytest.approx(made(session, layer, shape), abs=4 * sum(shape))


@pytest.mark.parametrize("compute", ["fp16", "fp32"])
def test_files_for_parts_of_a_fused_layer_are_counted_by_rows(compute: Compute, tmp_path: Path) -> None:
    shape, rows = SHAPES["linear"], [(0, 64), (0, 16), (8, 32)]
    files = [
        of_family("lora", (stop - start, shape[1]), torch.bfloat16, seed)
        for seed, (start, stop) in enumerate(rows)
    ]
    planned = layer_footprints(headers(files, shape, rows, tmp_path), compute == "fp16")["layer"]
    told, session, layer = attached(files, shape, rows, compute)
    assert sorted((*planned.factors, 8 * 8)) == sorted(told.factors)
    assert sum(planned.factors) == 2 * 4 * (64 + 16 + 24 + 3 * shape[1]) + 2 * 4 * 12
    # The last 32 rows are the first file's alone: on its own device a view of all 64. Rows 16 to 32 need
    # the numbers of their 8 columns, which do not lie side by side.
    assert made(session, layer, shape) - sum(planned.factors) == 2 * 4 * 32 + 8 * 8


def test_factors_of_the_same_type_are_held_once_however_many_files_share_a_layer(tmp_path: Path) -> None:
    shape = SHAPES["linear"]
    files = [of_family("lora", shape, torch.bfloat16, seed) for seed in range(3)]
    together = headers(files, shape, [(0, 64)] * 3, tmp_path)
    for half in (False, True):
        alone = sum(sum(factor_sizes([adapter], half)) for adapter in together)
        assert sum(factor_sizes(together, half)) == alone == 3 * (2 * 4 * (64 + 96) + 2 * 4 * 4)


def test_nothing_is_planned_where_nothing_is_patched() -> None:
    request = Request(1024, 1024, images=1, text_tokens=77)
    assert workspace_bytes([], request, False) == 0
    assert workspace_bytes([LoraLayer("a", "lora", 4, {}, None)], request, False) == 0
