"""LoRA files for the checkpoints of these tests, with what they do in float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tests.host.checkpoints import TEXT_LAYER, Checkpoint
from tests.host.webui import Host

LAYERS: Mapping[str, tuple[int, ...]] = {
    "diffusion_model.blocks.0.attn": (8, 8),
    "diffusion_model.blocks.1.mlp": (8, 8),
    "diffusion_model.low": (8, 8),
    "diffusion_model.input_blocks.0.0": (4, 4, 3, 3),
    TEXT_LAYER: (8, 4),
}
"""Module → the shape of its weight."""

Delta = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class LoraFile:
    """tensors: as in the file; deltas: ΔW at strength 1 in float64, by parameter name."""

    name: str
    tensors: Mapping[str, Tensor]
    deltas: Delta

    def write(self, host: Host) -> Path:
        """Into the host's LoRA folder; a newer version under the same name gets a newer date."""
        path = host.lora_dir / f"{self.name}.safetensors"
        newer = path.stat().st_mtime_ns + 10**9 if path.exists() else None
        safetensors.torch.save_file(dict(self.tensors), path)
        if newer is not None:
            os.utime(path, ns=(newer, newer))
        return path

    def with_tensors(self, change: Callable[[dict[str, Tensor]], None]) -> LoraFile:
        """Another content under the same name; what it does is then not known."""
        tensors = dict(self.tensors)
        change(tensors)
        return replace(self, tensors=tensors, deltas={})


@dataclass(frozen=True)
class Active:
    """A LoRA at the strengths of a prompt."""

    file: LoraFile
    unet: float = 1.0
    te: float | None = None

    @property
    def text_strength(self) -> float:
        return self.unet if self.te is None else self.te


def file_key(module: str) -> str:
    """A module's name in kohya's files."""
    if module == TEXT_LAYER:
        return "lora_te_" + module.removeprefix("clip_l.transformer.").replace(".", "_")
    return "lora_unet_" + module.removeprefix("diffusion_model.").replace(".", "_")


def values(*shape: int, seed: int = 5) -> Tensor:
    """Random numbers, about as large as the checkpoints' weights."""
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_lora(
    name: str, seed: int = 0, rank: int = 2, modules: Sequence[str] = tuple(LAYERS), size: float = 0.6
) -> LoraFile:
    """A LoRA on these layers. size: the norm of each ΔW."""
    generator = torch.Generator().manual_seed(seed + 1)
    tensors, deltas = {}, {}
    for module in modules:
        rows, *columns = LAYERS[module]
        ones = [1] * (len(columns) - 1)
        up = torch.randn(rows, rank, *ones, generator=generator)
        down = torch.randn(rank, *columns, generator=generator)
        down *= size / torch.linalg.matrix_norm(up.flatten(1) @ down.flatten(1)) * 2
        tensors[f"{file_key(module)}.lora_up.weight"] = up
        tensors[f"{file_key(module)}.lora_down.weight"] = down
        tensors[f"{file_key(module)}.alpha"] = torch.tensor(rank / 2)
        delta = 0.5 * up.double().flatten(1) @ down.double().flatten(1)
        deltas[f"{module}.weight"] = delta.reshape(rows, *columns)
    return LoraFile(name, tensors, deltas)


def with_loha(lora: LoraFile, module: str = "diffusion_model.blocks.0.attn") -> LoraFile:
    """The same file with a LoHa on one layer, a kind that goes the host's own way: ΔW = ½ (A B) ∘ (A B)."""
    key = file_key(module)
    tensors = dict(lora.tensors)
    up, down = tensors.pop(f"{key}.lora_up.weight"), tensors.pop(f"{key}.lora_down.weight")
    for index in (1, 2):
        tensors |= {f"{key}.hada_w{index}_a": up.clone(), f"{key}.hada_w{index}_b": down.clone()}
    delta = 0.5 * (up.double() @ down.double()).square()
    return LoraFile(lora.name, tensors, {**lora.deltas, f"{module}.weight": delta})


def prompt(text: str, *active: Active) -> str:
    """A prompt that asks for these LoRAs."""
    parts = [f"<lora:{lora.file.name}:{lora.text_strength!r}:{lora.unet!r}>" for lora in active]
    return text + "".join(parts)


Stored = Callable[[Tensor, torch.dtype, str], Tensor]
"""Rounds a weight to a type; given its name, by which a host may decide."""


def nearest(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """As `Stored`: one rounding to the nearest value."""
    return weight.to(dtype)


def exact_weights(
    checkpoint: Checkpoint, active: Sequence[Active], stored: bool | Stored = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by name in float64, merged in order: of the model, of the text encoder.

    stored: each rounded to the type in which the host keeps that weight: True as after the host's own merge.
    """
    unet: dict[str, Tensor] = {}
    te: dict[str, Tensor] = {}
    for lora in active:
        for name, delta in lora.file.deltas.items():
            weights, strength = (te, lora.text_strength) if name.startswith("clip_l.") else (unet, lora.unet)
            weights[name] = weights.get(name, checkpoint.weight(name)) + strength * delta
    if stored:
        rounded = checkpoint.host.contract.stored if stored is True else stored
        for name, weight in unet.items():
            dtype = torch.float8_e4m3fn if ".low." in name else torch.float32
            unet[name] = rounded(weight.float(), dtype, name).double()  # type: ignore[operator]
    return unet, te


def exact_output(
    checkpoint: Checkpoint, text: str, active: Sequence[Active] = (), stored: bool | Stored = False
) -> Tensor:
    """What the checkpoint computes with these LoRAs, in float64."""
    return checkpoint.exact(text, *exact_weights(checkpoint, active, stored))
