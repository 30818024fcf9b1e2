"""comfy-kitchen's `QuantizedTensor`, against the package where it is installed, and what is refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib_precision_lora.storage import StorageError, encode, stored_weight
from lib_precision_lora.storage.quantized_tensor.block_scaled import scale_rows, tiled
from lib_precision_lora.storage.quantized_tensor.integers import rotated
from tests.storage.quantized_tensors import (
    MAKERS,
    Params,
    StandInTensor,
    hadamard,
    in_tiles,
)

INT8, NVFP4, MXFP8 = "TensorWiseINT8Layout", "TensorCoreNVFP4Layout", "TensorCoreMXFP8Layout"
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "comfy-fp8-e4m3fn-scaled": ("TensorCoreFP8Layout", {"scale": "recalculate"}),
    "comfy-fp8-e5m2-scaled": ("TensorCoreFP8Layout", {"dtype": torch.float8_e5m2}),
    "comfy-nvfp4": (NVFP4, {}),
    "comfy-mxfp8": (MXFP8, {}),
    "comfy-int8": (INT8, {}),
    "comfy-int8-by-row": (INT8, {"per_channel": True}),
    "comfy-int8-convrot": (INT8, {"per_channel": True, "convrot": True, "convrot_groupsize": 64}),
    "comfy-int4-convrot": ("TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 64}),
}
"""The package's layout of each format, and how it is asked for."""

NAMES = pytest.mark.parametrize("name", LAYOUTS)
SHAPES = pytest.mark.parametrize("shape", [(272, 512), (100, 64), (48, 192)])


def noise(*shape: int, seed: int = 1) -> Tensor:
    return 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def kitchen() -> Any:
    return pytest.importorskip(
        "comfy_kitchen.tensor", reason="needs comfy-kitchen: pip install --no-deps comfy-kitchen"
    )


def made_by(kitchen: Any, name: str, matrix: Tensor) -> nn.Module:
    """A layer as Forge Neo's: a parameter around the package's tensor."""
    layout, options = LAYOUTS[name]
    module = nn.Module()
    tensor = kitchen.QuantizedTensor.from_float(matrix, layout, **options)
    module.weight = nn.Parameter(tensor, requires_grad=False)
    return module


def test_every_stand_in_has_its_layout_of_the_package() -> None:
    assert set(LAYOUTS) == set(MAKERS)


@NAMES
@SHAPES
def test_values_are_those_of_the_package_in_fp32(kitchen: Any, name: str, shape: tuple[int, int]) -> None:
    """But for a few units in the last place: it rounds in another order, and multiplies by a rotation."""
    matrix = noise(*shape)
    module = made_by(kitchen, name, matrix)
    stored = stored_weight(module.weight, module)
    theirs = module.weight.dequantize()
    assert theirs.dtype == torch.float32
    assert stored.shape == shape
    largest = float(theirs.abs().max())
    assert float((stored.dense() - theirs).abs().max()) <= 1e-6 * largest
    assert torch.equal(stored.rows(17, 31), stored.dense()[17:31])


@NAMES
def test_the_bf16_of_the_tensor_is_not_that_of_its_values(kitchen: Any, name: str) -> None:
    """Forge Neo decodes in bf16; the format says more."""
    module = made_by(kitchen, name, noise(128, 256).bfloat16())
    assert module.weight.dtype == torch.bfloat16
    stored = stored_weight(module.weight, module)
    wide = module.weight.to(torch.float32).dequantize()
    largest = float(wide.abs().max())
    assert float((stored.dense() - wide).abs().max()) <= 1e-6 * largest
    if name != "comfy-mxfp8":  # whose values bf16 holds
        rounded = module.weight.dequantize().float()
        assert float((stored.dense() - rounded).abs().max()) > 1e-4 * largest


@NAMES
@SHAPES
def test_bytes_are_all_that_the_package_stores(kitchen: Any, name: str, shape: tuple[int, int]) -> None:
    module = made_by(kitchen, name, noise(*shape))
    tensors = module.weight.state_dict("weight").values()
    assert stored_weight(module.weight, module).nbytes == sum(tensor.nbytes for tensor in tensors)


@NAMES
def test_a_stand_in_is_made_of_the_bytes_that_the_package_makes(kitchen: Any, name: str) -> None:
    """But where two codes are as near, or a scale is rounded in another order."""
    matrix = noise(48, 64)
    own, package = MAKERS[name](matrix), made_by(kitchen, name, matrix).weight
    assert own.parameter._qdata.dtype == package._qdata.dtype
    assert own.parameter._qdata.shape[1] == package._qdata.shape[1]
    rows = min(len(own.parameter._qdata), len(package._qdata))
    same = own.parameter._qdata[:rows].view(torch.uint8) == package._qdata[:rows].view(torch.uint8)
    assert float(same.float().mean()) > 0.99
    for field in ("scale", "block_scale"):
        theirs = getattr(package._params, field, None)
        if theirs is not None:
            mine = getattr(own.parameter._params, field)
            assert (mine.dtype, mine.numel()) == (theirs.dtype, theirs.numel())
    assert hasattr(package._params, "convrot") == (LAYOUTS[name][0] == INT8)
    assert package._params.transposed is False if hasattr(package._params, "transposed") else "fp8" in name


@NAMES
@SHAPES
def test_what_is_written_is_at_least_as_near_as_the_package_makes_it(
    kitchen: Any, name: str, shape: tuple[int, int]
) -> None:
    module, values = made_by(kitchen, name, noise(*shape)), noise(*shape, seed=2)
    result = encode(module, "weight", module.weight, values)
    theirs = stored_weight(made_by(kitchen, name, values).weight)
    error, limit = (float((each.dense() - values).norm()) for each in (result.weight, theirs))
    assert error <= limit * 1.15  # with the scale that is there; theirs is made for these values
    assert error <= limit * (1 + 1e-6) or "mxfp8" not in name


@NAMES
@SHAPES
def test_the_package_reads_what_is_written_as_we_do(kitchen: Any, name: str, shape: tuple[int, int]) -> None:
    module = made_by(kitchen, name, noise(*shape))
    values = 1.5 * noise(*shape, seed=2)
    result = encode(module, "weight", module.weight, values)
    before = module.weight.state_dict("weight")
    after = {key: result.entries.get(key, value) for key, value in before.items()}
    assert all(
        (after[key].dtype, after[key].shape) == (before[key].dtype, before[key].shape) for key in before
    )
    params, scales = module.weight._params, {"scale": after["weight_scale"]}
    if "weight_scale_2" in after:
        scales = {"scale": after["weight_scale_2"], "block_scale": after["weight_scale"]}
    again = kitchen.QuantizedTensor(
        after["weight"], module.weight._layout_cls, dataclasses.replace(params, **scales)
    )
    largest = float(values.abs().max())
    assert float((again.dequantize() - result.weight.dense()).abs().max()) <= 1e-6 * largest
    assert torch.equal(stored_weight(again).dense(), result.weight.dense())


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(MAKERS)),
    rows=st.integers(1, 280),
    columns=st.integers(1, 160),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_rows_of_any_shape_are_those_of_the_definition_to_the_bit(
    name: str, rows: int, columns: int, bounds: tuple[float, float]
) -> None:
    columns += -columns % 4 if "convrot" in name else 0
    made = MAKERS[name](noise(rows, columns))
    start, stop = sorted(round(bound * rows) for bound in bounds)
    stored = stored_weight(made.parameter)
    assert stored.shape == (rows, columns)
    assert torch.equal(stored.rows(start, stop), made.expected[start:stop])
    assert stored.nbytes == sum(part.numel() * part.element_size() for part in made.parts)


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (129, 5), (300, 17)])
def test_block_scales_lie_where_cublas_wants_them(shape: tuple[int, int]) -> None:
    scales = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    tiles = in_tiles(scales)
    assert torch.equal(tiled(scales), tiles)
    rows, blocks = shape
    assert torch.equal(scale_rows(tiles.view(-1), blocks, 0, rows), scales)
    assert torch.equal(scale_rows(tiles.view(-1), blocks, rows // 2, rows), scales[rows // 2 :])


@pytest.mark.parametrize("group", [4, 16, 64, 256, 1024])
def test_a_rotation_is_the_product_with_its_matrix_and_exact_for_integers(group: int) -> None:
    codes = torch.randint(-127, 128, (5, 2 * group), generator=torch.Generator().manual_seed(4))
    product = codes.double().view(5, 2, group) @ torch.from_numpy(hadamard(group))
    assert torch.equal(rotated(codes.float(), group).double(), product.view(5, -1))
    assert torch.equal(rotated(rotated(codes.float(), group), group), codes.float())


def test_every_code_of_e2m1_and_both_ends_of_e8m0_mean_what_their_standard_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    ones = torch.full((16, 2), 1.0).to(torch.float8_e4m3fn)
    params = Params(torch.tensor(1.0), (16, 32), block_scale=in_tiles(ones))
    values = stored_weight(StandInTensor(codes, NVFP4, params)).dense().flatten()
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table += [-value for value in table]
    assert values[0::2].tolist() == [table[byte >> 4] for byte in range(256)]
    assert values[1::2].tolist() == [table[byte & 15] for byte in range(256)]
    exponents = in_tiles(torch.tensor([[0], [1], [127], [254], [255]], dtype=torch.uint8))
    one = torch.ones(5, 32).to(torch.float8_e4m3fn)
    rows = stored_weight(StandInTensor(one, MXFP8, Params(exponents, (5, 32)))).dense()[:, 0]
    assert rows[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert rows[4].isnan()


def stand_in(name: str, **changes: Any) -> nn.Parameter:
    parameter = MAKERS[name](noise(48, 64)).parameter
    qdata = changes.pop("qdata", parameter._qdata)
    layout = changes.pop("layout", parameter._layout_cls)
    tensor = StandInTensor(qdata, layout, dataclasses.replace(parameter._params, **changes))
    return nn.Parameter(tensor, requires_grad=False)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("comfy-nvfp4", {"layout": "TensorCoreSVDQuantW4A4Layout"}, r"SVDQuantW4A4Layout .* not understood"),
        ("comfy-nvfp4", {"transposed": True}, "transposed TensorCoreNVFP4Layout"),
        ("comfy-nvfp4", {"orig_shape": (48, 999)}, r"nvfp4 weight of shape \[48, 999\] cannot be read"),
        ("comfy-nvfp4", {"block_scale": torch.zeros(128, 8)}, "needs 512 block scales"),
        ("comfy-nvfp4", {"scale": torch.ones(2)}, "2 scales of the whole tensor"),
        ("comfy-mxfp8", {"orig_shape": (99, 64)}, r"mxfp8 weight of shape \[99, 64\] cannot be read"),
        ("comfy-mxfp8", {"scale": torch.zeros(1)}, "needs 512 block scales"),
        ("comfy-int8", {"orig_shape": (48, 63)}, r"int8 weight of shape \[48, 63\] cannot be read"),
        ("comfy-int8-by-row", {"scale": torch.ones(47, 1)}, r"weight_scale of shape \[47, 1\] fits no int8"),
        ("comfy-int8-convrot", {"convrot_groupsize": 32}, "groups of 32 columns"),
        ("comfy-int8-convrot", {"convrot_groupsize": 256}, "groups of 256 columns"),
        ("comfy-int4-convrot", {"qdata": torch.zeros(48, 64, dtype=torch.int8)}, "int4-convrot weight"),
        ("comfy-fp8-e4m3fn-scaled", {"scale": None}, "no weight_scale"),
        ("comfy-fp8-e5m2-scaled", {"qdata": torch.zeros(48, 64)}, "cannot be read from torch.float32"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_with_the_numbers(
    name: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(StorageError, match=said):
        stored_weight(stand_in(name, **changes))


def test_a_layer_of_nunchaku_is_said_to_be_the_hosts_whatever_is_asked_of_it() -> None:
    class SVDQW4A4Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qweight = nn.Parameter(torch.zeros(8, 4, dtype=torch.int8), requires_grad=False)
            self.wscales = nn.Parameter(torch.ones(1, 8), requires_grad=False)
            self.proj_down = nn.Parameter(torch.ones(8, 2), requires_grad=False)
            self.bias = nn.Parameter(torch.ones(8), requires_grad=False)

    module = SVDQW4A4Linear()
    for parameter in module.parameters():
        with pytest.raises(StorageError, match=r"SVDQW4A4Linear is Nunchaku's .* stay the WebUI's own"):
            stored_weight(parameter, module)


def test_a_thing_that_only_looks_like_a_tensor_of_comfy_kitchen_is_an_ordinary_one() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    weight._qdata, weight._params = None, SimpleNamespace()
    assert stored_weight(weight).kind == "dense-fp32"
