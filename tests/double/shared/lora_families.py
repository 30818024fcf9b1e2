"""LoRA files: the layers' names in them, their layouts, and what each family does to a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PAIRS = (
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
)
LOHA = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")
LOKR = (".lokr_w1", ".lokr_w2")


def read_patches(
    lora: Mapping[str, Tensor], to_load: Mapping[str, Any], value: Callable[[str, tuple[Any, ...]], Any]
) -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """Patches by target, and the tensors that went into none; a missing half is a KeyError.

    value: what the host makes of a family's name and content.
    """
    patches: dict[Any, Any] = {}
    used: set[str] = set()

    def take(key: str) -> Tensor:
        used.add(key)
        return lora[key]

    for name, target in to_load.items():
        alpha = take(f"{name}.alpha").item() if f"{name}.alpha" in lora else None
        magnitude = take(f"{name}.dora_scale") if f"{name}.dora_scale" in lora else None
        for up, down in PAIRS:
            if name + up in lora:
                content: tuple[Any, ...] = (take(name + up), take(name + down), alpha, None, magnitude)
                patches[target] = value("lora", content)
        if name + LOHA[0] in lora:
            first_up, first_down, second_up, second_down = (take(name + key) for key in LOHA)
            content = (first_up, first_down, alpha, second_up, second_down, None, None, magnitude)
            patches[target] = value("loha", content)
        if name + LOKR[0] in lora:
            first, second = (take(name + key) for key in LOKR)
            patches[target] = value("lokr", (first, second, alpha, None, None, None, None, None, magnitude))
        if f"{name}.diff" in lora:
            patches[target] = ("diff", (take(f"{name}.diff"),))
        if f"{name}.diff_b" in lora:
            patches[target.removesuffix(".weight") + ".bias"] = ("diff", (take(f"{name}.diff_b"),))
        if f"{name}.set_weight" in lora:
            patches[target] = ("set", (take(f"{name}.set_weight"),))
    return patches, {key: tensor for key, tensor in lora.items() if key not in used}


def model_lora_keys_clip(model: nn.Module, key_map: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006
    """The default is shared by all calls and leaks from one model to the next, as the hosts' does."""
    for key in model.state_dict():
        layer = key.removesuffix(".weight")
        if key != layer and key.startswith("clip_l.transformer.text_model.encoder.layers."):
            name = layer.removeprefix("clip_l.transformer.")
            key_map[f"lora_te_{name.replace('.', '_')}"] = key
            key_map[f"lora_te1_{name.replace('.', '_')}"] = key
            key_map[f"text_encoder.{name}"] = key
    return key_map


def model_lora_keys_unet(model: nn.Module, key_map: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006
    """As `model_lora_keys_clip`."""
    for key in model.state_dict():
        layer = key.removesuffix(".weight")
        if key.startswith("diffusion_model."):
            key_map[layer] = key
            if key != layer:
                key_map[f"lora_unet_{layer.removeprefix('diffusion_model.').replace('.', '_')}"] = key
    return key_map


def _lora(content: Any, weight: Tensor) -> tuple[Tensor, float, Tensor | None]:
    up, down, alpha, _, magnitude = content
    delta = up.to(weight).flatten(1) @ down.to(weight).flatten(1)
    return delta, 1.0 if alpha is None else alpha / down.shape[0], magnitude


def _loha(content: Any, weight: Tensor) -> tuple[Tensor, float, Tensor | None]:
    first_up, first_down, alpha, second_up, second_down, _, _, magnitude = content
    delta = (first_up.to(weight) @ first_down.to(weight)) * (second_up.to(weight) @ second_down.to(weight))
    return delta, 1.0 if alpha is None else alpha / first_down.shape[0], magnitude


def _lokr(content: Any, weight: Tensor) -> tuple[Tensor, float, Tensor | None]:
    first, second, *_, magnitude = content
    return torch.kron(first.to(weight), second.to(weight)), 1.0, magnitude


DELTAS = {"lora": _lora, "loha": _loha, "lokr": _lokr}
"""Family → (ΔW, its scale, a DoRA's magnitude)."""


def decomposed(weight: Tensor, delta: Tensor, strength: float, magnitude: Tensor) -> Tensor:
    """A DoRA on outputs, by the norm of the base alone, at this strength; in place."""
    merged = weight + delta
    norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    weight += strength * (merged * (magnitude.to(weight).reshape(norm.shape) / norm) - weight)
    return weight
