"""How exact LoRAs are on every stored weight of a real Forge Neo, in its own layers, beside its own merge.

    error = ‖(W_eff − W0) − Σ Δᵢ‖ / Σ ‖Δᵢ‖        ‖Δᵢ‖ is 1 % of ‖W0‖

Neo's layers are made and loaded by its own classes. Its merge is that of `ModelPatcher`, which rounds the
whole weight again; its error is that of the weight which it leaves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import read_adapters
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.session.rounding import rounded
from lib_precision_lora.host.neo.host import NeoHost
from lib_precision_lora.storage import stored_weight

ROWS, COLUMNS, RANK = 384, 512, 16
LAWS = {torch.float32: 1e-6, torch.float16: 1e-3}
"""Law 2, for the effective delta."""

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Neo:
    """The modules of the host that are needed here; no server, no page."""

    operations: ModuleType
    mixed: ModuleType
    quants: ModuleType
    gguf: ModuleType
    ggml: ModuleType
    patcher: ModuleType
    lora: ModuleType


@pytest.fixture(scope="module")
def neo(neo_root: Path) -> Iterator[Neo]:
    path, arguments = list(sys.path), list(sys.argv)
    sys.path[:0] = [str(neo_root), str(neo_root / "modules_forge/packages")]
    sys.argv[1:] = ["--cpu"]
    try:
        yield Neo(
            operations=import_module("backend.operations"),
            mixed=import_module("backend.operations_mixed_precision"),
            quants=import_module("backend.quant_ops"),
            gguf=import_module("backend.operations_gguf"),
            ggml=import_module("modules_forge.packages.gguf"),
            patcher=import_module("backend.patcher.base"),
            lora=import_module("backend.patcher.lora"),
        )
    finally:
        sys.path[:], sys.argv[:] = path, arguments


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def base() -> Tensor:
    return 0.03 * noise(ROWS, COLUMNS, seed=1)


def model_of(layer: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layer": layer}).requires_grad_(False)


def in_operations(neo: Neo, dtype: torch.dtype, storage: str | None, state: Mapping[str, Any]) -> nn.Module:
    with neo.operations.using_forge_operations(
        device=CPU, dtype=dtype, manual_cast_enabled=True, bnb_dtype=storage
    ):
        layer = nn.Linear(COLUMNS, ROWS)
    layer.load_state_dict(state)
    return model_of(layer)


def dense(dtype: torch.dtype, neo: Neo) -> nn.Module:
    state = {"weight": base().to(dtype), "bias": torch.zeros(ROWS, dtype=dtype)}
    return in_operations(neo, dtype, None, state)


def mixed(name: str, options: Mapping[str, Any], configuration: Mapping[str, Any], neo: Neo) -> nn.Module:
    """A layer of a checkpoint with `comfy_quant`, quantized from bf16 by the host's own layout.

    Products in NVFP4 and MXFP8 are off, as the host has them where the card has none; in FP8 and int8 on.
    """
    layout = neo.quants.QUANT_ALGOS[name]["comfy_tensor_layout"]
    tensor = neo.quants.QuantizedTensor.from_float(base().bfloat16(), layout, **options)
    text = json.dumps({"format": name, **configuration}).encode()
    state = tensor.state_dict("weight") | {
        "bias": torch.zeros(ROWS, dtype=torch.bfloat16),
        "comfy_quant": torch.tensor(list(text), dtype=torch.uint8),
    }
    operations = neo.mixed.mixed_precision_ops(compute_dtype=torch.bfloat16, disabled={"nvfp4", "mxfp8"})
    layer = operations.Linear(COLUMNS, ROWS, device=CPU)
    layer.load_state_dict(state)
    assert type(layer.weight).__name__ == "QuantizedTensor"
    return model_of(layer)


def four_bit(kind: str, neo: Neo) -> nn.Module:
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    packed, state = functional.quantize_4bit(base(), blocksize=64, quant_type=kind)
    entries = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    entries |= {"weight": packed, "bias": torch.zeros(ROWS)}
    return in_operations(neo, torch.float32, kind, entries)


def gguf(kind: str, neo: Neo) -> nn.Module:
    """Baked, as loading does it. Of types that `gguf` cannot make the codes are random."""
    member = neo.ggml.GGMLQuantizationType[kind]
    if kind.endswith("_K"):
        from tests.storage.k_quants import random_blocks  # imports gguf, which the host brings with it

        blocks = random_blocks(kind, ROWS * COLUMNS // 256, 0.03).reshape(ROWS, -1)
    else:
        blocks = neo.ggml.quants.quantize(base().numpy(), member).copy()
    data = torch.from_numpy(blocks)
    weight = neo.gguf.ParameterGGUF(data, tensor_type=member, tensor_shape=torch.Size((ROWS, COLUMNS)))
    bias = neo.gguf.ParameterGGUF(torch.zeros(ROWS), tensor_shape=torch.Size((ROWS,)))
    model = in_operations(neo, torch.float16, "gguf", {"weight": weight, "bias": bias})
    model["layer"].weight.gguf_cls.bake(model["layer"].weight)
    return model


BAKED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K")
NOT_BAKED = ("Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "BF16")
SCALED = {"scale": "recalculate"}
STORED: Mapping[str, tuple[str, Callable[[Neo], nn.Module]]] = {
    "dense bf16": ("dense-bf16", partial(dense, torch.bfloat16)),
    "dense fp16": ("dense-fp16", partial(dense, torch.float16)),
    "fp8 e4m3": ("fp8-e4m3fn", partial(dense, torch.float8_e4m3fn)),
    "fp8 e5m2": ("fp8-e5m2", partial(dense, torch.float8_e5m2)),
    "comfy_quant fp8 e4m3": ("fp8-e4m3fn-scaled", partial(mixed, "float8_e4m3fn", SCALED, {})),
    "comfy_quant fp8 e5m2": ("fp8-e5m2-scaled", partial(mixed, "float8_e5m2", SCALED, {})),
    "comfy_quant NVFP4": ("nvfp4", partial(mixed, "nvfp4", {}, {})),
    "comfy_quant MXFP8": ("mxfp8", partial(mixed, "mxfp8", {}, {})),
    "comfy_quant int8": ("int8", partial(mixed, "int8_tensorwise", {"per_channel": True}, {})),
    "comfy_quant int8 ConvRot": (
        "int8-convrot",
        partial(mixed, "int8_tensorwise", {"per_channel": True, "convrot": True}, {"convrot": True}),
    ),
    "bnb NF4": ("bnb-nf4", partial(four_bit, "nf4")),
    "bnb FP4": ("bnb-fp4", partial(four_bit, "fp4")),
    **{f"GGUF {kind}": (f"gguf-{kind}-baked", partial(gguf, kind)) for kind in BAKED},
    **{f"GGUF {kind}": (f"gguf-{kind}", partial(gguf, kind)) for kind in NOT_BAKED},
}
"""The rows of the table: kind of the stored weight, and the host's layer."""

UNMERGEABLE = ("bnb", "GGUF")
"""Neo's merge raises on them, or stores what no forward can read."""


@dataclass(frozen=True, slots=True, eq=False)
class LoRA:
    """delta: ΔW in float64; tensors: of its file, for the layer."""

    delta: Tensor
    tensors: Mapping[str, Tensor]

    def named(self, layer: str) -> dict[str, Tensor]:
        return {f"{layer}{end}": value for end, value in self.tensors.items()}


def lora(seed: int, size: float) -> LoRA:
    up, down = noise(ROWS, RANK, seed=2 * seed), noise(RANK, COLUMNS, seed=2 * seed + 1)
    down = (down * (size / float((up.double() @ down.double()).norm()))).contiguous()
    tensors = {".lora_up.weight": up, ".lora_down.weight": down, ".alpha": torch.tensor(float(RANK))}
    return LoRA(up.double() @ down.double(), tensors)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("row", STORED)
def test_the_effective_delta_is_exact_where_neos_own_merge_is_not(
    neo: Neo, row: str, count: int, record_property: Callable[[str, object], None]
) -> None:
    kind, make = STORED[row]
    model = make(neo)
    layer = model["layer"]
    stored = stored_weight(layer.weight, layer)
    assert stored.kind == kind
    original, w0 = layer.weight, stored.dense(torch.float64)
    loras = [lora(seed, 0.01 * float(w0.norm())) for seed in range(1, count + 1)]
    exact = torch.stack([each.delta for each in loras]).sum(0)
    total = sum(float(each.delta.norm()) for each in loras)
    x = noise(7, COLUMNS, seed=99)
    with torch.inference_mode():
        before = layer(x)
    with PatchSession(model) as session:
        items = [(str(number), read_adapters(each.named("layer")), 1.0) for number, each in enumerate(loras)]
        session.apply(items, "fp32")
        assert session.attached == ("layer",)
        ((_, effective),) = session.effective().values()
        ours = {dtype: float((effective.delta(dtype).double() - exact).norm()) / total for dtype in LAWS}
        with torch.inference_mode():
            after = layer(x)
        assert layer.weight is original
        assert not layer.weight_function
    for dtype, law in LAWS.items():
        assert ours[dtype] <= law, dtype
    effect = x.double() @ exact.T
    rounding = float(before.double().norm()) * torch.finfo(before.dtype).eps
    assert float((after.double() - before.double() - effect).norm()) <= 1.5 * rounding
    assert torch.equal(stored_weight(layer.weight, layer).dense(torch.float64), w0)
    theirs = merge_error(neo, model, loras, w0, exact, total)
    record_property("ours", ours[torch.float32])
    record_property("neo", theirs)
    if isinstance(theirs, str):
        assert row.startswith(UNMERGEABLE), theirs
    else:
        assert theirs > 100 * ours[torch.float32]


def merge_error(
    neo: Neo, model: nn.Module, loras: Sequence[LoRA], w0: Tensor, exact: Tensor, total: float
) -> float | str:
    """Of the weight that Neo's merge leaves; or what it raises."""
    patcher = neo.patcher.ModelPatcher(model, CPU, CPU)
    for number, each in enumerate(loras):
        patches = neo.lora.load_lora(each.named("layer"), {"layer": "layer.weight"})
        patches = patches[0] if isinstance(patches, tuple) else patches
        assert patcher.add_patches(patches, 1.0, filename=str(number), online_mode=False)
    layer = model["layer"]
    try:
        patcher.patch_weight_to_device("layer.weight")
        merged = stored_weight(layer.weight, layer).dense(torch.float64)
        return float((merged - w0 - exact).norm()) / total
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "row", ["comfy_quant fp8 e4m3", "comfy_quant int8", "comfy_quant int8 ConvRot", "comfy_quant NVFP4"]
)
def test_a_branch_leaves_the_quantized_product_on_that_neos_own_way_turns_off(neo: Neo, row: str) -> None:
    """The product of a quantized input is off by what quantizing it costs; NVFP4 has none here."""
    model = STORED[row][1](neo)
    layer = model["layer"]
    x = 0.1 * noise(7, COLUMNS, seed=99)
    exact = x.double() @ stored_weight(layer.weight, layer).dense(torch.float64).T
    way = partial(NeoHost.quantized_product, cast(NeoHost, None))

    def error() -> float:
        with torch.inference_mode():
            return float((layer(x).double() - exact).norm() / exact.norm())

    there = row != "comfy_quant NVFP4"
    without = error()
    assert way(layer) is there
    assert (without > 4e-3) is there
    with PatchSession(model) as session:
        session.apply([("file", read_adapters(lora(1, 1e-9).named("layer")), 1.0)], "fp32")
        assert session.attached == ("layer",)
        assert way(layer) is there
        assert error() == pytest.approx(without, rel=1e-3)
    layer.weight_function = [lambda weight: weight]
    assert way(layer) is False
    assert error() < 4e-3


@pytest.mark.parametrize("row", [row for row in STORED if row.startswith("comfy_quant")])
def test_values_are_those_of_neos_own_decode_in_fp32_and_bytes_those_that_it_stores(
    neo: Neo, row: str
) -> None:
    layer = STORED[row][1](neo)["layer"]
    stored, theirs = stored_weight(layer.weight, layer), layer.weight.to(torch.float32).dequantize()
    assert float((stored.dense() - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())
    parts = layer.weight.state_dict("weight").values()
    assert stored.nbytes == sum(part.nbytes for part in parts)


def test_an_embedding_in_fp8_is_read_and_has_a_branch(neo: Neo) -> None:
    tensor = neo.quants.QuantizedTensor.from_float(base(), "TensorCoreFP8E4M3Layout", **SCALED)
    text = json.dumps({"format": "float8_e4m3fn"}).encode()
    state = tensor.state_dict("weight") | {"comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}
    operations = neo.mixed.mixed_precision_ops(compute_dtype=torch.float32)
    with neo.operations.using_forge_operations(operations, CPU, torch.float32, True):
        layer = nn.Embedding(ROWS, COLUMNS)
    layer.load_state_dict(state)
    model, ids, one = model_of(layer), torch.tensor([5, 0, 383, 5]), lora(1, 1.0)
    assert stored_weight(layer.weight, layer).kind == "fp8-e4m3fn-scaled"
    with torch.inference_mode():
        before = layer(ids)
        with PatchSession(model) as session:
            session.apply([("file", read_adapters(one.named("layer")), 1.0)], "fp32")
            effect = layer(ids) - before
        assert torch.equal(layer(ids), before)
    assert float((effect.double() - one.delta[ids]).norm() / one.delta[ids].norm()) < 1e-5


@pytest.mark.parametrize("row", STORED)
def test_a_doras_norm_is_that_of_the_stored_weight(neo: Neo, row: str) -> None:
    """`W_eff = m · (W0 + Δ) / ‖W0 + Δ‖`, by row; W0 is read from the host's layer."""
    model = STORED[row][1](neo)
    layer = model["layer"]
    w0 = stored_weight(layer.weight, layer).dense(torch.float64)
    one = lora(1, 0.1 * float(w0.norm()))
    magnitude = (w0.norm(dim=1, keepdim=True) * (1 + 0.1 * noise(ROWS, 1, seed=5).abs())).float()
    tensors = one.named("layer") | {"layer.dora_scale": magnitude}
    changed = w0 + one.delta
    exact = magnitude.double() * changed / changed.norm(dim=1, keepdim=True) - w0
    with PatchSession(model) as session:
        session.apply([("file", read_adapters(tensors), 1.0)], "fp32")
        ((_, effective),) = session.effective().values()
        delta = effective.delta(torch.float32).double()
    assert float((delta - exact).norm() / exact.norm()) <= LAWS[torch.float32]


@pytest.mark.parametrize("row", [row for row in STORED if row.startswith("comfy_quant")])
def test_what_is_saved_is_loaded_by_neos_own_layer(neo: Neo, row: str) -> None:
    model, fresh = STORED[row][1](neo), STORED[row][1](neo)
    layer = model["layer"]
    w0 = stored_weight(layer.weight, layer).dense(torch.float64)
    one = lora(1, 0.5 * float(w0.norm()))
    with PatchSession(model) as session:
        session.apply([("file", read_adapters(one.named("layer")), 1.0)], "fp32")
        ((site, effective),) = session.effective().values()
        result = rounded("layer.weight", site, effective)
        state = model.state_dict()
        assert {f"layer.{key}" for key in result.entries} <= set(state)
    fresh.load_state_dict(state | {f"layer.{key}": value for key, value in result.entries.items()})
    loaded = stored_weight(fresh["layer"].weight, fresh["layer"]).dense(torch.float64)
    exact = w0 + one.delta
    assert float((loaded - exact).norm() / exact.norm()) <= (0.13 if "NVFP4" in row else 0.06)
    assert result.loss.cost == pytest.approx(float((loaded - exact).norm() / one.delta.norm()), rel=1e-3)
