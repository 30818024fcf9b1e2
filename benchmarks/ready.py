"""From files in the page cache to a model that is ready to run, stage by stage: a rank-16 LoRA of Flux.

    OMP_NUM_THREADS=1 python -m benchmarks.ready [--files 1 --files 8 --blocks 19 --rounds 3] [--json]

    bytes        the files read into memory and nothing more: what the other stages are told by
    read         `containers.read_lora`
    match        the model's names, and the file's layers found among them
    plan         what each layer's branch will take, from shapes
    attach       a branch at every layer
    place        its factors where a forward expects them
    strengths    another strength of every file: plan, attach and place
    one removed  of several files, the same
    all removed  the same with none

Layers have true shapes and weights of one row that stands for all. With one thread times are those of this
process; ratios to `bytes` compare machines. Rounds of all numbers of files take turns, each with another
session; the first round is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.flux_layers import Linear
from benchmarks.forward import where
from benchmarks.interleave import CPU, machine_device, now
from lib_precision_lora.containers import read_lora
from lib_precision_lora.host.loras.hosted import HostedSession
from lib_precision_lora.host.loras.matching import key_map_of, match_file
from lib_precision_lora.host.page.settings import Arithmetic
from tests.memory.checkpoints import flux

RANK = 16
ROOT = "diffusion_model"
START = ("read", "match", "plan", "attach", "place")
"""From files to a model that runs."""

STAGES = ("bytes", *START, "read to place", "strengths", "one removed", "all removed")
Shapes = Mapping[str, tuple[int, ...]]
Stages = dict[str, float]
"""Milliseconds."""


def changed_layers(blocks: int, hidden: int = 3072) -> Shapes:
    """The matrices of this many double blocks and twice as many single ones, by their names."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in flux(hidden=hidden, double=blocks, single=2 * blocks).items()
        if "blocks." in name and len(shape) == 2
    }


def model_of(shapes: Shapes) -> nn.Module:
    """A model with these layers, as the host's wrapper has it."""
    root = nn.Module()
    for name, (rows, columns) in shapes.items():
        *owners, last = f"{ROOT}.{name}".split(".")
        owner = root
        for part in owners:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, Linear(rows, columns, CPU))
    return root


def write_file(path: Path, shapes: Shapes, seed: int) -> None:
    """In bf16, in kohya's names."""
    random = torch.Generator().manual_seed(seed)

    def factor(*shape: int) -> Tensor:
        return (0.01 * (torch.rand(shape, generator=random) - 0.5)).to(torch.bfloat16)

    tensors = {}
    for name, (rows, columns) in shapes.items():
        layer = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{layer}.lora_up.weight"] = factor(rows, RANK)
        tensors[f"{layer}.lora_down.weight"] = factor(RANK, columns)
        tensors[f"{layer}.alpha"] = torch.tensor(float(RANK))
    save_file(tensors, path)


def one_round(paths: Sequence[Path], shapes: Shapes, device: torch.device) -> Stages:
    """Every stage once, with a model and a session of its own."""
    root = model_of(shapes)
    names = {f"lora_unet_{name.replace('.', '_')}": f"{ROOT}.{name}.weight" for name in shapes}
    stages: Stages = {}

    def staged(name: str, run: Callable[[], Any]) -> Any:
        clock = now if device == CPU else time.perf_counter
        start = clock()
        result = run()
        if device != CPU:
            torch.cuda.synchronize(device)  # after the stage; nothing waits inside of it
        stages[name] = stages.get(name, 0.0) + 1e3 * (clock() - start)
        return result

    def match() -> list[Any]:
        keys = key_map_of(root, names)
        return [match_file(p.name, c, keys, None, _left) for p, c in zip(paths, contents, strict=True)]

    staged("bytes", lambda: [len(path.read_bytes()) for path in paths])
    contents = staged("read", lambda: [read_lora(path) for path in paths])
    matches = staged("match", match)
    assert all(len(found.unet) == len(shapes) for found in matches)
    session, dtype = HostedSession(root), torch.bfloat16

    def bring(strengths: Sequence[float], kept: Sequence[int], stages: Sequence[str]) -> None:
        """stages: under which names planning, attaching and placing count."""
        patches = {
            (paths[n].name, strengths[n], 1.0, False): {
                key: [[strengths[n], patch, 1.0, None, None]] for key, patch in matches[n].unet.items()
            }
            for n in kept
        }
        plan, attach, place = stages
        staged(plan, lambda: session.footprints(root, patches, Arithmetic(), device, dtype))
        problems = staged(attach, lambda: session.follow(root, patches, Arithmetic(), _nothing))
        assert not problems, problems
        staged(place, lambda: session.place(device, dtype, None))

    every = range(len(paths))
    bring([1.0] * len(paths), every, ("plan", "attach", "place"))
    changed = [0.5 + 0.01 * n for n in every]
    bring(changed, every, ["strengths"] * 3)
    if len(paths) > 1:
        bring(changed, [n for n in every if n != len(paths) // 2], ["one removed"] * 3)
    bring(changed, (), ["all removed"] * 3)
    return stages


def _left(rest: Mapping[str, Tensor], keys: object) -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """A host that understands nothing of what is left."""
    return {}, dict(rest)


def _nothing(theirs: object) -> None:
    """What the host merges of nothing."""


def measure(
    counts: Sequence[int], shapes: Shapes, rounds: int, device: torch.device
) -> dict[int, dict[str, float]]:
    """Medians in milliseconds, by number of files and stage."""
    found: dict[int, list[Stages]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{n}.safetensors") for n in range(max(counts))]
        for seed, path in enumerate(paths):
            write_file(path, shapes, seed)
        for _ in range(1 + rounds):
            for count in counts:
                found[count].append(one_round(paths[:count], shapes, device))
    return {
        count: {stage: statistics.median(each[stage] for each in all_rounds[1:]) for stage in all_rounds[0]}
        for count, all_rounds in found.items()
    }


def markdown(found: Mapping[int, Mapping[str, float]]) -> str:
    """Milliseconds, and times what reading the bytes takes."""
    heads = " | ".join(f"{count} file{'s' * (count > 1)}, ms | of bytes" for count in found)
    lines = [f"| stage | {heads} |", f"|---|{'---:|---:|' * len(found)}"]
    rows = {
        count: {**stages, "read to place": sum(stages[name] for name in START)}
        for count, stages in found.items()
    }
    for stage in (stage for stage in STAGES if any(stage in stages for stages in rows.values())):
        cells = [
            f"{stages[stage]:.1f} | {stages[stage] / stages['bytes']:.2f}×" if stage in stages else " | "
            for stages in rows.values()
        ]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.ready",
        description="What it takes from rank-16 LoRA files of Flux to a model that is ready to run, and to "
        "change their strengths or take them off.",
    )
    top.add_argument("--files", type=int, action="append", help="repeatable (default: 1, 8)")
    top.add_argument("--blocks", type=int, default=19, help="double ones, and twice as many single ones")
    top.add_argument("--rounds", type=int, default=3, help="that are counted (default: %(default)s)")
    top.add_argument("--json", action="store_true", help="milliseconds, as one JSON object")
    options = top.parse_args(arguments)
    counts = options.files or [1, 8]
    if min([options.blocks, options.rounds, *counts]) < 1:
        top.error("files, blocks and rounds must be at least 1")
    device = machine_device()
    shapes = changed_layers(options.blocks)
    found = measure(counts, shapes, options.rounds, device)
    if options.json:
        result = {"machine": where(device), "layers": len(shapes), "milliseconds": found}
        sys.stdout.write(f"{json.dumps(result, indent=2)}\n")
    else:
        sys.stdout.write(f"{len(shapes)} layers, rank {RANK}, bf16. {where(device)}.\n\n{markdown(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
