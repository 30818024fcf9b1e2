"""GGUF in its standard layout, against the gguf package."""

from __future__ import annotations

import copy
import sys

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from lib_precision_lora.storage import GGUFParameter, StorageError, gguf_weight, stored_weight
from tests.storage.formats import HostGGUFParameter, gguf_blocks, gguf_values


def decodable() -> list[str]:
    """Every type that the installed package dequantizes."""
    names = []
    for member in gguf.GGMLQuantizationType:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[member][1]), dtype=np.uint8), member)
        except NotImplementedError:
            continue
        names.append(member.name)
    return names


DECODABLE = decodable()
REQUIRED = {
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "BF16",
    "F16",
    "F32",
}


def random_bytes(name: str, blocks: int) -> torch.Tensor:
    """Bytes below 0x70 (fp16 and fp32 fields stay finite): uint8 [blocks, block_bytes]."""
    block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    return torch.randint(0, 0x70, (blocks, block_bytes), generator=torch.Generator().manual_seed(3)).to(
        torch.uint8
    )


def test_the_installed_package_decodes_the_required_types() -> None:
    assert set(DECODABLE) >= REQUIRED


@pytest.mark.parametrize("name", DECODABLE)
def test_every_type_that_gguf_decodes_is_read_bit_for_bit(name: str) -> None:
    block_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]
    data = random_bytes(name, 12)
    shape = (6, 2 * block_size)
    expected = gguf_values(name, data, torch.Size(shape))
    weight = gguf_weight(data, name, shape)
    assert (weight.kind, weight.shape, weight.nbytes) == (f"gguf-{name}", shape, data.numel())
    assert torch.isfinite(expected).all()
    assert torch.equal(weight.dense(), expected)
    assert torch.equal(weight.rows(2, 5), expected[2:5])


@pytest.mark.parametrize("name", ["Q8_0", "Q5_1", "Q6_K"])
@pytest.mark.parametrize("shape", [(64, 20), (16, 4, 3, 4), (2560, 1), (768,)])
def test_logical_shapes_whose_rows_cut_blocks_are_read(name: str, shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape) * 0.1
    data = gguf_blocks(name, matrix)
    expected = gguf_values(name, data, torch.Size(shape))
    weight = gguf_weight(data, name, shape)
    for start, stop in [(0, 1), (3, 11), (shape[0] - 1, shape[0]), (0, shape[0]), (5, 5)]:
        assert torch.equal(weight.rows(start, stop), expected[start:stop])


def test_more_values_than_one_call_decodes_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_precision_lora.storage.gguf.VALUES_PER_CALL", 512)
    data, shape = random_bytes("IQ2_XXS", 10), torch.Size((5, 512))
    assert torch.equal(gguf_weight(data, "IQ2_XXS", shape).dense(), gguf_values("IQ2_XXS", data, shape))


@pytest.mark.parametrize("qtype", ["Q4_0", 2, gguf.GGMLQuantizationType.Q4_0])
def test_a_type_is_given_by_name_number_or_enum(qtype: object) -> None:
    matrix = torch.randn(4, 64)
    data = gguf_blocks("Q4_0", matrix)
    parameter = GGUFParameter(data, qtype, matrix.shape)
    assert stored_weight(parameter).kind == "gguf-Q4_0"
    assert torch.equal(stored_weight(parameter).dense(), gguf_values("Q4_0", data, matrix.shape))


def test_a_gguf_parameter_survives_what_modules_do_to_parameters() -> None:
    matrix = torch.randn(4, 64)
    data = gguf_blocks("Q8_0", matrix)
    expected = gguf_values("Q8_0", data, matrix.shape)
    module = nn.Linear(64, 4)
    module.weight = GGUFParameter(data, "Q8_0", matrix.shape)
    assert module.weight.data_ptr() == data.data_ptr()
    for owner in (module, module.to("cpu"), module.half(), copy.deepcopy(module)):
        assert "weight" in dict(owner.named_parameters())
        assert torch.equal(stored_weight(owner.weight, owner).dense(), expected)
    twin = copy.deepcopy(nn.ModuleList([module, module]))
    assert twin[0].weight is twin[1].weight


def test_no_host_parameter_without_a_class_is_taken_for_bytes() -> None:
    parameter = HostGGUFParameter(torch.zeros(4, 18, dtype=torch.uint8), gguf_cls=None, real_shape=(4, 32))
    with pytest.raises(StorageError, match="not understood"):
        stored_weight(parameter)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "BF16", "F32"])
def test_a_wrong_number_of_bytes_is_refused_with_the_numbers(name: str) -> None:
    data = random_bytes(name, 256)
    with pytest.raises(StorageError, match=rf"{name} .*\[7, 256\] needs \d+ bytes but holds {data.numel()}"):
        gguf_weight(data, name, (7, 256))


def test_gguf_bytes_that_were_cast_are_refused() -> None:
    with pytest.raises(StorageError, match=r"uint8, .* holds torch.float16; do not cast"):
        gguf_weight(torch.zeros(4, 34, dtype=torch.float16), "Q8_0", (4, 32))


@pytest.mark.parametrize("qtype", ["Q9_Z", "Q8_K", 9999])
def test_a_type_that_gguf_cannot_decode_is_refused_by_name(qtype: object) -> None:
    with pytest.raises(StorageError, match=rf"{qtype}.*pip install -U gguf"):
        gguf_weight(torch.zeros(292, dtype=torch.uint8), qtype, (1, 256))


@pytest.mark.parametrize("qtype", ["IQ2_XXS", 8])
def test_a_missing_gguf_package_is_named(qtype: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gguf", "gguf.constants", "gguf.quants"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StorageError, match="pip install gguf"):
        gguf_weight(torch.zeros(4, 34, dtype=torch.uint8), qtype, (4, 32))


def test_float_types_need_no_gguf_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gguf", "gguf.constants", "gguf.quants"):
        monkeypatch.setitem(sys.modules, module, None)
    values = torch.randn(4, 6).to(torch.bfloat16)
    assert torch.equal(gguf_weight(values.view(torch.uint8), "BF16", (4, 6)).dense(), values.float())
