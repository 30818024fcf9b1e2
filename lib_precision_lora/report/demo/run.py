"""The demo: writes the files, measures every stored weight, gathers the result."""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter

from safetensors.torch import save_file

from lib_precision_lora.branch import Compute
from lib_precision_lora.report.demo.files import FORMATS
from lib_precision_lora.report.demo.measure import delta_ratio, measure
from lib_precision_lora.report.demo.result import LIMITS, DemoResult
from lib_precision_lora.report.demo.weights import RANK, DemoShape, base_weights, lora_weights


def run_demo(shape: DemoShape, compute: Compute = "auto") -> DemoResult:
    """Makes a checkpoint per stored weight and a LoRA in a temporary folder, and measures them from there."""
    start = perf_counter()
    with tempfile.TemporaryDirectory(prefix="precision-lora-demo-") as folder:
        weights = base_weights(shape)
        lora = Path(folder, "lora.safetensors")
        save_file(lora_weights(weights), lora)
        checkpoints = {name: Path(folder, f"base-{name}{file.suffix}") for name, file in FORMATS.items()}
        for name, path in checkpoints.items():
            FORMATS[name].write(weights, path)
        ratio = delta_ratio(checkpoints["bf16"], lora)
        rows = [measure(name, path, lora, shape.tokens, compute) for name, path in checkpoints.items()]
    return DemoResult(
        hidden=shape.hidden,
        blocks=shape.blocks,
        tokens=shape.tokens,
        parameters=shape.parameters,
        rank=RANK,
        delta_ratio=ratio,
        compute=compute,
        limit=LIMITS[compute],
        seconds=perf_counter() - start,
        rows=tuple(rows),
    )
