"""The demo's checkpoints on disk, each in the form in which users download that stored weight.

NF4, FP8, bf16       safetensors; NF4 with bitsandbytes' entries beside each weight
Q8_0, Q4_0, Q4_K     GGUF
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_precision_lora.report.demo.quiet_bitsandbytes import Params4bit
from lib_precision_lora.report.demo.quiet_bitsandbytes import functional as bnb
from lib_precision_lora.report.q4_k import quantize_q4_k
from lib_precision_lora.storage import GGUFParameter

Weights = Mapping[str, Tensor]
NF4_STATE = ".quant_state.bitsandbytes__nf4"


@dataclass(frozen=True, slots=True)
class FileFormat:
    """One stored weight. write: parameter name → values, into a file; read: its parameters, by name."""

    suffix: str
    write: Callable[[Weights, Path], None]
    read: Callable[[Path], dict[str, nn.Parameter]]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def write_cast(dtype: torch.dtype, weights: Weights, path: Path) -> None:
    """Matrices cast to one type, biases as they are."""
    save_file(
        {name: values.to(dtype) if values.ndim == 2 else values for name, values in weights.items()}, path
    )


def read_plain(path: Path) -> dict[str, nn.Parameter]:
    return {name: frozen(values) for name, values in read_tensors(path).items()}


def write_nf4(weights: Weights, path: Path) -> None:
    """Matrices in blocks of 64, with `weight.absmax`, `weight.quant_map` and `weight.quant_state.…`."""
    tensors: dict[str, Tensor] = {}
    for name, values in weights.items():
        tensors[name] = values
        if values.ndim == 2:
            tensors[name], state = bnb.quantize_4bit(values, blocksize=64, quant_type="nf4")
            tensors.update({f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()})
    save_file(tensors, path)


def read_nf4(path: Path) -> dict[str, nn.Parameter]:
    tensors = read_tensors(path)
    quantized = {key.removesuffix(NF4_STATE) for key in tensors if key.endswith(NF4_STATE)}
    parameters: dict[str, nn.Parameter] = {}
    for name, values in tensors.items():
        if name in quantized:
            statistics = {key: part for key, part in tensors.items() if key.startswith(f"{name}.")}
            parameters[name] = Params4bit.from_prequantized(values, statistics, device="cpu")
        elif not any(name.startswith(f"{matrix}.") for matrix in quantized):
            parameters[name] = frozen(values)
    return parameters


def write_gguf(type_name: str, weights: Weights, path: Path) -> None:
    """Matrices in one ggml type, biases in F32."""
    qtype = gguf.GGMLQuantizationType[type_name]
    writer = gguf.GGUFWriter(path, "flux")
    for name, values in weights.items():
        wide = values.float().numpy()
        if values.ndim == 2:
            writer.add_tensor(name, gguf_bytes(wide, qtype), raw_dtype=qtype)
        else:
            writer.add_tensor(name, wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_bytes(matrix: npt.NDArray[np.float32], qtype: gguf.GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """uint8 [out, bytes of a row]."""
    if qtype is gguf.GGMLQuantizationType.Q4_K:
        return quantize_q4_k(matrix)
    quantized: npt.NDArray[np.uint8] = gguf.quants.quantize(matrix, qtype)
    return quantized


def read_gguf(path: Path) -> dict[str, nn.Parameter]:
    parameters: dict[str, nn.Parameter] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        data = torch.from_numpy(np.array(tensor.data))
        if data.dtype == torch.uint8:
            shape = [int(size) for size in reversed(tensor.shape)]
            parameters[tensor.name] = GGUFParameter(data, tensor.tensor_type, shape)
        else:
            parameters[tensor.name] = frozen(data)
    return parameters


FORMATS: Mapping[str, FileFormat] = {
    "NF4": FileFormat(".safetensors", write_nf4, read_nf4),
    "FP8": FileFormat(".safetensors", partial(write_cast, torch.float8_e4m3fn), read_plain),
    "Q8_0": FileFormat(".gguf", partial(write_gguf, "Q8_0"), read_gguf),
    "Q4_0": FileFormat(".gguf", partial(write_gguf, "Q4_0"), read_gguf),
    "Q4_K": FileFormat(".gguf", partial(write_gguf, "Q4_K"), read_gguf),
    "bf16": FileFormat(".safetensors", partial(write_cast, torch.bfloat16), read_plain),
}
