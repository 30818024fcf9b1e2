"""GGUF blocks decoded by torch where they lie, against the gguf package."""

from __future__ import annotations

import sys

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.fake_card import CARD, fake_card
from lib_precision_lora.storage import gguf_weight
from lib_precision_lora.storage.gguf_baked import BAKED_LAYOUTS, baked_weight
from lib_precision_lora.storage.gguf_blocks import BLOCK_LAYOUTS
from tests.storage.formats import COMPUTE, gguf_values

TYPES = pytest.mark.parametrize("name", BLOCK_LAYOUTS)
IMAGE_MODELS = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}


def random_blocks(name: str, count: int, seed: int = 0) -> Tensor:
    """Any bytes, so that scales are subnormal, infinite or no numbers too: uint8 [count, block_bytes]."""
    generator = torch.Generator().manual_seed(seed)
    size = (count, BLOCK_LAYOUTS[name].block_bytes)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


def assert_same_bits(made: Tensor, expected: Tensor) -> None:
    """Every NaN counts as the same."""
    assert (made.dtype, made.shape) == (torch.float32, expected.shape)
    same = made.view(torch.int32) == expected.view(torch.int32)
    assert bool((same | (made.isnan() & expected.isnan())).all())


def test_all_types_that_image_models_are_kept_in_are_decoded_here() -> None:
    assert set(BLOCK_LAYOUTS) >= IMAGE_MODELS


@TYPES
def test_a_layout_has_the_sizes_of_the_format(name: str) -> None:
    layout = BLOCK_LAYOUTS[name]
    member = gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[member] == (layout.block_size, layout.block_bytes)


@TYPES
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_bytes_decode_to_the_bits_of_the_package(name: str) -> None:
    blocks = random_blocks(name, 4096)
    shape = torch.Size((4096, BLOCK_LAYOUTS[name].block_size))
    expected = gguf_values(name, blocks, shape)
    assert 0.5 < float(expected.isfinite().float().mean()) < 1.0
    assert_same_bits(gguf_weight(blocks, name, shape).dense(), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(BLOCK_LAYOUTS)))
def test_any_rows_of_any_width_decode_to_the_bits_of_the_package(data: st.DataObject, name: str) -> None:
    rows, width = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 700)))
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    blocks = random_blocks(name, -(-rows * width // BLOCK_LAYOUTS[name].block_size), rows)
    expected = gguf_values(name, blocks, torch.Size((-1,)))[: rows * width].view(rows, width)
    assert_same_bits(gguf_weight(blocks, name, (rows, width)).rows(start, stop), expected[start:stop])


@TYPES
def test_decoding_leaves_the_bytes_and_shares_no_memory(name: str) -> None:
    blocks = random_blocks(name, 8)
    before = blocks.clone()
    values = gguf_weight(blocks, name, (8, BLOCK_LAYOUTS[name].block_size)).dense()
    values.fill_(7.0)
    assert torch.equal(blocks, before)


@TYPES
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_decoding_needs_no_gguf_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, shape = random_blocks(name, 8), torch.Size((8, BLOCK_LAYOUTS[name].block_size))
    expected = gguf_values(name, blocks, shape)
    for module in ("gguf", "gguf.constants", "gguf.quants"):
        monkeypatch.setitem(sys.modules, module, None)
    assert_same_bits(gguf_weight(blocks, name, shape).dense(), expected)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a tensor on a card was copied to the CPU, or asked for a value")


@pytest.fixture
def no_copies_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu", "numpy", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)


@TYPES
@pytest.mark.usefixtures("no_copies_to_the_cpu")
def test_bytes_on_a_card_are_decoded_there(name: str) -> None:
    layout = BLOCK_LAYOUTS[name]
    with fake_card():
        data = torch.empty((12, layout.block_bytes), dtype=torch.uint8, device=CARD)
        rows = gguf_weight(data, name, (6, 2 * layout.block_size)).rows(1, 4)
    assert (rows.device, rows.dtype, rows.shape) == (CARD, torch.float32, (3, 2 * layout.block_size))


@pytest.mark.parametrize("compute", COMPUTE.values(), ids=str)
@pytest.mark.parametrize("name", BAKED_LAYOUTS)
@pytest.mark.usefixtures("no_copies_to_the_cpu")
def test_baked_bytes_on_a_card_are_decoded_there(name: str, compute: torch.dtype) -> None:
    layout = BAKED_LAYOUTS[name]
    with fake_card():
        data = torch.empty(12 * layout.block_bytes, dtype=torch.uint8, device=CARD)
        rows = baked_weight(data, name, compute, (6, 2 * layout.block_size)).rows(1, 4)
    assert (rows.device, rows.dtype, rows.shape) == (CARD, torch.float32, (3, 2 * layout.block_size))
