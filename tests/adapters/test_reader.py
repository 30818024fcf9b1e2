"""From a file's keys to adapters: every layout, key maps, and what is left over."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lib_precision_lora.adapters import AdapterError, Assign, Diff, LoRA, Target, read_adapters
from tests.oracles import lora_delta, swap_halves

LAYOUTS = {
    "kohya": ("{}.lora_up.weight", "{}.lora_down.weight", "kohya"),
    "PEFT": ("{}.lora_B.weight", "{}.lora_A.weight", "PEFT"),
    "PEFT with an adapter's name": ("{}.lora_B.default.weight", "{}.lora_A.default.weight", "PEFT"),
    "diffusers": ("{}.lora.up.weight", "{}.lora.down.weight", "diffusers"),
    "attention processors": ("{}_lora.up.weight", "{}_lora.down.weight", "diffusers attention processors"),
    "text encoder": (
        "{}.lora_linear_layer.up.weight",
        "{}.lora_linear_layer.down.weight",
        "diffusers text encoder",
    ),
}


def pair(out: int = 6, rank: int = 2, columns: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=g), torch.randn(rank, columns, generator=g)


def values(adapter: object, shape: tuple[int, ...]) -> Tensor:
    """ΔW at strength 1 from what the adapter says of itself."""
    assert isinstance(adapter, LoRA)
    return (adapter.scale * (adapter.up.double() @ adapter.down.double())).reshape(shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alpha", [None, 1.0, 8.0])
def test_every_layout_is_read(layout: str, alpha: float | None) -> None:
    up_key, down_key, name = LAYOUTS[layout]
    file: dict[str, Tensor] = {}
    for seed, module in enumerate(("block_0_to_q", "block.1.to_k")):
        file[up_key.format(module)], file[down_key.format(module)] = pair(seed=seed)
        if alpha is not None:
            file[f"{module}.alpha"] = torch.tensor(alpha)
    adapters = read_adapters(file)
    assert set(adapters) == {"block_0_to_q", "block.1.to_k"}
    assert adapters.layout == name
    assert adapters.unmatched == ()
    for seed, module in enumerate(adapters):
        adapter = adapters[module]
        assert (adapter.kind, adapter.rank) == ("lora", 2)
        torch.testing.assert_close(values(adapter, (6, 5)), lora_delta(*pair(seed=seed), alpha, (6, 5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_keep_the_precision_and_the_memory_of_their_file(dtype: torch.dtype) -> None:
    up, down = (factor.to(dtype) for factor in pair())
    (adapter,) = read_adapters({"a.lora_up.weight": up, "a.lora_down.weight": down}).values()
    assert isinstance(adapter, LoRA)
    for mine, its in ((adapter.up, up), (adapter.down, down)):
        assert mine.dtype == dtype
        assert mine.data_ptr() == its.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_tensors_are_widened_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every[torch.isfinite(every.float())]
    assert finite.numel() > 200
    size = finite.numel() // 2
    up, down = finite[: 2 * size].view(size, 2), finite[: 2 * size].view(2, size)
    mid = finite[:4].view(2, 2, 1, 1)
    (adapter,) = read_adapters({"a.lora_up.weight": up, "a.lora_down.weight": down}).values()
    assert isinstance(adapter, LoRA)
    assert torch.equal(adapter.up.double(), up.double())
    assert torch.equal(adapter.down.double(), down.double())
    file = {"a.lora_up.weight": up, "a.lora_down.weight": down[:, :, None, None], "a.lora_mid.weight": mid}
    (adapter,) = read_adapters(file).values()
    torch.testing.assert_close(
        values(adapter, (size, size, 1, 1)),
        lora_delta(up, down, None, (size, size, 1, 1), mid),
        rtol=1e-5,
        atol=1e-3,
    )
    (whole,) = read_adapters({"a.diff": up}).values()
    assert isinstance(whole, Diff)
    assert torch.equal(whole.value.double(), up.double())


@pytest.mark.parametrize("kernel", [(1,), (3, 3), (1, 2, 3)])
def test_convolutions_and_tucker_cores_are_folded(kernel: tuple[int, ...]) -> None:
    g, ones = torch.Generator().manual_seed(1), (1,) * len(kernel)
    up, shape = torch.randn(6, 2, *ones, generator=g), (6, 5, *kernel)
    down, mid = torch.randn(2, 5, *kernel, generator=g), torch.randn(2, 3, *kernel, generator=g)
    (adapter,) = read_adapters({"a.lora_up.weight": up, "a.lora_down.weight": down}).values()
    torch.testing.assert_close(values(adapter, shape), lora_delta(up, down, None, shape))
    adapter.check(shape)
    inner = torch.randn(3, 5, *ones, generator=g)
    file = {
        "a.lora_up.weight": up,
        "a.lora_down.weight": inner,
        "a.lora_mid.weight": mid,
        "a.alpha": torch.tensor(6.0),
    }
    (adapter,) = read_adapters(file).values()
    torch.testing.assert_close(
        values(adapter, shape), lora_delta(up, inner, 6.0, shape, mid), rtol=1e-5, atol=1e-5
    )
    adapter.check(shape)


def test_a_convolution_of_one_position_fits_a_linear_weight() -> None:
    up, down = pair()
    file = {"a.lora_up.weight": up[:, :, None, None], "a.lora_down.weight": down[:, :, None, None]}
    (adapter,) = read_adapters(file).values()
    adapter.check((6, 5))


def test_dense_patches_and_biases_are_read() -> None:
    file = {
        "full.diff": torch.ones(3, 4),
        "full.diff_b": torch.ones(3),
        "norm.w_norm": torch.ones(5),
        "norm.b_norm": torch.zeros(5),
        "scale.set_weight": torch.ones(7),
        "both.lora_up.weight": torch.ones(3, 1),
        "both.lora_down.weight": torch.ones(1, 3),
        "both.diff_b": torch.ones(3),
        "bias_only.diff_b": torch.ones(2),
    }
    adapters = read_adapters(file)
    kinds = {name: adapter.kind for name, adapter in adapters.items()}
    assert kinds == {
        "full": "diff",
        "full.bias": "diff",
        "norm": "diff",
        "norm.bias": "diff",
        "scale": "set",
        "both": "lora",
        "both.bias": "diff",
        "bias_only.bias": "diff",
    }
    assert isinstance(adapters["scale"], Assign)
    assert adapters.unmatched == ()
    assert len(adapters) == 8


def test_a_key_map_gives_whole_weights_rows_and_row_functions() -> None:
    up, down = pair()
    names = ("whole", "rows", "swapped", "rows_swapped", "target")
    file = {f"{name}.lora_up.weight": up for name in names} | {
        f"{name}.lora_down.weight": down for name in names
    }
    file |= {"rows.diff_b": torch.ones(6), "whole.diff_b": torch.ones(6)}
    key_map = {
        "whole": "model.whole.weight",
        "rows": ("model.qkv.weight", (0, 6, 6)),
        "swapped": ("model.ada.weight", None, swap_halves),
        "rows_swapped": ("model.qkv.weight", (0, 12, 6), swap_halves),
        "target": Target("model.other.weight", (2, 6)),
        "unused": "model.unused.weight",
    }
    assert set(read_adapters(file, key_map)) == {
        "model.whole.weight",
        "model.whole.bias",
        Target("model.qkv.weight", (6, 6)),
        Target("model.qkv.bias", (6, 6)),
        Target("model.ada.weight", None, swap_halves),
        Target("model.qkv.weight", (12, 6), swap_halves),
        Target("model.other.weight", (2, 6)),
    }


UNMATCHED: Mapping[str, tuple[list[str], list[str]]] = {
    "an unknown ending": (["a.lora_magic"], ["a.lora_magic"]),
    "a module the map lacks": (["z.lora_up.weight", "z.lora_down.weight", "z.alpha"],) * 2,
    "an alpha alone": (["a.alpha"], ["a.alpha"]),
    "a core alone": (["a.lora_mid.weight"], ["a.lora_mid.weight"]),
    "a diff beside a LoRA": (["a.lora_up.weight", "a.lora_down.weight", "a.diff"], ["a.diff"]),
    "a diff beside a set": (["a.set_weight", "a.diff"], ["a.diff"]),
    "an unknown key that is a module's name": (["a", "a.lora_up.weight", "a.lora_down.weight"], ["a"]),
    "the same factor twice": (
        ["a.lora_up.weight", "a.lora_down.weight", "a.lora_B.weight"],
        ["a.lora_up.weight"],
    ),
}


@pytest.mark.parametrize("case", UNMATCHED)
def test_every_key_that_goes_into_no_adapter_is_listed(case: str) -> None:
    keys, expected = UNMATCHED[case]
    file = {key: torch.ones(1) if key.endswith("alpha") else torch.ones(1, 1) for key in keys}
    file |= {"b.lora_up.weight": torch.ones(2, 1), "b.lora_down.weight": torch.ones(1, 2)}
    adapters = read_adapters(file, {"a": "model.a.weight", "b": "model.b.weight"})
    assert sorted(adapters.unmatched) == sorted(expected)
    assert "model.b.weight" in adapters


def test_an_empty_file_and_a_foreign_one_have_no_adapters() -> None:
    for file in ({}, {"state.weight": torch.ones(2)}):
        adapters = read_adapters(file)
        assert len(adapters) == 0
        assert adapters.layout == "unknown"
        assert adapters.unmatched == tuple(file)


def test_the_commonest_layout_names_the_file() -> None:
    file: dict[str, Tensor] = {}
    for name in ("a", "b"):
        file[f"{name}.lora_B.weight"], file[f"{name}.lora_A.weight"] = pair()
    file["c.lora_up.weight"], file["c.lora_down.weight"] = pair()
    assert read_adapters(file).layout == "PEFT"


def test_an_adapter_error_is_a_value_error() -> None:
    assert issubclass(AdapterError, ValueError)
