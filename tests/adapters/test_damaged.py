"""Law 5: a damaged file is refused in one sentence, with the layer and the numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lib_precision_lora.adapters import AdapterError, LoRA, make_lora, read_adapters

UP, DOWN = torch.ones(6, 2), torch.ones(2, 5)
NAN, INF = float("nan"), float("inf")


def with_value(tensor: Tensor, *values: float) -> Tensor:
    damaged = tensor.clone()
    damaged.view(-1)[: len(values)] = torch.tensor(values)
    return damaged


def lora(up: Tensor = UP, down: Tensor = DOWN, **more: Tensor) -> dict[str, Tensor]:
    return {".lora_up.weight": up, ".lora_down.weight": down} | {
        f".{name}": value for name, value in more.items()
    }


DAMAGED = {
    "no up": ({".lora_down.weight": DOWN}, "lora_up is missing"),
    "no down": ({".lora_up.weight": UP, ".alpha": torch.tensor(1.0)}, "lora_down is missing"),
    "no up beside a bias": ({".lora_down.weight": DOWN, ".diff_b": torch.ones(6)}, "lora_up is missing"),
    "rank zero": (lora(torch.ones(6, 0), torch.ones(0, 5)), "rank is zero"),
    "rank zero in down": (lora(UP, torch.ones(0, 5)), "rank is zero"),
    "NaN in up": (lora(with_value(UP, NAN)), "lora_up holds 1 NaN or inf values of 12"),
    "NaN in down": (lora(down=with_value(DOWN, NAN, INF)), "lora_down holds 2 NaN or inf values of 10"),
    "inf in fp16": (lora(with_value(UP, -INF).half()), "lora_up holds 1 .* of 12"),
    "NaN in fp8": (lora(with_value(UP, NAN).to(torch.float8_e4m3fn)), "lora_up holds 1 .* of 12"),
    "inf in a core": (
        {**lora(UP, DOWN), ".lora_mid.weight": with_value(torch.ones(2, 2, 1), INF)},
        "lora_mid holds 1 .* of 4",
    ),
    "NaN in a diff": ({".diff": with_value(UP, NAN, NAN, NAN)}, "diff holds 3 .* of 12"),
    "inf in a bias": ({".diff_b": with_value(UP, INF)}, "diff holds 1 .* of 12"),
    "NaN in a set": ({".set_weight": with_value(UP, NAN)}, "set_weight holds 1 .* of 12"),
    "ranks that do not meet": (lora(torch.ones(6, 3)), "rank 3 .*rank 2"),
    "a core that does not meet": (
        {**lora(), ".lora_mid.weight": torch.ones(2, 4, 1, 1)},
        r"lora_mid has shape \[2, 4, 1, 1\].*\[2, 5\]",
    ),
    "a core without a kernel": (
        {**lora(), ".lora_mid.weight": torch.ones(2, 2)},
        r"lora_mid has shape \[2, 2\]",
    ),
    "a core that does not meet up": (
        {**lora(), ".lora_mid.weight": torch.ones(3, 2, 1, 1)},
        "rank 2 .*rank 3",
    ),
    "an integer factor": (lora(UP.to(torch.int8)), "lora_up is stored as torch.int8"),
    "an integer core": (
        {**lora(), ".lora_mid.weight": torch.ones(2, 2, 1).int()},
        "lora_mid is stored as torch.int32",
    ),
    "an integer diff": ({".diff": UP.to(torch.uint8)}, "torch.uint8"),
    "vectors for factors": (lora(torch.ones(6), torch.ones(5)), r"\[6\] and \[5\]"),
    "an alpha of two numbers": (lora(alpha=torch.ones(2)), "alpha has 2 values"),
    "an alpha of no number": (lora(alpha=torch.ones(0)), "alpha has 0 values"),
    "an alpha that is NaN": (lora(alpha=torch.tensor(NAN)), "alpha is nan"),
    "an alpha that is infinite": (lora(alpha=torch.tensor(INF)), "alpha is inf"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_layer_is_refused_by_name_and_number(damage: str) -> None:
    tensors, message = DAMAGED[damage]
    file = {f"block_7_to_q{key}": tensor for key, tensor in tensors.items()}
    healthy = {f"block_8_to_q{key}": tensor for key, tensor in lora().items()}
    assert len(read_adapters(healthy)) == 1
    with pytest.raises(AdapterError, match=rf"block_7_to_q: .*{message}"):
        read_adapters(healthy | file)


@pytest.mark.parametrize("shape", [(6, 4), (7, 5), (6,), (6, 5, 3, 3), (5, 6)])
def test_a_lora_of_another_models_shape_is_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    adapter = make_lora("layer", UP, DOWN)
    adapter.check((6, 5))
    with pytest.raises(AdapterError, match=rf"6×5 .*{'×'.join(map(str, shape))}"):
        adapter.check(shape)


@pytest.mark.parametrize("key", ["diff", "set_weight"])
@pytest.mark.parametrize("shape", [(2, 6), (6, 3), (6,), (6, 2, 1, 1), (1, 12)])
def test_a_tensor_of_another_models_shape_is_refused_with_both_shapes(
    key: str, shape: tuple[int, ...]
) -> None:
    (adapter,) = read_adapters({f"layer.{key}": UP}).values()
    adapter.check((6, 2))
    with pytest.raises(AdapterError, match=rf"6×2, .*{'×'.join(map(str, shape))}"):
        adapter.check(shape)


def test_a_factor_that_overflows_while_a_core_is_folded_is_refused() -> None:
    huge = torch.full((2, 2, 1, 1), 1e30)
    with pytest.raises(AdapterError, match=r"layer: .*NaN or inf"):
        make_lora("layer", UP, torch.full((2, 5), 1e30), None, huge)
    assert isinstance(make_lora("layer", UP, DOWN, None, huge), LoRA)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 17, 63, 64, 998])
def test_one_value_that_is_not_finite_is_found_wherever_it_lies(
    place: int, value: float, dtype: torch.dtype
) -> None:
    up = torch.ones(999, 1, dtype=dtype)
    up[place] = value
    with pytest.raises(AdapterError, match="lora_up holds 1 NaN or inf values of 999"):
        make_lora("layer", up, torch.ones(1, 5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_each_factor_is_looked_at_in_one_pass_that_makes_nothing_of_its_size(dtype: torch.dtype) -> None:
    up, down = torch.ones(96, 8, dtype=dtype), torch.ones(8, 64, dtype=dtype)
    with Passes() as passes:
        make_lora("layer", up, down)
    assert passes.over == {up.numel(): 1, down.numel(): 1}
    assert passes.largest_made == 1


class Passes(TorchDispatchMode):
    """Counts the operations that read a whole tensor, by its size, and the elements of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.over: Counter[int] = Counter()
        self.largest_made = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if not function.is_view and args[0].numel() > 1:
            self.over[args[0].numel()] += 1
            parts = made if isinstance(made, tuple) else (made,)
            self.largest_made = max(self.largest_made, *(part.numel() for part in parts))
        return made
