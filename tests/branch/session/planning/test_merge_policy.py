"""Which layers are merged, and which run beside their weight."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from lib_precision_lora.adapters import Diff, read_adapters
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.session.planning.policy import SMALL_LAYER
from tests.branch.hosts import Holder, Mixed, image_of, stored_holder
from tests.branch.merging import MODULES, holder_of, item
from tests.branch.patch_sets import EVERYTHING, files_on, outputs
from tests.branch.recipes import generator, noise
from tests.families import family
from tests.storage.quantized_tensors import MAKERS, StandInTensor


@pytest.mark.parametrize(
    "stored", ["dense-bf16", "fp8-e4m3fn", "bnb-nf4", "gguf-Q8_0", "gguf-Q4_0", "one-buffer-nf4", *MAKERS]
)
def test_bf16_and_low_bit_layers_are_never_merged(stored: str) -> None:
    holder, _ = stored_holder(stored, noise((16, 256), generator(1)))
    original = holder.layer.weight
    with PatchSession(holder) as session:
        for name in ("lora", "diff"):
            session.apply([item(family(name, (16, 256)))], dense="merge")
            assert (session.merged, session.attached) == ((), ("layer",))
            assert holder.layer.weight is original


@pytest.mark.parametrize("stored", MAKERS)
def test_a_quantized_tensor_is_not_merged_whatever_type_it_says_that_it_has(stored: str) -> None:
    """Its host computes in fp16."""
    holder, case = stored_holder(stored, noise((16, 256), generator(1)))
    params = dataclasses.replace(case.parameter._params, orig_dtype=torch.float16)
    tensor = StandInTensor(case.parameter._qdata, case.parameter._layout_cls, params)
    holder.layer.weight = original = nn.Parameter(tensor, requires_grad=False)
    assert original.dtype == torch.float16
    with PatchSession(holder) as session:
        session.apply([item(family("lora", (16, 256)))], dense="merge")
        assert (session.merged, session.attached) == ((), ("layer",))
        assert holder.layer.weight is original


def test_a_weight_that_stands_at_two_places_is_not_merged() -> None:
    model = Mixed()
    model.register_module("other", nn.Module())
    model.other.weight = model.linear.weight
    with PatchSession(model) as session:
        session.apply(files_on(["linear.weight", "second.weight"]), dense="merge")
        assert session.merged == ("second",)
        assert model.linear.weight is model.other.weight


def test_a_module_that_stands_at_two_places_is_not_merged_twice() -> None:
    model = Mixed()
    before = image_of(model)
    model.other = model.linear
    adapter = files_on(["linear.weight"])[0][1]["linear.weight"]
    items = [("file", {"linear.weight": adapter, "other.weight": adapter}, 1.0)]
    with PatchSession(model) as session:
        session.apply(items, "fp32")
        beside = outputs(model)
        session.apply(items, "fp32", "merge")
        assert session.merged == ()
        assert torch.equal(outputs(model), beside)
    assert image_of(model) == before


class Fetched(nn.Parameter):
    """A host's own parameter class, which decides by itself how it moves."""


def test_a_parameter_class_of_the_host_is_not_merged() -> None:
    model = Mixed()
    model.linear.weight = Fetched(model.linear.weight.detach(), requires_grad=False)
    with PatchSession(model) as session:
        session.apply(files_on(["linear.weight"]), dense="merge")
        assert (session.merged, session.attached) == ((), ("linear",))


@pytest.mark.parametrize("former", [0.0, 1.0], ids=["at once", "after a change of strength"])
def test_a_sum_beyond_fp16_runs_beside_its_weight(former: float) -> None:
    """Law 3: merged it would be inf; the branch is finite, and so is the sum of the outputs."""
    holder = holder_of(nn.Linear(8, 4), torch.float16)
    original = holder.layer.weight
    delta = torch.zeros(4, 8)
    delta[1, 2] = 60000.0
    x = torch.full((1, 8), 0.01, dtype=torch.float16)
    with PatchSession(holder) as session:
        if former:
            session.apply([("file", {"layer.weight": Diff(delta)}, former)], dense="merge")
            assert session.merged == ("layer",)
        session.apply([("file", {"layer.weight": Diff(delta)}, 1.5)], dense="merge")
        assert (session.merged, session.attached) == ((), ("layer",))
        assert holder.layer.weight is original
        exact = x.double() @ (original.double() + 1.5 * delta.double()).T + holder.layer.bias.double()
        torch.testing.assert_close(holder(x).double(), exact, rtol=2e-3, atol=1e-3)
        session.apply([("file", {"layer.weight": Diff(delta)}, 0.5)], dense="merge")
        assert session.merged == ("layer",)
        assert float(holder.layer.weight[1, 2]) == pytest.approx(30000.0, rel=1e-3)


def test_automatic_merges_only_where_a_branch_would_cost_more_than_a_quarter() -> None:
    """r · (in + out) > in · out / 4: from rank 32 on at 256 × 256."""
    assert SMALL_LAYER == 256 * 256
    up, down = noise((256, 64), generator(1), 0.01), noise((64, 256), generator(2), 0.01)

    def merged_with(layer: nn.Module, adapter: object, dtype: torch.dtype = torch.float16) -> bool:
        holder = Holder(layer.to(dtype))
        with PatchSession(holder) as session:
            session.apply([("file", {"layer.weight": adapter}, 1.0)], dense="auto")
            return session.merged == ("layer",)

    def of_rank(rank: int) -> object:
        tensors = {
            "layer.lora_up.weight": up[:, :rank].clone(),
            "layer.lora_down.weight": down[:rank].clone(),
        }
        return read_adapters(tensors)["layer"]

    assert not merged_with(nn.Linear(256, 256), of_rank(32))
    assert merged_with(nn.Linear(256, 256), of_rank(33))
    assert merged_with(nn.Linear(256, 256), of_rank(33), torch.float32)
    assert not merged_with(nn.Linear(256, 256), of_rank(64), torch.bfloat16)
    assert not merged_with(nn.Embedding(256, 256), of_rank(64))
    assert merged_with(nn.Linear(256, 256), Diff(torch.ones(256, 256)))
    assert not merged_with(nn.Linear(256, 255), Diff(torch.ones(255, 256)))
    assert merged_with(nn.Linear(256, 256), family("ia3-in", (256, 256)).adapter), "one more pass"
    assert not merged_with(nn.Linear(256, 256), family("ia3-in", (256, 256)).adapter, torch.float32)
    assert not merged_with(nn.Linear(256, 256), family("dora-out", (256, 256)).adapter)


def test_the_default_merges_nothing() -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply(EVERYTHING)
        assert session.merged == ()
        session.apply(EVERYTHING, dense="merge")
        assert set(session.merged) == set(MODULES)


def test_a_change_of_policy_exchanges_merges_and_branches() -> None:
    model = Mixed()
    before, plain = image_of(model), outputs(model)
    with PatchSession(model) as session:
        session.apply(EVERYTHING)
        beside = outputs(model)
        for dense in ("merge", "branch", "merge", "merge"):
            session.apply(EVERYTHING, dense=dense)
            torch.testing.assert_close(outputs(model), beside, rtol=1e-5, atol=1e-6)
            kept = {name for name, image in image_of(model).items() if image == before[name]}
            expected = (
                {f"{name}.{end}" for name in MODULES for end in ("weight", "bias")}
                if dense == "merge"
                else set()
            )
            assert set(before) - kept == (expected & set(before)) | {"register"}
    assert image_of(model) == before
    assert torch.equal(outputs(model), plain)
