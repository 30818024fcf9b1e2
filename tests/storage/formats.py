"""A parameter and module of every stored format, made from one fp32 matrix. Reused by other test folders.

    for case in stored_variants(torch.randn(16, 256)).values():
        weight = stored_weight(case.parameter, case.module)     # decodes to case.expected, fp32 [out, in]
        y = case.module(x)                                      # linear with case.expected

`VARIANTS` names all of them, to parametrize with; `stored_variant(name, matrix)` makes one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import bitsandbytes.functional as bnb
import gguf
import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn

from lib_precision_lora.storage import GGUFParameter
from lib_precision_lora.storage.weight import plain
from tests.storage.baked_layout import bake
from tests.storage.four_bit import four_bit_values
from tests.storage.k_quants import K_QUANTS, random_blocks
from tests.storage.one_buffer import Int8Parameter, in_one_buffer, int8_in_one_buffer
from tests.storage.quantized_tensors import MAKERS
from tests.storage.rotating_host import GROUP, RotatedInt8Parameter

FP8 = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
DENSE = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMPUTE = {"fp16": torch.float16, "bf16": torch.bfloat16}
QUANTIZABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
BAKED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K")


@dataclass(frozen=True)
class StoredCase:
    """expected: W0 in fp32 by the format's own library or its definition, never by the code under test."""

    parameter: Tensor
    module: StoredLinear
    expected: Tensor

    @property
    def codes(self) -> Tensor:
        """What is stored in the place of the values, as an ordinary tensor; some formats pad it."""
        return plain(getattr(self.parameter, "_qdata", self.parameter))

    @property
    def row_bytes(self) -> Tensor:
        """The bytes of the values alone, row by row: uint8 [rows, bytes], the memory of the weight."""
        if hasattr(self.parameter, "w8"):
            return self.codes[: self.expected.numel()].view(-1, len(self.expected)).t()
        rows = len(self.expected) if hasattr(self.parameter, "_qdata") else len(self.codes)
        stored = self.codes[:rows].view(-1).view(torch.uint8)
        stored = stored[: getattr(self.parameter, "packed_bytes", len(stored))]
        return stored.view(len(self.expected), -1)

    @property
    def parts(self) -> list[Tensor]:
        """All tensors that are stored for the weight, without tables of codes."""
        state, params = (getattr(self.parameter, name, None) for name in ("quant_state", "_params"))
        parts = [self.codes, self.module.scale_weight]
        if state is not None:
            parts += [state.absmax, state.offset, state.state2 and state.state2.absmax]
        if params is not None:
            parts += [params.scale, params.block_scale]
        return [plain(part) for part in parts if part is not None]


class StoredLinear(nn.Module):
    """y = x W0ᵀ + bias over a parameter in any stored format, W0 as `StoredCase.expected` has it."""

    def __init__(self, parameter: Tensor, expected: Tensor, scale_weight: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = expected.shape
        self.weight = parameter if isinstance(parameter, nn.Parameter) else frozen(parameter)
        self.bias = frozen(torch.linspace(-1.0, 1.0, self.out_features))
        self.scale_weight = None if scale_weight is None else frozen(scale_weight)
        self.decoded = (expected,)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.decoded[0].to(x.dtype), self.bias.to(x.dtype))


class HostGGUFParameter(nn.Parameter):
    """What is relied on of Forge's ParameterGGUF: its attributes, and a `shape` that is the logical one."""

    def __new__(cls, data: Tensor, **attributes: object) -> HostGGUFParameter:
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: Tensor, **attributes: object) -> None:
        self.__dict__.update(attributes)

    @property
    def shape(self) -> torch.Size:
        return self.real_shape


class SubclassGGUFTensor(torch.Tensor):
    """What is relied on of ComfyUI-GGUF's tensor: a subclass that overrides `detach` and `shape`."""

    def detach(self) -> SubclassGGUFTensor:
        return self

    @property
    def shape(self) -> torch.Size:
        return self.tensor_shape


def frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def case(parameter: Tensor, expected: Tensor, scale: Tensor | None = None) -> StoredCase:
    module = StoredLinear(parameter, expected.clone(), scale)
    return StoredCase(module.weight, module, module.decoded[0])


def dense(dtype: torch.dtype, matrix: Tensor) -> StoredCase:
    stored = matrix.to(dtype, copy=True)
    return case(frozen(stored), stored.to(torch.float32))


def scaled(dtype: torch.dtype, per_row: bool, matrix: Tensor) -> StoredCase:
    largest = matrix.abs().amax(dim=1, keepdim=True) if per_row else matrix.abs().max()
    scale = (largest / 8).clamp(min=1e-8)
    stored = (matrix / scale).to(dtype)
    return case(frozen(stored), stored.to(torch.float32) * scale, scale)


def four_bit(quant_type: str, nested: bool, storage: torch.dtype, matrix: Tensor) -> StoredCase:
    packed, state = bnb.quantize_4bit(
        matrix, blocksize=64, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    parameter = Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=64,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
        bnb_quantized=True,
    )
    return case(parameter, four_bit_values(packed, state))


def not_yet_four_bit(quant_type: str, matrix: Tensor) -> StoredCase:
    stored = matrix.to(torch.float16)
    return case(Params4bit(stored, requires_grad=False, quant_type=quant_type), stored.to(torch.float32))


def quantized_tensor(name: str, matrix: Tensor) -> StoredCase:
    made = MAKERS[name](matrix)
    return case(made.parameter, made.expected)


def one_buffer(quant_type: str, nested: bool, matrix: Tensor) -> StoredCase:
    packed, state = bnb.quantize_4bit(
        matrix, blocksize=64, compress_statistics=nested, quant_type=quant_type, quant_storage=torch.uint8
    )
    return case(in_one_buffer(packed, state), four_bit_values(packed, state))


def one_buffer_int8(host: type[Int8Parameter], group: int, matrix: Tensor) -> StoredCase:
    return case(*int8_in_one_buffer(matrix, host, group))


def gguf_blocks(name: str, matrix: Tensor) -> Tensor:
    """uint8 [n, block_bytes] over the values in row-major order; random for types without a quantizer."""
    member = gguf.GGMLQuantizationType[name]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[member]
    if matrix.numel() % block_size:
        raise ValueError(f"{matrix.numel()} values are no whole number of {name} blocks of {block_size}")
    if name in K_QUANTS:
        count = matrix.numel() // block_size
        return torch.from_numpy(random_blocks(name, count, float(matrix.std()), zlib.crc32(name.encode())))
    quantized = gguf.quants.quantize(matrix.reshape(1, -1).numpy(), member)
    return torch.from_numpy(quantized.copy()).view(torch.uint8).reshape(-1, block_bytes)


def gguf_values(name: str, blocks: Tensor, shape: torch.Size) -> Tensor:
    values = gguf.quants.dequantize(blocks.reshape(1, -1).numpy(), gguf.GGMLQuantizationType[name])
    return torch.from_numpy(values.copy()).view(shape)


def gguf_own(name: str, matrix: Tensor) -> StoredCase:
    blocks = gguf_blocks(name, matrix)
    return case(GGUFParameter(blocks, name, matrix.shape), gguf_values(name, blocks, matrix.shape))


def gguf_subclass(name: str, matrix: Tensor) -> StoredCase:
    blocks = gguf_blocks(name, matrix)
    tensor = blocks.as_subclass(SubclassGGUFTensor)
    tensor.tensor_type, tensor.tensor_shape = gguf.GGMLQuantizationType[name], matrix.shape
    parameter = frozen(tensor)
    return case(parameter, gguf_values(name, blocks, matrix.shape))


def gguf_forge(name: str, baked: bool, compute: torch.dtype, matrix: Tensor) -> StoredCase:
    blocks = gguf_blocks(name, matrix)
    data, expected = blocks, gguf_values(name, blocks, matrix.shape)
    if baked and name in BAKED:
        result = bake(blocks.numpy(), name, compute)
        data, expected = result.data, result.values.view(matrix.shape)
    parameter = HostGGUFParameter(
        data,
        gguf_cls=getattr(gguf.quants, name),
        real_shape=matrix.shape,
        computation_dtype=compute,
        baked=baked,
    )
    return case(parameter, expected)


def gguf_forge_plain(dtype: torch.dtype, matrix: Tensor) -> StoredCase:
    data = matrix.to(dtype, copy=True)
    parameter = HostGGUFParameter(data, gguf_cls=None, real_shape=matrix.shape, baked=False)
    return case(parameter, data.to(torch.float32))


BUILDERS: dict[str, Callable[[Tensor], StoredCase]] = {
    **{f"dense-{key}": partial(dense, dtype) for key, dtype in DENSE.items()},
    "dense-fp16-scaled": partial(scaled, torch.float16, False),
    **{f"fp8-{key}": partial(dense, dtype) for key, dtype in FP8.items()},
    **{f"fp8-{key}-scaled": partial(scaled, dtype, False) for key, dtype in FP8.items()},
    **{f"fp8-{key}-scaled-by-row": partial(scaled, dtype, True) for key, dtype in FP8.items()},
    **{f"bnb-{key}": partial(four_bit, key, False, torch.uint8) for key in ("nf4", "fp4")},
    **{f"bnb-{key}-nested": partial(four_bit, key, True, torch.uint8) for key in ("nf4", "fp4")},
    **{f"bnb-{key}-unquantized": partial(not_yet_four_bit, key) for key in ("nf4", "fp4")},
    "bnb-nf4-in-bf16": partial(four_bit, "nf4", False, torch.bfloat16),
    **{f"one-buffer-{key}": partial(one_buffer, key, False) for key in ("nf4", "fp4")},
    "one-buffer-nf4-nested": partial(one_buffer, "nf4", True),
    "one-buffer-int8": partial(one_buffer_int8, Int8Parameter, 1),
    "one-buffer-int8-convrot": partial(one_buffer_int8, RotatedInt8Parameter, GROUP),
    **{name: partial(quantized_tensor, name) for name in MAKERS},
    **{f"gguf-{key}": partial(gguf_own, key) for key in (*QUANTIZABLE, *K_QUANTS, "BF16", "F16", "F32")},
    "gguf-Q4_0-subclass": partial(gguf_subclass, "Q4_0"),
    "gguf-Q8_0-forge": partial(gguf_forge, "Q8_0", False, torch.float16),
    "gguf-F16-forge": partial(gguf_forge_plain, torch.float16),
    **{
        f"gguf-{key}-baked-{compute}": partial(gguf_forge, key, True, dtype)
        for key in (*BAKED, "Q5_0", "Q6_K", "BF16")
        for compute, dtype in COMPUTE.items()
    },
}
VARIANTS = tuple(BUILDERS)


def stored_variant(name: str, matrix: Tensor) -> StoredCase:
    """One format of `VARIANTS` over fp32 [out, in]. For GGUF out·in is a multiple of the block size."""
    return BUILDERS[name](matrix.detach().to(torch.float32).contiguous())


def stored_variants(matrix: Tensor) -> dict[str, StoredCase]:
    """Every format over fp32 [out, in], by name. Out·in is a multiple of 256, for the K-quants."""
    return {name: stored_variant(name, matrix) for name in VARIANTS}
