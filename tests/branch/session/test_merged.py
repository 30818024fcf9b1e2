"""Merged dense layers hold one rounding of the float64 merge, once, and are changed in place."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import Diff
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.session import merged
from tests.branch.hosts import Mixed, hooks_of, image_of
from tests.branch.merging import MODULES, holder_of, item
from tests.branch.meter import metered
from tests.branch.patch_sets import EVERYTHING, files_on, outputs
from tests.branch.recipes import generator, noise
from tests.branch.session.test_failure import CHANGED
from tests.families import FAMILIES, family
from tests.oracles import Step, merge

MERGED_TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
LAYERS = {
    "linear": lambda: nn.Linear(64, 16),
    "conv": lambda: nn.Conv2d(8, 16, 3, padding=1),
    "conv, channels last": lambda: nn.Conv2d(8, 16, 3, padding=1).to(memory_format=torch.channels_last),
    "conv 1d": lambda: nn.Conv1d(8, 16, 5),
    "embedding": lambda: nn.Embedding(16, 64),
}
CASES = [
    (name, kind)
    for name in FAMILIES
    for kind in LAYERS
    if kind != "embedding" or not name.startswith(("oft", "boft"))  # refused by name, merged or beside
]


def assert_rounded_once(weight: Tensor, exact: Tensor) -> None:
    """At most half a unit in the last place of its type, and 1e-6 for fp32 arithmetic, element by element.

    The sum of a few terms may cancel: 1e-6 is relative to the largest element.
    """
    info = torch.finfo(weight.dtype)
    half_unit = 0.5 * info.eps * exact.abs().clamp_min(info.tiny)
    assert bool(((weight.double() - exact).abs() <= half_unit + 1e-6 * exact.abs().max()).all())


@MERGED_TYPES
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_family_on_every_layer_is_one_rounding_of_the_float64_merge(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    holder = holder_of(LAYERS[kind](), dtype)
    original = holder.layer.weight
    made = family(name, tuple(original.shape))
    base = original.detach().double()
    bytes_before = image_of(holder)
    with PatchSession(holder) as session:
        for strength in (1.0, -0.5, 0.7):
            session.apply([item(made, strength)], dense="merge")
            assert session.merged == ("layer",)
            assert hooks_of(holder) == 0
            exact, _ = merge(base, [Step(made.change, strength)])
            assert holder.layer.weight is not original
            assert_rounded_once(holder.layer.weight, exact)
            assert holder.layer.weight.stride() == original.stride()
    assert holder.layer.weight is original
    assert image_of(holder) == bytes_before


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["lora", "dora-out", "ia3-in", "oft", "loha-streamed"])
def test_a_merge_in_many_blocks_is_the_same(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "embedding":
        name = name.replace("oft", "glora")
    holder = holder_of(LAYERS[kind](), torch.float32)
    item_of_layer = item(family(name, tuple(holder.layer.weight.shape)))
    with PatchSession(holder) as session:
        session.apply([item_of_layer], dense="merge")
        whole = holder.layer.weight.clone()
        session.clear()
        monkeypatch.setattr("lib_precision_lora.branch.algebra.reading.BLOCK_BYTES", 4 * 160)
        session.apply([item_of_layer], dense="merge")
        torch.testing.assert_close(holder.layer.weight.detach(), whole, rtol=1e-6, atol=1e-7)


@MERGED_TYPES
def test_a_stack_is_merged_in_prompt_order(dtype: torch.dtype) -> None:
    holder = holder_of(nn.Linear(64, 16), dtype)
    base = holder.layer.weight.detach().double()
    made = [
        family(name, (16, 64), seed) for seed, name in enumerate(("lora", "dora-out", "lokr-both", "ia3-out"))
    ]
    with PatchSession(holder) as session:
        for order in (made, made[::-1]):
            session.apply([(f"{n}", item(one)[1], 0.7) for n, one in enumerate(order)], dense="merge")
            exact, _ = merge(base, [Step(one.change, 0.7) for one in order])
            assert_rounded_once(holder.layer.weight, exact)


@MERGED_TYPES
def test_a_forward_is_that_of_the_layer_with_the_rounded_weight(dtype: torch.dtype) -> None:
    holder = holder_of(nn.Linear(64, 16), dtype)
    made, delta = family("lora", (16, 64)), torch.linspace(-1.0, 1.0, 16)
    x = noise((5, 64), generator(2)).to(dtype)
    weight, _ = merge(holder.layer.weight.detach(), [Step(made.change, 1.0)])
    bias = (holder.layer.bias.detach().double() + delta.double()).to(dtype)
    expected = torch.nn.functional.linear(x, weight.to(dtype), bias)
    with PatchSession(holder) as session:
        session.apply([item(made), ("bias", {"layer.bias": Diff(delta)}, 1.0)], dense="merge")
        assert hooks_of(holder) == 0
        torch.testing.assert_close(holder.layer.bias, bias, rtol=0, atol=0)
        torch.testing.assert_close(
            holder(x), expected, rtol=2e-6, atol=1e-3 if dtype == torch.float16 else 1e-6
        )


def test_a_change_of_strength_writes_into_the_standing_parameter_and_reads_only_what_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply(files_on(["linear.weight", "conv.weight"]), dense="merge")
        standing = model.linear.weight, model.linear.weight.data_ptr()
        written: list[Tensor] = []
        write = merged.write_merged
        monkeypatch.setattr(
            merged, "write_merged", lambda target, *rest: (written.append(target), write(target, *rest))
        )
        session.apply(files_on(["linear.weight", "conv.weight"]), dense="merge")
        assert written == []
        session.apply(files_on(["linear.weight"], 0.5) + files_on(["conv.weight"]), dense="merge")
        assert [target.data_ptr() for target in written] == [standing[1]]
        assert (model.linear.weight, model.linear.weight.data_ptr()) == standing
        fresh = Mixed()
        with PatchSession(fresh) as other:
            other.apply(files_on(["linear.weight"], 0.5) + files_on(["conv.weight"]), dense="merge")
            assert torch.equal(outputs(model), outputs(fresh))


def test_a_merge_holds_one_copy_beside_the_original_and_a_block_while_it_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lib_precision_lora.branch.algebra.reading.BLOCK_BYTES", 64 * 1024)
    weight = 2 * 512 * 512
    holder = holder_of(nn.Linear(512, 512, bias=False), torch.float16)
    session, made = PatchSession(holder), family("lora", (512, 512))
    full, half = item(made), item(made, 0.5)
    attach = metered(lambda: session.apply([full], dense="merge"))
    assert weight <= attach.peak <= weight + 16 * 64 * 1024
    change = metered(lambda: session.apply([half], dense="merge"))
    assert 0 < change.peak <= 16 * 64 * 1024
    session.clear()
    gc.collect()
    assert attach.live + change.live < 64 * 1024


def test_an_original_that_is_kept_elsewhere_leaves_no_copy_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on an accelerator, where its values go to the CPU: whoever still refers to them would keep them."""

    def elsewhere(original: nn.Parameter) -> None:
        original.data = original.data.clone()

    monkeypatch.setattr(merged, "park", elsewhere)
    model = Mixed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    storages = [weakref.ref(getattr(model, name).weight.untyped_storage()) for name in MODULES]
    with PatchSession(model) as session:
        session.apply(EVERYTHING, dense="merge")
        gc.collect()
        assert [storage() for storage in storages] == [None] * len(MODULES)
        session.apply(CHANGED, dense="merge")
        exact = Mixed()
        with PatchSession(exact) as other:
            other.apply(CHANGED, dense="merge")
            assert torch.equal(outputs(model), outputs(exact))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def accelerator() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: run it on a machine with a card")
    return torch.device("cuda")


def test_on_an_accelerator_the_originals_wait_on_the_cpu(accelerator: torch.device) -> None:
    model = Mixed().to(accelerator)
    original = model.linear.weight
    before = original.detach().cpu().clone()
    with PatchSession(model) as session:
        session.apply(EVERYTHING, dense="merge")
        assert original.device.type == "cpu"
        assert model.linear.weight.is_cuda
        model.to("cpu")
        session.apply(CHANGED, dense="merge")
        model.to(accelerator)
    assert model.linear.weight is original
    assert original.is_cuda
    assert torch.equal(original.cpu(), before)
