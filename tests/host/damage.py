"""LoRA files that cannot be applied, by what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tests.host.lora_files import LoraFile, make_lora
from tests.host.webui import Host

Tensors = dict[str, Tensor]
LAYER = "lora_unet_blocks_0_attn"


def written(change: Callable[[Tensors], None]) -> Callable[[Host, str], Path]:
    """A file with damaged tensors."""
    return lambda host, name: make_lora(name).with_tensors(change).write(host)


def bytes_of(change: Callable[[bytes], bytes]) -> Callable[[Host, str], Path]:
    """A file with damaged bytes."""

    def write(host: Host, name: str) -> Path:
        path = make_lora(name).write(host)
        path.write_bytes(change(path.read_bytes()))
        return path

    return write


def fill(tensors: Tensors, key: str, value: float) -> None:
    damaged = tensors[key].clone()
    damaged.view(-1)[3] = value
    tensors[key] = damaged


def without(half: str) -> Callable[[Tensors], None]:
    def remove(tensors: Tensors) -> None:
        del tensors[f"{LAYER}.{half}.weight"]

    return remove


def other_architecture(tensors: Tensors) -> None:
    for key in list(tensors):
        tensors[key.replace("lora_", "lora_unet_double_blocks_7_")] = tensors.pop(key)


def mixed_architectures(tensors: Tensors) -> None:
    tensors["lora_unet_double_blocks_7_img_mod_lin.lora_up.weight"] = torch.randn(8, 2)
    tensors["lora_unet_double_blocks_7_img_mod_lin.lora_down.weight"] = torch.randn(2, 8)


def other_width(tensors: Tensors) -> None:
    tensors[f"{LAYER}.lora_down.weight"] = torch.randn(2, 9)


def zero_rank(tensors: Tensors) -> None:
    tensors[f"{LAYER}.lora_up.weight"] = torch.empty(8, 0)
    tensors[f"{LAYER}.lora_down.weight"] = torch.empty(0, 8)


def other_ranks(tensors: Tensors) -> None:
    tensors[f"{LAYER}.lora_down.weight"] = torch.randn(3, 8)


def wrong_diff(tensors: Tensors) -> None:
    tensors["lora_unet_blocks_1_attn.diff"] = torch.randn(8, 9)


def no_matrix(tensors: Tensors) -> None:
    tensors[f"{LAYER}.lora_up.weight"] = torch.tensor(1.0)


def integers(tensors: Tensors) -> None:
    tensors[f"{LAYER}.lora_up.weight"] = torch.ones(8, 2, dtype=torch.int64)


def nan_in_a_loha(tensors: Tensors) -> None:
    for index in (1, 2):
        tensors[f"lora_unet_blocks_1_attn.hada_w{index}_a"] = torch.randn(8, 2)
        tensors[f"lora_unet_blocks_1_attn.hada_w{index}_b"] = torch.full((2, 8), torch.nan)


def half_a_loha(tensors: Tensors) -> None:
    tensors["lora_unet_blocks_1_attn.hada_w1_a"] = torch.randn(8, 2)


def alpha_of_two_numbers(tensors: Tensors) -> None:
    tensors[f"{LAYER}.alpha"] = torch.ones(2)


DAMAGE: Mapping[str, tuple[Callable[[Host, str], Path], str]] = {
    "other architecture": (written(other_architecture), "another model"),
    "mixed architectures": (
        written(mixed_architectures),
        "mixes architectures: 2 of its .* are of Flux or Chroma .* fit the SD 1.5 or SDXL",
    ),
    "wrong width": (written(other_width), "another model"),
    "wrong shape of a diff": (written(wrong_diff), "another model"),
    "NaN": (written(lambda tensors: fill(tensors, f"{LAYER}.lora_up.weight", torch.nan)), "NaN"),
    "inf": (written(lambda tensors: fill(tensors, f"{LAYER}.lora_down.weight", torch.inf)), "inf"),
    "NaN in the text encoder": (
        written(
            lambda tensors: fill(
                tensors, next(key for key in tensors if "lora_te" in key and "up" in key), torch.nan
            )
        ),
        "NaN",
    ),
    "alpha NaN": (
        written(lambda tensors: tensors.update({f"{LAYER}.alpha": torch.tensor(torch.nan)})),
        "alpha",
    ),
    "alpha of two numbers": (written(alpha_of_two_numbers), "alpha"),
    "zero rank": (written(zero_rank), "rank is zero|cannot be read"),
    "different ranks": (written(other_ranks), "rank"),
    "no matrix": (written(no_matrix), "matrices"),
    "integers": (written(integers), "float"),
    "missing up": (
        written(without("lora_up")),
        "lora_up is missing",
    ),
    "missing down": (
        written(without("lora_down")),
        "lora_down is missing",
    ),
    "NaN in a LoHa": (written(nan_in_a_loha), "NaN"),
    "half a LoHa": (written(half_a_loha), "hada_w"),
    "no tensors": (bytes_of(lambda _: safetensors.torch.save({})), "no tensors"),
    "truncated": (bytes_of(lambda content: content[: len(content) // 2]), "truncated: .* download it again"),
    "truncated in its header": (bytes_of(lambda content: content[:20]), "truncated: .* download it again"),
    "empty": (bytes_of(lambda _: b""), "download or copy it again"),
    "not a safetensors file": (
        bytes_of(lambda _: b"<!DOCTYPE html>" * 99),
        "a web page.* download the file itself",
    ),
    "another kind of file": (
        bytes_of(lambda _: b"%PDF-1.7" * 99),
        "neither a safetensors .* download or copy",
    ),
}
"""What is wrong → (how to write such a file, what the message says about it, a regular expression).

The safetensors that the host pins (0.4.2) cannot read a tensor without elements."""


def cats_and_dogs(host: Host) -> tuple[LoraFile, LoraFile]:
    """Two good files."""
    files = make_lora("cats"), make_lora("dogs", seed=1)
    for file in files:
        file.write(host)
    return files
