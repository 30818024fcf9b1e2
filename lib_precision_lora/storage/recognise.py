"""The formats that are understood, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .bnb4 import bnb4_weight
from .dense import dense_weight
from .fp8 import fp8_weight
from .gguf_parameter import comfy_gguf_weight, forge_gguf_weight
from .int8_parameter import int8_parameter_weight
from .nf4_parameter import nf4_parameter_weight
from .nunchaku import refuse_nunchaku
from .quantized_tensor.recognise import quantized_tensor_weight
from .weight import StorageError, StoredWeight, plain

Recogniser = Callable[[Tensor, nn.Module | None], StoredWeight | None]

# Packed formats first: their data may look like an ordinary tensor of another type and shape.
RECOGNISERS: tuple[Recogniser, ...] = (
    refuse_nunchaku,
    quantized_tensor_weight,
    bnb4_weight,
    nf4_parameter_weight,
    int8_parameter_weight,
    forge_gguf_weight,
    comfy_gguf_weight,
    fp8_weight,
    dense_weight,
)


def stored_weight(parameter: Tensor, module: nn.Module | None = None) -> StoredWeight:
    """The stored weight of a parameter as its host keeps it.

    module: the one that owns the parameter; needed where it holds part of the format (`scale_weight`).
    The format is chosen here, once; `rows` then runs plain. Raises StorageError for an unknown layout,
    a damaged one, and a missing package.
    """
    for recognise in RECOGNISERS:
        weight = recognise(parameter, module)
        if weight is not None:
            return weight
    owner = "no module" if module is None else type(module).__name__
    raise StorageError(
        f"A {type(parameter).__name__} of {parameter.dtype} and shape {list(plain(parameter).size())} in "
        f"{owner} has a layout that is not understood; leave this layer unpatched, or load the checkpoint as "
        "FP8, NVFP4, MXFP8, int8, NF4, FP4, GGUF, fp16, bf16 or fp32."
    )
