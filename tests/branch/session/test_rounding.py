"""What is saved of an applied set: each parameter as one rounding of the float64 merge, in order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import Diff, Target
from lib_precision_lora.branch import Patch, PatchError, PatchSession
from lib_precision_lora.branch.session import rounding
from lib_precision_lora.branch.session.rounding import Loss, cost_of, materialized, rounded
from tests.branch.hosts import SHAPES, Holder, Mixed, stored_holder
from tests.branch.merging import MODULES
from tests.branch.patch_sets import EVERYTHING, files_on, snapshot
from tests.branch.recipes import BASE_STD, generator, noise, recipe
from tests.branch.session.test_merged import assert_rounded_once
from tests.families import FAMILIES, family
from tests.oracles import Step, merge, swap_halves

SHAPE = (16, 64)
WEIGHT = "layer.weight"
STORED = (
    "dense-fp32",
    "dense-bf16",
    "fp8-e4m3fn",
    "fp8-e4m3fn-scaled-by-row",
    "bnb-nf4",
    "bnb-fp4-nested",
    "gguf-Q8_0-baked-bf16",
    "gguf-Q4_K-baked-fp16",
    "one-buffer-nf4-nested",
    "comfy-fp8-e4m3fn-scaled",
    "comfy-nvfp4",
    "comfy-mxfp8",
    "comfy-int8-by-row",
    "comfy-int8-convrot",
)
POLICIES = pytest.mark.parametrize("policy", ["branch", "merge"])


def saved_values(session: PatchSession) -> dict[str, Tensor]:
    return {name: materialized(effective) for name, (_, effective) in session.effective().items()}


def assert_exact(values: Tensor, exact: Tensor, size: float) -> None:
    """fp32 holds the sum to 1e-6 of what was added, beside its own rounding of it."""
    error = float((values.double() - exact).norm())
    assert error <= 1e-6 * size + 1e-7 * float(exact.norm())


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_on_every_kind_of_base_is_the_float64_merge_and_its_loss_is_measured(
    name: str, stored: str
) -> None:
    holder, case = stored_holder(stored, noise(SHAPE, generator(4), BASE_STD))
    made, second = family(name, SHAPE), recipe("lora-rank-8-fp16", SHAPE)
    exact, size = merge(case.expected.double(), [Step(made.change, 0.7), Step(second.change(), -0.5)])
    with PatchSession(holder) as session:
        session.apply([("a", {WEIGHT: made.adapter}, 0.7), ("b", {WEIGHT: second.adapter}, -0.5)])
        ((found, (site, effective)),) = session.effective().items()
        assert found == WEIGHT
        assert_exact(materialized(effective), exact, size)
        result = rounded(WEIGHT, site, effective)
    if not stored.startswith(("dense", "gguf")):
        return
    written = result.entries["weight"]
    assert_rounded_once(written, exact)
    error, change = float((written.double() - exact).norm()), float((exact - case.expected).norm())
    assert result.loss.cost == pytest.approx(error / change, rel=0.02, abs=1e-5)


def test_the_cost_is_the_error_of_the_effect_over_many_parameters() -> None:
    losses = [Loss("a", "bnb-nf4", 9.0, 4.0), Loss("b", "bnb-nf4", 7.0, 12.0)]
    assert cost_of(losses) == 1.0
    assert losses[0].cost == 1.5
    assert cost_of([Loss("a", "dense-fp16", 0.0, 0.0)]) == 0.0


@pytest.mark.parametrize(
    ("stored", "least", "most"),
    [
        ("dense-fp16", 0.01, 0.03),
        ("dense-bf16", 0.1, 0.22),
        ("fp8-e4m3fn", 0.8, 1.3),
        ("bnb-nf4", 0.8, 1.3),
        ("gguf-Q4_K-baked-fp16", 0.01, 0.03),
        ("one-buffer-nf4", 0.01, 0.03),
        ("comfy-nvfp4", 0.8, 2.0),
        ("comfy-mxfp8", 0.8, 1.3),
        ("comfy-int8-by-row", 0.4, 1.0),
        ("comfy-int8-convrot", 0.4, 1.0),
    ],
)
def test_a_lora_of_a_hundredth_of_the_weight_costs_what_rounding_costs_it(
    stored: str, least: float, most: float
) -> None:
    """‖Δ‖ = 1 % of ‖W‖: half a unit in the last place is 2 % of it in fp16, 17 % in bf16, and all of it in
    8 bits and 4."""
    holder, case = stored_holder(stored, noise((64, 256), generator(4), BASE_STD))
    delta = noise((64, 256), generator(5))
    delta *= 0.01 * case.expected.norm() / delta.norm()
    with PatchSession(holder) as session:
        session.apply([("file", {WEIGHT: Diff(delta)}, 1.0)])
        ((name, (site, effective)),) = session.effective().items()
        loss = rounded(name, site, effective).loss
    assert math.sqrt(loss.change) == pytest.approx(0.01 * float(case.expected.norm()), rel=1e-3)
    assert least < loss.cost < most


@POLICIES
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_what_is_merged_or_shadowed_is_looked_through_to_the_originals(policy: str, strength: float) -> None:
    model, pristine = Mixed(), Mixed()
    originals = dict(model.named_parameters())
    with PatchSession(model) as session:
        session.apply(EVERYTHING, dense=policy)
        session.apply([("file", EVERYTHING[0][1], strength)], dense=policy)
        assert len(session.merged) == (len(MODULES) if policy == "merge" else 0)
        effective = session.effective()
        assert effective.keys() == SHAPES.keys()
        for name, (site, weight) in effective.items():
            made = recipe(*_kind_of(name))
            exact, size = merge(pristine.get_parameter(name).double(), [Step(made.change(), strength)])
            assert site.parameter is originals[name]
            assert_exact(materialized(weight), exact, size)
            entries = rounded(name, site, weight).entries
            assert entries.keys() == {name.rpartition(".")[2]}


@POLICIES
def test_a_copy_that_the_host_has_made_of_what_stands_is_looked_through_as_well(policy: str) -> None:
    """As where it swaps layers; the next set is made of the originals, too, which are put back."""
    model, pristine = Mixed(), Mixed()
    originals = dict(model.named_parameters())
    with PatchSession(model) as session:
        for strength in (1.0, -0.5):
            session.apply([("file", EVERYTHING[0][1], strength)], dense=policy)
            copied = 0
            for name, standing in list(model.named_parameters()):
                if standing is not originals[name]:
                    path, _, attribute = name.rpartition(".")
                    copy = nn.Parameter(standing.detach().clone(), requires_grad=False)
                    setattr(model.get_submodule(path), attribute, copy)
                    copied += 1
            assert copied > 0
            for name, (site, weight) in session.effective().items():
                exact, size = merge(
                    pristine.get_parameter(name).double(), [Step(recipe(*_kind_of(name)).change(), strength)]
                )
                assert site.parameter is originals[name]
                assert_exact(materialized(weight), exact, size)
    assert all(parameter is originals[name] for name, parameter in model.named_parameters())
    for name, parameter in pristine.named_parameters():
        assert torch.equal(originals[name], parameter)


def _kind_of(name: str) -> tuple[str, tuple[int, ...]]:
    shape = SHAPES[name]
    return ("diff-fp32" if len(shape) == 1 else "lora-rank-1"), shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_merged_layer_is_saved_as_it_stands(dtype: torch.dtype) -> None:
    holder = Holder(nn.Linear(64, 16).to(dtype))
    with PatchSession(holder) as session:
        session.apply([("file", {WEIGHT: family("dora-out", SHAPE).adapter}, 0.7)], dense="merge")
        assert session.merged
        ((name, (site, effective)),) = session.effective().items()
        assert torch.equal(rounded(name, site, effective).entries["weight"], holder.layer.weight)


def test_parts_of_a_fused_weight_row_functions_and_base_factors_count() -> None:
    holder, case = stored_holder("fp8-e4m3fn", noise((24, 256), generator(4), BASE_STD))
    part, whole = recipe("lora-rank-8-fp16", (8, 256)), recipe("diff-fp32", (24, 256))
    patches = [
        part.patch(WEIGHT, 0.7, (8, 8), None, 0.9),
        whole.patch(WEIGHT, 0.5, None, swap_halves),
    ]
    exact, size = merge(case.expected.double(), [step for _, step in patches])
    with PatchSession(holder) as session:
        session.apply_patches([patch for patch, _ in patches])
        (values,) = saved_values(session).values()
        assert_exact(values, exact, size)


@pytest.mark.parametrize("stored", ["dense-bf16", "bnb-nf4"])
def test_a_widened_layer_is_saved_wide(stored: str) -> None:
    holder, case = stored_holder(stored, noise((24, 256), generator(4), BASE_STD))
    made = recipe("lora-rank-8-fp16", (24, 320))
    base = nn.functional.pad(case.expected.double(), (0, 64))
    with PatchSession(holder) as session:
        session.apply_patches([Patch("file", Target(WEIGHT), made.adapter, 0.8, widens=True)])
        ((name, (site, effective)),) = session.effective().items()
        exact, size = merge(base, [Step(made.change(), 0.8)])
        assert_exact(materialized(effective), exact, size)
        assert rounded(name, site, effective).loss.change > 0


@POLICIES
def test_reading_what_is_saved_disturbs_nothing(policy: str) -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply(EVERYTHING, dense=policy)
        before = snapshot(model, session)
        for name, (site, effective) in session.effective().items():
            for entry in rounded(name, site, effective).entries.values():
                entry.zero_()
        assert snapshot(model, session) == before
        session.apply(EVERYTHING, dense=policy)
        assert snapshot(model, session)["outputs"] == before["outputs"]


def test_what_counts_is_the_set_that_was_applied_last() -> None:
    model = Mixed()
    session = PatchSession(model)
    assert session.effective() == {}
    session.apply(files_on(["linear.weight"]))
    with pytest.raises(PatchError):
        session.apply([("bad", {"second.weight": recipe("lora-rank-1", (5, 5)).adapter}, 1.0)])
    assert session.effective().keys() == {"linear.weight"}
    assert [patch.source for patch in session.patches] == ["file"]
    session.apply(files_on(["conv.bias"]))
    assert session.effective().keys() == {"conv.bias"}
    session.clear()
    assert session.effective() == {}
    assert session.patches == ()


def test_values_that_do_not_fit_their_type_are_refused_with_the_layers_name() -> None:
    holder = Holder(nn.Linear(64, 16).half())
    with PatchSession(holder) as session:
        session.apply([("file", {WEIGHT: Diff(torch.full(SHAPE, 1e4))}, 10.0)])
        ((name, (site, effective)),) = session.effective().items()
        with pytest.raises(
            PatchError, match=r"layer layer\.weight: its largest value would be 1e\+05, .*fp16"
        ):
            rounded(name, site, effective)


def test_where_the_device_has_no_room_a_parameter_is_rounded_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holder, _ = stored_holder("bnb-nf4", noise(SHAPE, generator(4), BASE_STD))
    with PatchSession(holder) as session:
        session.apply([("file", {WEIGHT: family("lora", SHAPE).adapter}, 1.0)])
        ((name, (site, effective)),) = session.effective().items()
        expected = rounded(name, site, effective).entries["weight"]
        places = []

        def crowded(weight: object, stored: object) -> Tensor:
            places.append(type(stored).__name__)
            if len(places) == 1:
                raise torch.cuda.OutOfMemoryError("no room")
            return materialized(weight, stored)  # type: ignore[arg-type]

        monkeypatch.setattr(rounding, "materialized", crowded)
        assert torch.equal(rounded(name, site, effective).entries["weight"], expected)
        assert places == ["FourBitWeight", "Elsewhere"]
