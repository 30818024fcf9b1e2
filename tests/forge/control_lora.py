"""A control LoRA for the small Flux in the names of BFL's files, and what it makes of the model in float64.

Every matrix has a LoRA, with a bias where the layer has one, the input layer's for twice its channels; the
scales of the norms of queries and keys are given as new values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lib_precision_lora.storage import stored_weight
from tests.tiny import values

RANK = 4
RATIO = 0.02
"""‖Δ‖ / ‖W‖ of a layer."""

LATENT, CONTROL = (1, 16, 8, 8), (1, 16, 8, 8)


def make_file(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """model: the diffusion model, in any stored format."""
    generator = torch.Generator().manual_seed(seed)
    file = {}
    parameters = dict(model.named_parameters())
    for name, parameter in sorted(parameters.items()):
        if name.endswith("_norm.scale"):
            file[name] = 1.0 + 0.2 * torch.randn(parameter.shape, generator=generator)
        if not name.endswith(".weight"):
            continue
        key, path = name.removesuffix(".weight"), name.rpartition(".")[0]
        weight = stored_weight(parameter, model.get_submodule(path)).dense(torch.float32)
        out, columns = weight.shape
        columns = 2 * columns if key == "img_in" else columns
        size = RATIO * float(weight.std()) / math.sqrt(RANK)
        file[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        file[f"{key}.lora_B.weight"] = size * torch.randn(out, RANK, generator=generator)
        if f"{key}.bias" in parameters:
            file[f"{key}.lora_B.bias"] = 0.02 * torch.randn(out, generator=generator)
    return file


def merge(file: Mapping[str, Tensor], strength: float, model: nn.Module) -> None:
    """Merge the file into a dense fp32 diffusion model, sums in float64; its input layer is wider then."""
    for key in [key.removesuffix(".lora_A.weight") for key in file if key.endswith(".lora_A.weight")]:
        layer = model.get_submodule(key)
        delta = strength * file[f"{key}.lora_B.weight"].double() @ file[f"{key}.lora_A.weight"].double()
        merged = torch.zeros_like(delta)
        merged[:, : layer.weight.shape[1]] = layer.weight.data.double()
        layer.weight.data = (merged + delta).float()
        if f"{key}.lora_B.bias" in file:
            bias = layer.bias.data.double() + strength * file[f"{key}.lora_B.bias"].double()
            layer.bias.data = bias.float()
    for name, value in file.items():
        if name.endswith("_norm.scale"):
            model.get_parameter(name).data = value.clone()


def sample(model: Any, control: Tensor | None) -> Tensor:
    """The output of the host's wrapper, called as by a sampler; control: an image's latent (`c_concat`)."""
    from backend.modules.k_prediction import PredictionFlux

    model.predictor = PredictionFlux(mu=1.0)
    with torch.inference_mode():
        return model.apply_model(
            values(*LATENT),
            torch.tensor([0.7]),
            c_concat=control,
            c_crossattn=values(1, 6, 256),
            y=values(1, 256),
            guidance=torch.tensor([3.5]),
        ).double()
