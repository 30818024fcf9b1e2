"""Widened input layers: `W_eff = [W0 | 0] + Δ` on inputs of the layer's own channels, of all, or of some.

The oracle pads weight, changes and input with zeros in float64; the base keeps its bytes and its shape.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import pad

from lib_precision_lora.adapters import AdapterError, Target
from lib_precision_lora.branch import Compute, EffectiveWeight, Patch, PatchError, PatchSession
from lib_precision_lora.branch.session.compose import effective_weights
from lib_precision_lora.branch.session.fitted import FittedAdapters
from tests.branch.hosts import Holder, hooks_of, image_of, stored_holder
from tests.branch.meter import metered
from tests.branch.recipes import BASE_STD, generator, noise, recipe
from tests.families import family
from tests.oracles import Step, merge, swap_halves
from tests.storage.formats import VARIANTS

OUT, OWN, WIDE = 24, 256, 384
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3}
MATRIX = noise((OUT, OWN), generator(7), BASE_STD)
WEIGHT = "layer.weight"
ADDED = ("lora-rank-4-without-alpha", "lora-rank-16-bf16", "tucker-rank-4", "diff-bf16")
WIDENING = (*ADDED, "set-fp16")

Pairs = list[tuple[Patch, Step]]


def with_channels(weight: Tensor, channels: int) -> Tensor:
    """[out, in, *kernel] in float64 with zeros behind its own input channels."""
    return pad(weight.double(), (*(0, 0) * (weight.ndim - 2), 0, channels - weight.shape[1]))


def application(
    name: str, shape: tuple[int, ...], channels: int, strength: float = 1.0, seed: int = 0
) -> tuple[Patch, Step]:
    """A patch of this shape on an input layer, and what it means for a weight of so many channels."""
    made = recipe(name, shape, seed)
    patch = Patch("file", Target(WEIGHT), made.adapter, strength, widens=True)
    if made.delta is None:
        return patch, Step(made.change(), strength)
    delta = with_channels(made.delta, channels)
    return patch, Step(lambda weight, s: weight + s * delta, strength)


def effective(model: nn.Module, pairs: Pairs) -> EffectiveWeight:
    ((_, weight),) = effective_weights(model, [patch for patch, _ in pairs], FittedAdapters()).values()
    return weight


def assert_exact(model: nn.Module, base: Tensor, pairs: Pairs) -> None:
    """base: [W0 | 0] in float64."""
    weight, size = merge(base, [step for _, step in pairs])
    assert size > 0.0
    for dtype, limit in LIMITS.items():
        delta = effective(model, pairs).delta(dtype)
        assert delta.shape == base.shape
        assert float((delta.double() - (weight - base)).norm()) / size <= limit


@pytest.mark.parametrize("stored", VARIANTS)
def test_a_wider_adapter_on_every_stored_weight_is_the_float64_merge_of_the_padded_one(stored: str) -> None:
    holder, case = stored_holder(stored, MATRIX)
    base = with_channels(case.expected, WIDE)
    for name in WIDENING:
        assert_exact(holder, base, [application(name, (OUT, WIDE), WIDE, 0.8)])


@settings(max_examples=40, deadline=None)
@given(
    stack=st.lists(
        st.tuples(
            st.sampled_from(ADDED),
            st.sampled_from([1.0, -0.5, 2.0, 0.01]),
            st.sampled_from([OWN, OWN - 64, WIDE, WIDE - 64]),
        ),
        min_size=1,
        max_size=6,
    ),
    stored=st.sampled_from(["dense-bf16", "fp8-e4m3fn-scaled-by-row", "bnb-nf4", "gguf-Q4_K"]),
)
def test_any_stack_of_widths_is_the_float64_merge_of_the_padded_ones(
    stack: list[tuple[str, float, int]], stored: str
) -> None:
    holder, case = stored_holder(stored, MATRIX)
    channels = max(OWN, *(width for _, _, width in stack))
    pairs = [
        application(name, (OUT, width), channels, strength, seed)
        for seed, (name, strength, width) in enumerate(stack)
    ]
    assert_exact(holder, with_channels(case.expected, channels), pairs)


@pytest.mark.parametrize("name", ["lora-rank-8-fp16", "diff-fp32"])
def test_rows_a_row_function_and_a_base_factor_act_on_a_widened_layer(name: str) -> None:
    holder, case = stored_holder("dense-fp32", MATRIX)
    part, whole = recipe(name, (8, WIDE)), recipe(name, (OUT, WIDE))
    pairs = [
        (
            Patch("file", Target(WEIGHT, (8, 8)), part.adapter, 0.7, 0.9, widens=True),
            Step(part.change(), 0.7, (8, 8), 0.9),
        ),
        (
            Patch("file", Target(WEIGHT, None, swap_halves), whole.adapter, 0.5, widens=True),
            Step(whole.change(swap_halves), 0.5),
        ),
    ]
    assert_exact(holder, with_channels(case.expected, WIDE), pairs)


def layer_of(kind: str) -> tuple[nn.Module, Tensor, tuple[int, ...]]:
    """A layer, an input with three more channels than it has, and the shape of a weight that takes it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "linear":
            return nn.Linear(8, 12), torch.randn(2, 5, 11), (12, 11)
        if kind == "conv":
            layer = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")
            return layer, torch.randn(2, 7, 6, 5), (6, 7, 3, 3)
        return nn.Conv1d(4, 6, 3, stride=2), torch.randn(7, 9), (6, 7, 3)


def exact_forward(layer: nn.Module, pairs: Pairs, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The layer in float64 with the padded weight, merged, on x padded to its channels."""
    weight, _ = merge(with_channels(layer.weight, shape[1]), [step for _, step in pairs])
    axis = 1 - len(shape)
    x = pad(x.double(), (*(0, 0) * (-1 - axis), 0, shape[1] - x.shape[axis]))
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, layer.bias.double())
    conv = type(layer)(shape[1], shape[0], layer.kernel_size, layer.stride, layer.padding)
    conv.padding_mode, conv._reversed_padding_repeated_twice = (
        layer.padding_mode,
        layer._reversed_padding_repeated_twice,
    )
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(layer.bias.double())
    return conv(x)


LAYERS = pytest.mark.parametrize("kind", ["linear", "conv", "conv 1d without a batch"])


@LAYERS
@pytest.mark.parametrize("compute", ["auto", "fp16", "fp32"])
@pytest.mark.parametrize("name", WIDENING)
@torch.no_grad()
def test_a_forward_takes_the_layers_own_channels_or_more_and_leaves_the_layer_as_it_was(
    name: str, compute: Compute, kind: str
) -> None:
    layer, x, shape = layer_of(kind)
    holder, axis = Holder(layer), 1 - len(shape)
    own = layer.weight.shape[1]
    narrow = (shape[0], own, *shape[2:])
    pairs = [
        application("lora-rank-4-without-alpha", narrow, shape[1], -0.5),
        application(name, shape, shape[1]),
        application("diff-bf16", narrow, shape[1], 0.7, seed=5),
    ]
    before, limit = image_of(holder), 1e-3 if compute == "fp16" else 1e-5
    base = holder(x.narrow(axis, 0, own))
    with PatchSession(holder) as session:
        session.apply_patches([patch for patch, _ in pairs], compute)
        for channels in (shape[1], own, own + 1):
            given = x.narrow(axis, 0, channels)
            y, expected = holder(given), exact_forward(layer, pairs, given, shape)
            assert float((y.double() - expected).norm() / expected.norm()) <= limit
            assert torch.equal(holder(x=given), y), "an input that is given by name"
        assert image_of(holder) == before
        with pytest.raises(AdapterError, match=f"from {own} to {shape[1]} input channels is given"):
            holder(torch.cat([x, x], axis))
    assert hooks_of(holder) == 0
    assert image_of(holder) == before
    assert torch.equal(holder(x.narrow(axis, 0, own)), base)
    with pytest.raises(RuntimeError):
        holder(x)


@torch.no_grad()
def test_turned_inputs_of_a_widened_layer_are_turned_whole() -> None:
    """(IA)³ on the inputs of the wider layer: `W_eff = ([W0 | 0] + Δ) · diag(l)`."""
    for kind in ("linear", "conv"):
        layer, x, shape = layer_of(kind)
        made = family("ia3-in", shape)
        pairs = [
            application("lora-rank-8-fp16", shape, shape[1]),
            (Patch("file", Target(WEIGHT), made.adapter, 0.7, widens=True), Step(made.change, 0.7)),
        ]
        holder = Holder(layer)
        with PatchSession(holder) as session:
            session.apply_patches([patch for patch, _ in pairs])
            for given in (x, x[..., : layer.weight.shape[1]] if kind == "linear" else x[:, :4]):
                y, expected = holder(given), exact_forward(layer, pairs, given, shape)
                assert float((y.double() - expected).norm() / expected.norm()) <= 1e-5


@torch.no_grad()
def test_a_change_of_strength_keeps_the_factors_and_strength_0_takes_the_wide_input() -> None:
    layer, x, shape = layer_of("linear")
    holder = Holder(layer)
    with PatchSession(holder) as session:
        first = None
        for strength in (1.0, -0.3, 0.0, 0.6):
            pairs = [
                application("lora-rank-1", (12, 8), 11, 0.5),
                application("lora-rank-8-fp16", shape, 11, strength),
            ]
            session.apply_patches([patch for patch, _ in pairs])
            y, expected = holder(x), exact_forward(layer, pairs, x, shape)
            assert float((y.double() - expected).norm() / expected.norm()) <= 1e-5
            (attached,) = session._attached.values()
            stack = attached.piece._stack
            first = first or stack
            assert stack is first
        session.apply_patches([application("lora-rank-1", (12, 8), 11, 0.5)[0]])
        assert [shape for _, *shape in session._fitted._made] == [[12, 8]], "what was padded is forgotten"
        assert hooks_of(holder) == 2, "the hook and its mark that it takes keywords"


@torch.no_grad()
def test_a_wide_input_is_let_go_after_the_forward() -> None:
    layer, x, shape = layer_of("linear")
    holder = Holder(layer)
    with PatchSession(holder) as session:
        session.apply_patches([application("lora-rank-1", shape, 11)[0]])
        holder(x)
        (attached,) = session._attached.values()
        assert attached.piece.wide_input._given is None


@pytest.mark.parametrize("compute", ["auto", "fp16"])
def test_no_forward_of_a_widened_layer_makes_a_full_matrix_or_copies_its_input(compute: Compute) -> None:
    out, own, wide, tokens = 512, 64, 128, 65536
    layer = nn.Linear(own, out).bfloat16()
    base = torch.zeros(tokens, out, dtype=torch.bfloat16)
    layer.forward = lambda x: base[: x.shape[0]]
    holder = Holder(layer)
    session = PatchSession(holder)
    session.apply_patches(
        [application("lora-rank-4-without-alpha", shape, wide)[0] for shape in ((out, wide), (out, own))],
        compute,
    )
    for channels in (wide, own):
        x = torch.ones(tokens, channels, dtype=torch.bfloat16)
        assert holder(x).data_ptr() == base.data_ptr()
        meter = metered(lambda x=x: holder(x))
        assert meter.operations > 5
        assert meter.peak <= 36 * 2**20
        meter = metered(lambda x=x: holder(x[:4]))
        assert 0 < meter.largest < out * own


def test_only_an_input_layer_takes_another_width_and_only_in_its_channels() -> None:
    holder = Holder(nn.Linear(8, 12))
    wide = recipe("lora-rank-1", (12, 11)).adapter
    for patch, message in (
        (Patch("file", Target(WEIGHT), wide, 1.0), "12×11 matrix, the layer's weight is 12×8"),
        (Patch("file", Target(WEIGHT), recipe("lora-rank-1", (10, 11)).adapter, 1.0, widens=True), "12×8"),
        (Patch("file", Target(WEIGHT), family("loha", (12, 11)).adapter, 1.0, widens=True), "12×8"),
        (Patch("file", Target("layer.bias"), recipe("diff-fp32", (11,)).adapter, 1.0, widens=True), "12"),
    ):
        with pytest.raises(PatchError, match=f"^file: layer layer.*{message}") as caught:
            PatchSession(holder).apply_patches([patch])
        assert caught.value.source == "file"
    beside = Patch("wide", Target(WEIGHT), wide, 1.0, widens=True)
    for width in (7, 11):
        patch = Patch("file", Target(WEIGHT), recipe("lora-rank-1", (12, width)).adapter, 1.0)
        with pytest.raises(PatchError, match=f"^file: .* 12×{width} matrix, the layer's weight is 12×8"):
            PatchSession(holder).apply_patches([patch, beside])
    assert hooks_of(holder) == 0


@pytest.mark.parametrize("name", ["dora-out", "loha", "glora", "ia3-in"])
def test_another_kind_for_fewer_channels_is_refused_beside_a_wider_file(name: str) -> None:
    holder = Holder(nn.Linear(8, 12))
    patches = [
        Patch("narrow", Target(WEIGHT), family(name, (12, 8)).adapter, 1.0),
        Patch("wide", Target(WEIGHT), recipe("lora-rank-1", (12, 11)).adapter, 1.0, widens=True),
    ]
    with pytest.raises(PatchError, match=r"of fewer channels cannot join an input layer .* widens to 11"):
        PatchSession(holder).apply_patches(patches)
    assert hooks_of(holder) == 0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Embedding(12, 8), (12, 11)), (nn.Conv2d(4, 6, 3, groups=2), (6, 5, 3, 3))],
)
def test_what_is_no_plain_input_layer_cannot_be_widened(layer: nn.Module, shape: tuple[int, ...]) -> None:
    holder = Holder(layer)
    with pytest.raises(PatchError, match="only a linear layer or an ungrouped convolution can be widened"):
        PatchSession(holder).apply_patches([application("lora-rank-1", shape, shape[1])[0]])
    assert hooks_of(holder) == 0
