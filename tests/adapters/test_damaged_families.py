"""Law 5 for every family: what is damaged or of another model is refused in one sentence with the numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lib_precision_lora.adapters import Adapter, AdapterError, read_adapters
from lib_precision_lora.branch import EffectiveWeight
from lib_precision_lora.storage import stored_weight
from tests.families import FAMILIES, OUTPUT_ROTATIONS, family

NAN, INF = float("nan"), float("inf")
SHAPE = (16, 12)
PARTS = [
    ("loha", "hada_w1_a"),
    ("loha", "hada_w1_b"),
    ("loha", "hada_w2_a"),
    ("loha", "hada_w2_b"),
    ("loha-tucker", "hada_t2"),
    ("lokr-right", "lokr_w1"),
    ("lokr-both", "lokr_w1_a"),
    ("lokr-both", "lokr_w1_b"),
    ("lokr-full", "lokr_w2"),
    ("lokr-right", "lokr_w2_a"),
    ("lokr-right", "lokr_w2_b"),
    ("glora", "a1.weight"),
    ("glora", "a2.weight"),
    ("glora", "b1.weight"),
    ("glora", "b2.weight"),
    ("dora-out", "lora_up.weight"),
    ("dora-in", "lora_down.weight"),
]
VALUES = [
    (name, key)
    for name in FAMILIES
    for key, tensor in family(name, SHAPE).tensors.items()
    if key not in ("alpha", "on_input") and tensor.is_floating_point()
]


def read(tensors: dict[str, Tensor]) -> Adapter:
    return read_adapters({f"block_7.{key}": value for key, value in tensors.items()})["block_7"]


def assert_one_sentence(error: BaseException) -> None:
    message = str(error)
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 300


@pytest.mark.parametrize(("name", "key"), PARTS)
def test_a_missing_part_is_named(name: str, key: str) -> None:
    tensors = dict(family(name, SHAPE).tensors)
    del tensors[key]
    role = key.removesuffix(".weight")
    missing = {"lokr_w1": "lokr_w1_a", "lokr_w2": "lokr_w2_a"}.get(role, role)
    with pytest.raises(AdapterError, match=rf"^block_7: {missing} is missing") as caught:
        read(tensors)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("number", [NAN, INF])
@pytest.mark.parametrize(("name", "key"), VALUES)
def test_nan_and_infinity_are_named_with_their_count(name: str, key: str, number: float) -> None:
    tensors = dict(family(name, SHAPE).tensors)
    damaged = tensors[key].clone()
    damaged.view(-1)[1:3] = number
    with pytest.raises(
        AdapterError, match=rf"^block_7: \w+ holds 2 NaN or inf values of {damaged.numel()}"
    ) as caught:
        read(tensors | {key: damaged})
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(("name", "key"), VALUES)
def test_a_factor_without_values_is_named_whichever_of_its_sizes_is_zero(name: str, key: str) -> None:
    tensors = dict(family(name, SHAPE).tensors)
    for axis in range(tensors[key].ndim):
        empty = tensors[key].narrow(axis, 0, 0)
        with pytest.raises(AdapterError, match=r"^block_7: \w+ has shape .* holds no values") as caught:
            read(tensors | {key: empty})
        assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    ("name", "key"), [part for part in VALUES if part[0].startswith(("lora", "loha", "lokr", "glora"))]
)
def test_a_factor_with_a_kernel_of_one_is_the_matrix_that_it_means(name: str, key: str) -> None:
    """Or it is refused: a core's kernel is the layer's."""
    made = family(name, SHAPE)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    try:
        adapter = read(dict(made.tensors) | {key: made.tensors[key][..., None, None]})
    except AdapterError as error:
        assert "_t" in key or "bm" in key
        assert_one_sentence(error)
        return
    effective = EffectiveWeight.identity(stored_weight(weight)).apply(adapter)
    delta = made.full(weight.double()) - weight
    assert (effective.delta(torch.float64) - delta).norm() / delta.norm() < 1e-6


@pytest.mark.parametrize(("right", "fits"), [((4, 1, 3, 3), True), ((4, 9), True), ((4, 3), False)])
def test_a_kernel_that_the_right_factor_of_a_lokr_does_not_have_fits_no_convolution(
    right: tuple[int, ...], fits: bool
) -> None:
    """Its columns alone are as many: [1, 9] ⊗ [4, 3] is no kernel of 3 × 3 over three channels."""
    left = torch.ones(1, 27 // math.prod(right[1:]))
    adapter = read({"lokr_w1": left, "lokr_w2": torch.ones(right)})
    if fits:
        adapter.check((4, 3, 3, 3))
        return
    with pytest.raises(AdapterError, match="right factor has 3 columns, which the layer's kernel of 9"):
        adapter.check((4, 3, 3, 3))
    adapter.check((4, 27))


@pytest.mark.parametrize("name", ["dora-out", "dora-in", "loha-dora-out", "lokr-dora-in"])
def test_a_dora_scale_that_is_one_number_fits_no_layer(name: str) -> None:
    adapter = read(dict(family(name, SHAPE).tensors) | {"dora_scale": torch.tensor(1.0)})
    with pytest.raises(AdapterError, match="dora_scale has 1 values, the layer has 16"):
        adapter.check(SHAPE)


def test_of_sizes_without_values_nothing_is_computed() -> None:
    """So many butterfly stages would be a power of two of 2⁴⁰ digits."""
    for shape in ((2**40, 0, 4, 4), (0, 4, 4, 4), (2, 4, 0, 0), (0, 4, 4)):
        with pytest.raises(AdapterError, match="holds no values"):
            read({"oft_blocks": torch.empty(shape)})


@pytest.mark.parametrize("alpha", [torch.tensor(NAN), torch.tensor(INF), torch.ones(2)])
@pytest.mark.parametrize("name", ["loha", "lokr-right", "glora", "dora-out", "oft-constraint", "boft"])
def test_an_alpha_that_is_no_number_is_refused(name: str, alpha: Tensor) -> None:
    with pytest.raises(AdapterError, match=r"^block_7: alpha (is (nan|inf)|has 2 values)"):
        read(dict(family(name, SHAPE).tensors) | {"alpha": alpha})


DAMAGED = {
    "loha of two ranks": (
        "loha",
        {"hada_w1_a": torch.ones(16, 2)},
        r"factors do not meet .*\[16, 2\].*\[3, 12\]",
    ),
    "loha of two heights": ("loha", {"hada_w1_a": torch.ones(15, 3)}, r"do not meet .*\[15, 3\].*\[16, 3\]"),
    "loha of two widths": ("loha", {"hada_w1_b": torch.ones(3, 11)}, r"factors do not meet .*\[3, 11\]"),
    "loha of vectors": ("loha", {"hada_w1_a": torch.ones(16)}, r"\[16\]"),
    "loha of rank zero": (
        "loha",
        {
            f"hada_w{n}_{part}": torch.ones(shape)
            for n in "12"
            for part, shape in (("a", (16, 0)), ("b", (0, 12)))
        },
        "rank is zero",
    ),
    "loha core": ("loha-tucker", {"hada_t1": torch.ones(2, 5, 1)}, r"\[2, 5, 1\]"),
    "lokr left": ("lokr-both", {"lokr_w1_a": torch.ones(4, 3)}, r"lokr_w1_a \[4, 3\], lokr_w1_b \[2, 4\]"),
    "lokr right": ("lokr-right", {"lokr_w2_a": torch.ones(4, 3)}, r"lokr_w2_a \[4, 3\], lokr_w2_b \[2, 3\]"),
    "lokr core": ("lokr-tucker", {"lokr_t2": torch.ones(2, 5, 1)}, r"\[2, 5, 1\]"),
    "lokr core beside w2_a": ("lokr-tucker", {"lokr_w2_a": torch.ones(3, 4)}, "lokr_w2_a"),
    "lokr with a kernel on the left": (
        "lokr-full",
        {"lokr_w1": torch.ones(4, 4, 3, 3)},
        r"lokr_w1 has shape \[4, 4, 3, 3\], and a kernel belongs to the right factor",
    ),
    "lokr of vectors": ("lokr-full", {"lokr_w1": torch.ones(4)}, r"\[4\]"),
    "glora": ("glora", {"a2.weight": torch.ones(2, 12)}, r"factors do not meet .*a2 \[2, 12\]"),
    "glora of vectors": ("glora", {"a1.weight": torch.ones(12)}, r"a1 has shape \[12\]"),
    "glora core": (
        "glora-tucker",
        {"bm.weight": torch.ones(3, 5, 1)},
        r"bm has shape \[3, 5, 1\], which does not meet b2 \[3, 12\]",
    ),
    "glora core of another rank": ("glora-tucker", {"bm.weight": torch.ones(5, 3, 1)}, "factors do not meet"),
    "oft blocks that are not square": ("oft", {"oft_blocks": torch.ones(4, 4, 3)}, r"\[4, 4, 3\]"),
    "oft blocks without a count": ("oft", {"oft_blocks": torch.ones(4, 4)}, r"\[4, 4\]"),
    "boft blocks of odd size": ("boft", {"oft_blocks": torch.ones(2, 4, 3, 3)}, r"\[2, 4, 3, 3\]"),
    "boft of too many stages": ("boft", {"oft_blocks": torch.ones(5, 4, 4, 4)}, r"\[5, 4, 4, 4\]"),
    "rescale": ("oft-rescale", {"rescale": torch.ones(12, 1)}, "rescale has 12 values, .* 16 outputs"),
    "dora scale": ("dora-out", {"dora_scale": torch.ones(15, 1)}, r"\[15, 1\].* 16 outputs"),
    "no triangle": (
        "oft-peft",
        {"oft_R.weight": torch.ones(3, 7)},
        r"\[3, 7\], not \[blocks",
    ),
    "no triangles": ("oft-peft", {"oft_R.weight": torch.ones(0, 6)}, r"oft_R has shape \[0, 6\]"),
    "triangles of nothing": ("oft-peft", {"oft_R.weight": torch.ones(12, 0)}, r"oft_R has shape \[12, 0\]"),
    "a flat triangle": ("oft-peft", {"oft_R.weight": torch.ones(6)}, r"oft_R has shape \[6\]"),
    "an integer triangle": ("oft-peft", {"oft_R.weight": torch.ones(3, 6).int()}, "torch.int32"),
    "oft with a dora scale": ("oft-peft", {"dora_scale": torch.ones(16, 1)}, "DoRA scale is not supported"),
    "boft of inputs, not square": (
        "boft-peft",
        {"boft_R": torch.ones(1, 3, 4, 3)},
        r"boft_R has shape \[1, 3, 4, 3\], not \[stages, blocks, b, b\]",
    ),
    "boft of inputs without stages": ("boft-peft", {"boft_R": torch.ones(3, 4, 4)}, r"\[3, 4, 4\]"),
    "boft of inputs of too many stages": (
        "boft-peft",
        {"boft_R": torch.ones(2, 3, 4, 4)},
        r"3 blocks of 4 do not make 2 butterfly stages",
    ),
    "boft of inputs of odd blocks": (
        "boft-peft",
        {"boft_R": torch.ones(2, 4, 3, 3)},
        r"4 blocks of 3 do not make 2 butterfly stages",
    ),
    "an integer factor": ("loha", {"hada_w1_a": torch.ones(16, 3).int()}, "torch.int32"),
    "an integer rotation": ("oft", {"oft_blocks": torch.ones(4, 4, 4).int()}, "torch.int32"),
    "an integer scale": ("dora-out", {"dora_scale": torch.ones(16, 1).int()}, "torch.int32"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_parts_that_do_not_meet_are_refused_with_their_shapes(damage: str) -> None:
    name, changed, message = DAMAGED[damage]
    with pytest.raises(AdapterError, match=rf"^block_7: .*{message}") as caught:
        read(family(name, SHAPE).tensors | changed)
    assert_one_sentence(caught.value)


def test_a_dora_scale_of_the_wrong_number_of_inputs_is_refused_with_both() -> None:
    adapter = read(family("dora-in", SHAPE).tensors | {"dora_scale": torch.ones(1, 11)})
    with pytest.raises(AdapterError, match="dora_scale has 11 values, the layer has 12 inputs"):
        adapter.check(SHAPE)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(18, 12), (16, 14), (18, 10), (16,)])
def test_an_adapter_of_another_models_shape_is_refused_with_numbers(
    name: str, shape: tuple[int, ...]
) -> None:
    adapter = family(name, SHAPE).adapter
    adapter.check(SHAPE)
    blind_to_inputs = ("ia3-out", "ia3-peft-out", *OUTPUT_ROTATIONS)
    blind_to_outputs = ("ia3-in", "ia3-peft-in", "oft-peft", "oft-peft-shared")
    if shape[0] == 16 and name in blind_to_inputs:
        adapter.check(shape)
        return
    if shape == (18, 12) and name in blind_to_outputs:
        adapter.check(shape)
        return
    with pytest.raises(AdapterError, match=r"\d+|vector") as caught:
        adapter.check(shape)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("oft", (18, 12), "the oft blocks of 4 make 16 outputs, the layer has 18:"),
    ("boft", (18, 12), "the boft blocks of 4 make 16 outputs, the layer has 18:"),
    ("oft-peft", (16, 14), "the oft blocks of 4 turn 12 inputs, the layer has 14:"),
    ("oft-peft", (16, 2, 3, 3), "the oft blocks of 4 turn 12 inputs, the layer has 18:"),
    ("oft-peft-shared", (16, 14), "the shared oft block of 4 does not divide the layer's 14 inputs:"),
    ("boft-peft", (16, 24), "the boft blocks of 4 turn 12 inputs, the layer has 24:"),
    ("boft-peft", (18, 12), "the boft scale has 16 values, the layer has 18 outputs:"),
])  # fmt: skip
def test_a_rotation_that_does_not_fit_is_refused_with_its_blocks(
    name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(AdapterError, match=f"^{message} the file was trained on another model$"):
        family(name, SHAPE).adapter.check(shape)
