"""How a module holds a GGUF weight: Forge's way, the ComfyUI-GGUF way, and our own outside of a host.

Forge          `ParameterGGUF` with gguf_cls, real_shape, baked, computation_dtype
ComfyUI-GGUF   a tensor with tensor_type, tensor_shape
here           `GGUFParameter`, with the same two attributes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .dense import dense_weight
from .gguf import gguf_weight, type_name
from .gguf_baked import BAKED_LAYOUTS, baked_weight
from .weight import StoredWeight, flat_bytes, plain

ABSENT = object()


class GGUFParameter(nn.Parameter):
    """The bytes of a GGUF tensor as a module's parameter, which `stored_weight` recognises.

        module.weight = GGUFParameter(torch.from_numpy(data), "Q4_K", (out, in))

    data: uint8, any shape, blocks in row-major order as in the file; held without a copy.
    tensor_type: a ggml type as name, number or `GGMLQuantizationType`; tensor_shape: the logical shape.
    torch's own `.shape` stays that of the bytes.
    """

    tensor_type: object
    tensor_shape: tuple[int, ...]

    def __new__(cls, data: Tensor, tensor_type: object, tensor_shape: Sequence[int]) -> GGUFParameter:
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: Tensor, tensor_type: object, tensor_shape: Sequence[int]) -> None:
        self.tensor_type = tensor_type
        self.tensor_shape = tuple(int(size) for size in tensor_shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> GGUFParameter:
        if id(self) not in memo:
            memo[id(self)] = GGUFParameter(self.data.clone(), self.tensor_type, self.tensor_shape)
        copied: GGUFParameter = memo[id(self)]
        return copied


def forge_gguf_weight(parameter: Tensor, module: nn.Module | None) -> StoredWeight | None:
    """Recognises Forge's `ParameterGGUF`, standard and baked; `gguf_cls` None means plain F16 or F32."""
    gguf_cls: Any = getattr(parameter, "gguf_cls", ABSENT)
    if gguf_cls is ABSENT:
        return None
    if gguf_cls is None:
        return dense_weight(parameter, module)
    shape = tuple(int(size) for size in getattr(parameter, "real_shape", parameter.shape))
    name = type_name(gguf_cls.qtype)
    if name in BAKED_LAYOUTS and getattr(parameter, "baked", False):
        return baked_weight(flat_bytes(parameter), name, getattr(parameter, "computation_dtype", None), shape)
    return gguf_weight(parameter, name, shape)


def comfy_gguf_weight(parameter: Tensor, module: nn.Module | None) -> StoredWeight | None:
    """Recognises `tensor_type` with `tensor_shape`; F16 and F32 may be held as floating elements."""
    tensor_type = getattr(parameter, "tensor_type", None)
    if tensor_type is None:
        return None
    if plain(parameter).is_floating_point():
        return dense_weight(parameter, module)
    return gguf_weight(parameter, tensor_type, getattr(parameter, "tensor_shape", parameter.shape))
