"""LyCORIS's sparse rest of an extracted weight: `ΔW = alpha / rank · up · down + S`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import AdapterError, read_adapters
from lib_precision_lora.branch import EffectiveWeight, PatchSession
from lib_precision_lora.storage import stored_weight
from tests.families import family

SHAPES = [(16, 12), (8, 6, 3, 3), (8, 6, 1, 1)]


def extracted(
    shape: tuple[int, ...], alpha: float = 6.0, dtype: torch.dtype = torch.float32, share: float = 0.1
) -> tuple[dict[str, Tensor], Tensor]:
    """A layer as LyCORIS's extraction writes it, and ΔW in float64."""
    g = torch.Generator().manual_seed(7)
    columns = torch.Size(shape[1:]).numel()
    up = torch.randn(shape[0], 3, *(1 for _ in shape[2:]), generator=g).to(dtype)
    down = torch.randn(3, *shape[1:], generator=g).to(dtype)
    kept = torch.rand(shape[0], columns, generator=g) < share
    rest = (torch.randn(shape[0], columns, generator=g) * kept).to(dtype)
    sparse = rest.to_sparse().coalesce()
    tensors = {
        "lora_up.weight": up,
        "lora_down.weight": down,
        "alpha": torch.tensor([alpha]),
        "bias_indices": sparse.indices().to(torch.int16),
        "bias_values": sparse.values(),
        "bias_size": torch.tensor(rest.shape).to(torch.int16),
    }
    low_rank = alpha / 3 * (up.double().flatten(1) @ down.double().flatten(1))
    return tensors, (low_rank + rest.double()).reshape(shape)


def read(tensors: dict[str, Tensor]) -> object:
    return read_adapters({f"layer.{key}": value for key, value in tensors.items()})


def adapter_of(tensors: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    file = read_adapters({f"layer.{key}": value for key, value in tensors.items()})
    assert (file.unmatched, file.findings) == ((), ())
    return file["layer"]


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rest_is_added_whatever_the_scale_of_the_low_rank_part(
    shape: tuple[int, ...], dtype: torch.dtype, strength: float
) -> None:
    tensors, delta = extracted(shape, dtype=dtype)
    adapter = adapter_of(tensors)
    adapter.check(shape)
    weight = EffectiveWeight.identity(stored_weight(torch.randn(shape))).apply(adapter, strength)
    actual = weight.delta(torch.float64)
    assert float((actual - strength * delta).norm()) <= 1e-6 * float(delta.norm())
    without = dict(tensors)
    for part in ("bias_indices", "bias_values", "bias_size"):
        del without[part]
    plain = EffectiveWeight.identity(stored_weight(torch.randn(shape))).apply(adapter_of(without))
    assert float((plain.delta(torch.float64) - delta).norm()) > 0.01 * float(delta.norm())


@pytest.mark.parametrize("compute", ["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_forward_multiplies_with_the_merged_weight(shape: tuple[int, ...], compute: str) -> None:
    tensors, delta = extracted(shape)
    layer: nn.Module = nn.Linear(12, 16) if len(shape) == 2 else nn.Conv2d(6, 8, shape[2:])
    model = nn.ModuleDict({"layer": layer}).requires_grad_(False)
    x = torch.randn(3, 5, 12) if len(shape) == 2 else torch.randn(3, 6, 9, 7)
    exact = nn.Linear(12, 16) if len(shape) == 2 else nn.Conv2d(6, 8, shape[2:])
    exact.load_state_dict(layer.state_dict())
    exact = exact.double().requires_grad_(False)
    exact.weight += 0.7 * delta
    expected, before = exact(x.double()), layer(x)
    with PatchSession(model) as session:
        session.apply([("file", {"layer.weight": adapter_of(tensors)}, 0.7)], compute)
        y = layer(x)
    tolerance = 1e-5 if compute == "fp32" else 2e-3
    assert float((y - expected).norm()) <= tolerance * float((expected - before).norm())
    assert torch.equal(layer(x), before)


def test_values_at_one_place_add_up_and_rows_may_be_asked_for_twice() -> None:
    tensors, delta = extracted((16, 12))
    tensors["bias_indices"] = torch.cat([tensors["bias_indices"]] * 2, 1)
    tensors["bias_values"] = torch.cat([tensors["bias_values"] / 2] * 2)
    rest = adapter_of(tensors).rest
    whole = rest.rows(torch.arange(16), torch.float64)
    numbers = torch.tensor([3, 3, 15, 0, 3])
    assert torch.equal(rest.rows(numbers, torch.float64), whole[numbers])
    order = torch.randperm(16, generator=torch.manual_seed(0))
    assert torch.equal(rest.reordered(order).rows(torch.arange(16), torch.float64), whole[order])
    actual = EffectiveWeight.identity(stored_weight(torch.randn(16, 12))).apply(adapter_of(tensors))
    assert float((actual.delta(torch.float64) - delta).norm()) <= 1e-6 * float(delta.norm())


def test_what_is_held_is_as_much_as_the_file_has() -> None:
    """Not the dense matrix: a sparse rest of 1 % stays one of 1 %."""
    tensors, _ = extracted((512, 512), share=0.01)
    rest = adapter_of(tensors).rest
    held = sum(tensor.numel() * tensor.element_size() for tensor in rest.tensors())
    assert held <= 12 * tensors["bias_values"].numel() < 512 * 512


@pytest.mark.parametrize("name", ["loha", "lokr-full", "lokr-right"])
def test_it_may_stand_beside_every_additive_family(name: str) -> None:
    rest = {key: value for key, value in extracted((16, 12))[0].items() if key.startswith("bias_")}
    plain = EffectiveWeight.identity(stored_weight(torch.zeros(16, 12)))
    tensors = family(name, (16, 12)).tensors
    together = plain.apply(adapter_of(tensors | rest)).delta(torch.float64)
    alone = plain.apply(adapter_of(dict(tensors))).delta(torch.float64)
    dense = torch.sparse_coo_tensor(
        rest["bias_indices"].long(), rest["bias_values"].double(), (16, 12)
    ).to_dense()
    torch.testing.assert_close(together, alone + dense, rtol=1e-6, atol=1e-7)


NAN = float("nan")
DAMAGED = {
    "no indices": ({"bias_indices": None}, "bias_indices is missing"),
    "no values": ({"bias_values": None}, "bias_values is missing"),
    "no size": ({"bias_size": None}, "bias_size is missing"),
    "NaN": ({"bias_values": torch.full((21,), NAN)}, "bias_values holds 21 NaN"),
    "integers": ({"bias_values": torch.ones(21).int()}, "bias_values is stored as torch.int32"),
    "fewer values": (
        {"bias_values": torch.ones(3)},
        r"do not meet \(bias_indices \[2, 21\], bias_values \[3\]\)",
    ),
    "a row outside": ({"bias_indices": torch.full((2, 21), 16).short()}, "outside of the 16×12"),
    "a negative row": ({"bias_indices": torch.full((2, 21), -1).short()}, "outside of the 16×12"),
    "fractions": ({"bias_indices": torch.ones(2, 21)}, "no whole numbers"),
    "a size of three": ({"bias_size": torch.tensor([16, 12, 1])}, "no whole numbers of a matrix"),
    "a DoRA": ({"dora_scale": torch.ones(16, 1)}, "beside a DoRA scale is not supported"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_rest_is_refused_in_one_sentence(damage: str) -> None:
    changed, message = DAMAGED[damage]
    tensors, _ = extracted((16, 12))
    count = tensors["bias_values"].numel()
    assert count == 21
    parts = {key: value for key, value in (tensors | changed).items() if value is not None}
    with pytest.raises(AdapterError, match=rf"^layer: .*{message}") as caught:
        read(parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(17, 12), (16, 13), (2**31 - 1, 2**31 - 1)])
def test_a_rest_of_another_models_size_is_refused_before_it_is_made(size: tuple[int, int]) -> None:
    tensors, _ = extracted((16, 12))
    adapter = adapter_of(tensors | {"bias_size": torch.tensor(size)})
    with pytest.raises(AdapterError, match=rf"{size[0]}×{size[1]} .* 16×12"):
        adapter.check((16, 12))
