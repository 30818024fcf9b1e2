"""Run in a process of its own by `test_gguf_baked`: Forge's real GGUF classes and Forge's own gguf copy."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import gguf
import torch
from backend.operations_gguf import ParameterGGUF

from lib_precision_lora.storage import stored_weight

# How far Forge's decode, rounded to its compute type, may lie from the fp32 decode, in units of eps.
ROUNDINGS = 4


def forge_parameter(case: dict[str, Any], compute: torch.dtype) -> Any:
    kind = gguf.GGMLQuantizationType(case["type"])
    tensor = SimpleNamespace(
        tensor_type=kind, data=case["data"].numpy(), shape=list(case["expected"].shape)[::-1]
    )
    parameter = ParameterGGUF(tensor)
    parameter.computation_dtype = compute
    return parameter


def check(name: str, case: dict[str, Any], compute: torch.dtype) -> None:
    expected = case["expected"]
    parameter = forge_parameter(case, compute)
    assert torch.equal(stored_weight(parameter).dense(), expected), "standard layout"
    parameter.gguf_cls.bake(parameter)
    stored = parameter.data.clone()
    weight = stored_weight(parameter)
    baked = weight.dense()
    forge = parameter.gguf_cls.dequantize_pytorch(parameter).view(expected.shape)
    bound = ROUNDINGS * torch.finfo(compute).eps * expected.abs().max() * (2 if "_K" in name else 1)
    assert weight.shape == tuple(expected.shape), "shape"
    assert (baked - forge.float()).abs().max() <= bound, "Forge's own decode"
    if compute == torch.float16 and name != "Q4_K":
        assert torch.equal(baked, expected), "fp16 baking is exact"
    assert torch.equal(torch.cat([weight.rows(0, 5), weight.rows(5, 12)]), baked), "rows"
    moved = parameter.to("cpu")
    assert torch.equal(stored_weight(moved).dense(), baked), "a moved parameter"
    assert torch.equal(parameter.data, stored), "nothing written"
    sys.stderr.write(f"read {name} {compute}\n")


def main(path: str) -> None:
    assert os.path.realpath(gguf.__file__).startswith(os.path.realpath(os.environ["FORGE_ROOT"]))
    for name, case in torch.load(path).items():
        for compute in (torch.float16, torch.bfloat16):
            check(name, case, compute)


main(sys.argv[1])
