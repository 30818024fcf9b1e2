"""A small Flux of the host's own class, stored as the host stores low-bit checkpoints, computing in fp32.

Every matrix that a checkpoint of that format would quantize is quantized; the rest stays fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.forge.real_forge import Forge
from tests.forge.tiny_models import FLUX_SIZES, diffusion
from tests.tiny import Run, Tiny, random_state, values

SIZES = {
    **FLUX_SIZES,
    "in_channels": 16,
    "vec_in_dim": 256,
    "context_in_dim": 256,
    "hidden_size": 256,
    "axes_dim": [16, 56, 56],
}
GGUF_TYPES = ("Q8_0", "Q4_0", "Q5_0", "Q4_K")
FORMATS = ("FP8", "FP8 scaled", "NF4", *GGUF_TYPES)
LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max

State = dict[str, Any]


def run(model: Any) -> Tensor:
    """The output for an input that is always the same."""
    with torch.inference_mode():
        return model.diffusion_model(
            values(1, 16, 8, 8),
            torch.tensor([0.7]),
            values(1, 6, 256),
            values(1, 256),
            guidance=torch.tensor([3.5]),
        ).double()


def stored(forge: Forge, kind: str) -> Tiny:
    """The model as the host holds it after loading a checkpoint of this format, not yet placed."""
    state = random_state(flux_of(SIZES))
    if kind.startswith("FP8"):
        state = with_scales(state) if kind == "FP8 scaled" else state
        return load(forge, state, run, dtype=torch.float8_e4m3fn, manual_cast_enabled=True)
    if kind == "NF4":
        return load(forge, as_nf4(state), run, bnb_dtype="nf4")
    return load(forge, as_gguf(state, kind), run, bnb_dtype="gguf")


def dense(forge: Forge, like: Tiny) -> Tiny:
    """The same model over fp32 weights: the values with which the forward of `like` computes."""
    parameters = dict(like.model.diffusion_model.named_parameters())
    state = {name: values_of(parameter) for name, parameter in parameters.items()}
    for name in [name for name in state if name.endswith(".scale_weight")]:
        weight = name.replace(".scale_weight", ".weight")
        state[weight] = state[weight] * state.pop(name)
    return load(forge, state, run)


def load(forge: Forge, state: State, run: Run, dtype: torch.dtype = torch.float32, **operations: Any) -> Tiny:
    """The model over the host's operations, as its loader makes it; a packed format computes in fp32."""
    with forge.operations.using_forge_operations(device=torch.device("cpu"), dtype=dtype, **operations):
        model = flux_of(SIZES)
        if "bnb_dtype" not in operations:
            model = model.to(dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing
    assert all(".weight." in name for name in unexpected)
    model.config = dict(SIZES)
    return diffusion(forge, model, "black-forest-labs/FLUX.1-dev", run)


def flux_of(sizes: Mapping[str, Any]) -> Any:
    from backend.nn.flux import IntegratedFluxTransformer2DModel

    return IntegratedFluxTransformer2DModel(**sizes)


def with_scales(state: Mapping[str, Tensor]) -> State:
    """Matrices divided by a scale of their own, which stands beside each, to use all of FP8's range."""
    scaled: State = dict(state)
    for name, value in state.items():
        if value.ndim == 2:
            scale = value.abs().max() / LARGEST_FP8
            scaled[name], scaled[name.replace(".weight", ".scale_weight")] = value / scale, scale
    return scaled


def as_gguf(state: Mapping[str, Tensor], kind: str) -> State:
    """The tensors as the host reads them from a `.gguf` file: its parameters, over blocks of the file."""
    import gguf
    from backend.operations_gguf import ParameterGGUF

    def parameter(value: Tensor) -> Any:
        packed, name = value.numpy(), "F32"
        if is_quantized(value):
            packed, name = pack(packed, kind), kind
        return ParameterGGUF(
            SimpleNamespace(
                tensor_type=gguf.GGMLQuantizationType[name], shape=list(value.shape)[::-1], data=packed
            )
        )

    return {name: parameter(value) for name, value in state.items()}


def pack(matrix: Any, kind: str) -> Any:
    """GGUF blocks of an fp32 numpy matrix."""
    import gguf

    from lib_precision_lora.report.q4_k import quantize_q4_k

    if kind == "Q4_K":
        return quantize_q4_k(matrix)
    return gguf.quants.quantize(matrix, gguf.GGMLQuantizationType[kind])


def as_nf4(state: Mapping[str, Tensor]) -> State:
    """The tensors of a checkpoint that was quantized before, with its statistics beside each matrix."""
    from bitsandbytes.functional import quantize_4bit

    packed: State = {}
    for name, value in state.items():
        if value.ndim < 2:
            packed[name] = value
            continue
        packed[name], statistics = quantize_4bit(value, blocksize=64, quant_type="nf4")
        for key, part in statistics.as_dict(packed=True).items():
            packed[f"{name}.{key}"] = part
    return packed


def is_quantized(value: Tensor) -> bool:
    """Whether a GGUF file would quantize it: matrices of whole blocks, of any of its types."""
    return value.ndim == 2 and value.shape[1] % 256 == 0


def values_of(parameter: nn.Parameter) -> Tensor:
    """The fp32 values with which the host computes; a GGUF weight it first rounds to fp16."""
    from backend.operations_gguf import dequantize_tensor
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return dequantize_4bit(parameter.data, state).float()
    return dequantize_tensor(parameter).detach().float()
