"""Rotations of inputs: what their files mean by layout and by writer, and at every strength."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import Adapter, AdapterError, Right, read_adapters
from lib_precision_lora.adapters.cayley import cayley_deviation, truncated_deviation
from lib_precision_lora.branch import EffectiveWeight
from lib_precision_lora.storage import stored_weight
from tests.families import BASE_STD, family

IDENTITY = torch.eye(4, dtype=torch.float64)


def base(*shape: int) -> Tensor:
    return BASE_STD * torch.randn(shape, generator=torch.manual_seed(8))


def normal(std: float, *shape: int) -> Tensor:
    return std * torch.randn(shape, generator=torch.manual_seed(9))


def skew(size: int, angle: float) -> Tensor:
    """Skew-symmetric, its largest singular value the angle: [3, size, size] fp64."""
    whole = torch.randn(3, size, size, generator=torch.manual_seed(10), dtype=torch.float64)
    whole = whole - whole.transpose(-1, -2)
    return angle * whole / torch.linalg.matrix_norm(whole, 2, keepdim=True)


def weight_after(adapter: Adapter, weight: Tensor, strength: float = 1.0) -> Tensor:
    effective = EffectiveWeight.identity(stored_weight(nn.Parameter(weight))).apply(adapter, strength)
    return weight.double() + effective.delta(torch.float64)


def assert_same(mine: Tensor, expected: Tensor, weight: Tensor) -> None:
    change = float((expected - weight).norm())
    assert change > 0.0
    assert float((mine - expected).norm()) / change <= 1e-6


@pytest.mark.parametrize("angle", [0.01, 0.1, 0.5, 0.9])
def test_the_series_is_the_rotation_shrunk_by_the_fourth_power_of_its_angle(angle: float) -> None:
    matrix = skew(6, angle)
    identity = torch.eye(6, dtype=torch.float64)
    exact = (identity + matrix) @ torch.linalg.inv(identity - matrix)
    torch.testing.assert_close(identity + cayley_deviation(matrix), exact)
    series = identity + truncated_deviation(matrix)
    torch.testing.assert_close(series, (identity - torch.linalg.matrix_power(matrix, 4)) @ exact)
    off = torch.linalg.matrix_norm(exact - series, 2)
    torch.testing.assert_close(off, torch.full_like(off, angle**4))


def test_for_values_as_they_are_trained_the_series_is_off_by_less_than_a_thousandth_of_the_change() -> None:
    """Blocks of 32 with elements of 0.01, angles of about 0.1, and of 0.05, angles of about 0.5."""
    for std, angles, bound in ((0.01, (0.08, 0.15), 1e-3), (0.05, (0.4, 0.75), 0.1)):
        upper = torch.triu(normal(std, 8, 32, 32).double(), 1)
        matrix = upper - upper.transpose(-1, -2)
        largest = float(torch.linalg.matrix_norm(matrix, 2).max())
        assert angles[0] <= largest <= angles[1]
        change = cayley_deviation(matrix)
        off = float((truncated_deviation(matrix) - change).norm() / change.norm())
        assert 0.0 < off <= min(bound, largest**3 * math.sqrt(1 + largest**2) / 2)


def test_a_convolution_of_pefts_own_files_turns_the_other_way_than_one_of_the_trainers() -> None:
    made, weight = family("oft-peft", (16, 4, 3, 3)), base(16, 4, 3, 3)
    triangles = made.tensors["oft_R.weight"]
    peft = read_adapters({"base_model.model.conv.oft_R.weight": triangles})
    trainer = read_adapters({"lora_unet_conv.oft_R.weight": -triangles})
    turned = made.full(weight.double())
    assert_same(weight_after(made.adapter, weight), turned, weight)
    (theirs,), (negated,) = peft.values(), trainer.values()
    assert_same(weight_after(theirs, weight), weight_after(negated, weight), weight)
    assert float((weight_after(theirs, weight) - turned).norm() / (turned - weight).norm()) > 1.0


@pytest.mark.parametrize("key", ["oft_R.weight", "oft_R.default.weight"])
def test_a_linear_layer_turns_the_same_way_in_every_file(key: str) -> None:
    made, weight = family("oft-peft", (16, 12)), base(16, 12)
    for name in ("base_model.model.layer", "lora_unet_layer", "transformer.layer"):
        (adapter,) = read_adapters({f"{name}.{key}": made.tensors["oft_R.weight"]}).values()
        assert_same(weight_after(adapter, weight), made.full(weight.double()), weight)


def test_a_scaled_triangle_is_divided_by_twice_the_root_of_its_width() -> None:
    made, weight = family("oft-peft", (16, 12)), base(16, 12)
    triangles = made.tensors["oft_R.weight"]
    file = read_adapters(
        {"layer.oft_R.weight": 2 * math.sqrt(3) * triangles, "layer.oft_R.scaled_oft": torch.tensor(True)}
    )
    assert file.unmatched == ()
    assert_same(weight_after(file["layer"], weight), made.full(weight.double()), weight)


@pytest.mark.parametrize("count", [3, 1])
@pytest.mark.parametrize("shape", [(12, 12), (12, 3, 2, 2)])
def test_the_square_blocks_of_peft_0_12_turn_outputs_and_those_of_0_14_inputs(
    shape: tuple[int, ...], count: int
) -> None:
    blocks, scale, weight = normal(0.2, count, 4, 4), 1.0 + normal(0.1, 12, 1), base(*shape)
    half = (blocks - blocks.transpose(-1, -2)).double() / 2
    turns = (IDENTITY - half) @ torch.linalg.inv(IDENTITY + half)
    whole = torch.block_diag(*(turns[min(index, count - 1)] for index in range(3)))
    rows = weight.double().flatten(1)
    for extra, expected in (
        ({}, whole.T @ rows),
        ({"layer.oft_s": scale}, scale.double() * (rows @ whole.T)),
    ):
        file = read_adapters({"layer.oft_r": blocks} | extra)
        assert file.unmatched == ()
        assert_same(weight_after(file["layer"], weight), expected.view(shape), weight)


def test_square_blocks_that_are_none_or_do_not_divide_the_layer_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"^layer: oft_r has shape \[3, 4, 5\], not \[blocks, b, b\]"):
        read_adapters({"layer.oft_r": torch.ones(3, 4, 5)})
    shared, three = (read_adapters({"layer.oft_r": torch.ones(n, 4, 4)})["layer"] for n in (1, 3))
    with pytest.raises(AdapterError, match="shared oft block of 4 does not divide the layer's 14 outputs"):
        shared.check((14, 8))
    with pytest.raises(AdapterError, match="the oft blocks of 4 make 12 outputs, the layer has 16"):
        three.check((16, 8))


@pytest.mark.parametrize("strength", [0.3, 2.0, -1.5])
def test_outputs_whose_scale_vanishes_at_this_strength_are_exact(strength: float) -> None:
    """1 + s · v = 0 for some rows, where the way through their ratio would divide by it."""
    made, weight = family("boft-peft", (16, 12)), base(16, 12)
    scale = made.tensors["boft_s"].clone()
    scale[3] = 1.0 - 1.0 / strength
    scale[5] = 0.0
    turned = made.full(weight.double()) / made.tensors["boft_s"].double() * scale.double()
    adapter = read_adapters({"layer.boft_R": made.tensors["boft_R"], "layer.boft_s": scale})["layer"]
    expected = weight + strength * (turned - weight)
    assert_same(weight_after(adapter, weight, strength), expected, weight)
    assert_same(weight_after(adapter, weight), turned, weight)


def test_a_boft_whose_scale_was_not_trained_is_one_turn() -> None:
    tensors = family("boft-peft", (16, 12)).tensors
    adapter = read_adapters({"layer.boft_R": tensors["boft_R"], "layer.boft_s": torch.ones(16, 1)})["layer"]
    weight = EffectiveWeight.identity(stored_weight(nn.Parameter(base(16, 12)))).apply(adapter, 0.4)
    ((piece,), steps) = weight.pieces, weight.steps
    assert [factor for _, factor in piece.turns] == [0.4]
    assert piece.share is None
    assert steps == ()


def test_a_scaled_turn_by_rows_after_a_rotation_of_outputs_is_refused_with_the_way_out() -> None:
    rotated = EffectiveWeight.identity(stored_weight(nn.Parameter(base(16, 12)))).apply(
        family("oft", (16, 12)).adapter
    )
    boft = family("boft-peft", (16, 12)).adapter
    with pytest.raises(AdapterError, match="put it before that one in the prompt, or set its strength to 1"):
        rotated.apply(boft, 0.5)
    assert rotated.apply(boft, 1.0).steps
    assert any(isinstance(step, Right) for step in boft.compose(_Rows((16, 12)), 0.5))


class _Rows:
    """A running weight that is asked for its shape alone."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
