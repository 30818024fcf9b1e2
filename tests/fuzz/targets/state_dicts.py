"""State dicts of LoRAs of every family: read, attached to a small model, run, taken off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

import lib_precision_lora.report.demo.quiet_bitsandbytes  # noqa: F401  before tests import it
from lib_precision_lora.adapters import AdapterError, read_adapters
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.plain_text import sentence
from tests.branch.hosts import IDS, IMAGE, SHAPES, Mixed, hooks_of, image_of
from tests.families import FAMILIES, INPUT_ROTATIONS, family
from tests.fuzz.target import Check, Fault, Input, Target
from tests.fuzz.targets.safetensors import METADATA, configuration
from tests.fuzz.tensors import Tensors, change
from tests.fuzz.texts import check_said

LAYERS = ("linear", "linear", "second", "conv", "embedding")
SQUARE = ("linear", "second")
NORMS, NORM_ROLES = ("norm", "rms", "groups"), ("diff", "w_norm", "b_norm", "diff_b", "set_weight")
PREFIXES = ("diffusion_model.", "lora_unet_", "base_model.model.")
TAME = 1e4
"""A file whose numbers are all smaller changes this model's layers by numbers within fp32."""

STRENGTHS = (
    *(1.0, 0.8, -0.5, 0.0, 2.0, 1e4, -1e4, 1e-30, 1e30, -1e30, 3.4e38, 1e39, 1e300, -1e300),
    *(float("nan"), float("inf"), -float("inf")),
)


def make(random: Random) -> Input:
    tensors: Tensors = {}
    for _ in range(random.choice((1, 1, 2, 3))):
        if random.random() < 0.1:
            norm, role = random.choice(NORMS), random.choice(NORM_ROLES)
            tensors[f"{norm}.{role}"] = torch.ones(4 if norm == "groups" else 12)
            continue
        layer = random.choice(LAYERS)
        names = [name for name in FAMILIES if layer in SQUARE or name not in INPUT_ROTATIONS]
        part = _family(random.choice(names), layer)
        tensors |= {f"{layer}.{role}": tensor for role, tensor in part.items()}
    for _ in range(random.choice((0, 1, 1, 1, 2, 2, 3, 5))):
        change(random, tensors)
    metadata = {}
    if random.random() < 0.3:
        metadata = {random.choice(METADATA): configuration(random) for _ in range(random.randint(1, 3))}
    prefix = random.choice(("", "", "", *PREFIXES))
    return Input(
        rest={
            "tensors": {prefix + key: tensor for key, tensor in tensors.items()},
            "metadata": metadata,
            "mapped": bool(prefix),
            "strength": random.choice(STRENGTHS if random.random() < 0.3 else STRENGTHS[:6]),
            "compute": random.choice(("auto", "fp16", "fp32")),
            "dense": random.choice(("branch", "branch", "auto", "merge")),
            "dtype": random.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
            "times": random.choice((1, 1, 1, 2)),
        }
    )


@cache
def _family(name: str, layer: str) -> dict[str, Tensor]:
    return family(name, SHAPES[f"{layer}.weight"]).tensors


def _key_map() -> dict[str, Any]:
    """As a host makes it: whole parameters, some rows of one, under several names."""
    weights = [name for name in SHAPES if name.endswith((".weight", ".scale"))]
    found: dict[str, Any] = {
        prefix + name.rpartition(".")[0]: name for prefix in PREFIXES for name in weights
    }
    found["lora_unet_second"] = "second.weight", (0, 2, 8)
    found["diffusion_model.norm"] = "nowhere.weight"
    return found


@contextmanager
def opened(folder: Path) -> Iterator[Check]:
    models = {dtype: Mixed().to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    bases = {dtype: image_of(model) for dtype, model in models.items()}
    outputs = {dtype: model(IDS, IMAGE.to(dtype)) for dtype, model in models.items()}
    key_map = _key_map()

    def check(given: Input) -> bool:
        asked = given.rest
        dtype, model = asked["dtype"], models[asked["dtype"]]
        session = PatchSession(model)
        try:
            adapters = read_adapters(
                asked["tensors"], key_map if asked["mapped"] else None, metadata=asked["metadata"]
            )
            for finding in adapters.findings:
                check_said(sentence(finding), folder)
            items = [("lora", adapters, asked["strength"])] * asked["times"]
            session.apply(items, asked["compute"], asked["dense"])
            y = model(IDS, IMAGE.to(dtype))
            accepted = True
        except AdapterError as error:
            check_said(sentence(error), folder)
            accepted = False
        finally:
            session.clear()
        if accepted and dtype != torch.float16 and _tame(asked) and not torch.isfinite(y).all():
            raise Fault("numbers within fp32 make NaN or inf")
        if image_of(model) != bases[dtype] or hooks_of(model):
            raise Fault("the model is not what it was")
        if not torch.equal(model(IDS, IMAGE.to(dtype)), outputs[dtype]):
            raise Fault("the model does not compute what it did")
        return accepted

    yield check


def _tame(asked: dict[str, Any]) -> bool:
    """Whether all numbers are small, so that whatever is accepted must give finite ones."""
    return (
        abs(asked["strength"]) <= TAME
        and not asked["metadata"]
        and all(
            not tensor.numel() or bool((tensor.double().abs() <= TAME).all())
            for tensor in asked["tensors"].values()
            if not tensor.dtype.is_complex
        )
    )


TARGET = Target("state_dicts", make, opened)
