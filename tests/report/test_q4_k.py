"""The Q4_K quantizer, against the `gguf` package's decoder."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_precision_lora.report.q4_k import BLOCK_BYTES, quantize_q4_k

Q4_K = gguf.GGMLQuantizationType.Q4_K


def decoded(matrix: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(quantize_q4_k(matrix), Q4_K)


def test_bytes_have_the_size_that_ggml_gives_them() -> None:
    assert gguf.GGML_QUANT_SIZES[Q4_K] == (256, BLOCK_BYTES)
    assert quantize_q4_k(np.ones((3, 512), np.float32)).shape == (3, 2 * BLOCK_BYTES)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(1e-2, 1e2), centre=st.floats(-3, 3))
def test_every_value_is_within_six_percent_of_its_super_blocks_range(
    seed: int, spread: float, centre: float
) -> None:
    random = np.random.default_rng(seed)
    matrix = (random.standard_normal((2, 512)) + centre) * spread
    matrix *= random.uniform(0.01, 1, (2, 16)).repeat(32, axis=1)
    matrix = matrix.astype(np.float32)
    super_blocks = matrix.reshape(-1, 256)
    reach = np.maximum(super_blocks.max(axis=1), 0) + np.maximum(-super_blocks.min(axis=1), 0)
    error = np.abs(decoded(matrix).reshape(-1, 256) - super_blocks).max(axis=1)
    assert (error <= 0.06 * reach).all()


def test_normal_weights_keep_nine_tenths_of_their_norm() -> None:
    matrix = (np.random.default_rng(0).standard_normal((64, 1024)) * 0.03).astype(np.float32)
    error = np.linalg.norm(decoded(matrix) - matrix) / np.linalg.norm(matrix)
    assert 0.02 < error < 0.1


def test_zeros_stay_zeros() -> None:
    assert not decoded(np.zeros((2, 256), np.float32)).any()


def test_each_sub_block_keeps_its_own_scale_and_minimum() -> None:
    steps = np.repeat(2.0 ** np.arange(8), 32).reshape(1, 256)
    matrix = (np.tile(np.linspace(-1, 1, 32), 8) * steps).astype(np.float32)
    by_block = np.abs(decoded(matrix)).reshape(8, 32).max(axis=1)
    assert np.allclose(by_block, 2.0 ** np.arange(8), atol=128 / 63)
    assert (np.diff(by_block[2:]) > 0).all()


def test_a_width_that_is_no_whole_number_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="a Q4_K row of 128 values"):
        quantize_q4_k(np.zeros((4, 128), np.float32))
