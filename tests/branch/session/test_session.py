"""Law 1: whatever is attached and taken off, the base stays as it was; and what a session says is so."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from torch import nn

from lib_precision_lora.branch import PatchError, PatchSession
from tests.branch.hosts import IDS, IMAGE, SHAPES, Holder, Linear, Mixed, hooks_of, image_of, stored_holder
from tests.branch.patch_sets import EVERYTHING, files_on, outputs, random_files
from tests.branch.recipes import BASE_STD, generator, noise, recipe
from tests.storage.formats import VARIANTS, StoredLinear, stored_variant
from tests.storage.test_every_format import image as stored_bytes


def test_ten_thousand_cycles_leave_no_trace() -> None:
    model, chance = Mixed(), random.Random(1)
    before, plain = image_of(model), outputs(model)
    session = PatchSession(model)
    counts, seen = [], set()
    for cycle in range(10_000):
        session.apply(random_files(chance))
        seen.update(session.attached)
        if cycle % 20 == 0:
            assert not torch.equal(outputs(model), plain)
        if chance.random() < 0.5:
            session.clear()
            assert session.attached == ()
        if cycle in (2_000, 9_999):
            session.clear()
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert seen == {"embedding", "linear", "second", "norm", "rms", "register", "conv", "groups"}
    assert image_of(model) == before
    assert hooks_of(model) == 0
    assert torch.equal(outputs(model), plain)
    assert counts[1] - counts[0] < 50  # what tests before this one have left behind may go


@pytest.mark.parametrize("name", SHAPES)
def test_detach_leaves_every_parameter_the_same_object(name: str) -> None:
    model = Mixed()
    before, plain = image_of(model), outputs(model)
    for kind in range(5):
        with PatchSession(model) as session:
            applied = session.apply(files_on([name], 1.0, kind))
            assert applied.parameters == {"file": (name,)}
            assert not torch.equal(outputs(model), plain)
        assert image_of(model) == before
        assert torch.equal(outputs(model), plain)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_attached_branches_write_no_stored_byte(name: str) -> None:
    matrix = noise((16, 256), generator(1), BASE_STD)
    case = stored_variant(name, matrix)
    holder = Holder(Linear(case.parameter, case.expected, case.module.scale_weight))
    before, parameter = stored_bytes(case), holder.layer.weight
    x = noise((4, 256), generator(2))
    plain = holder(x)
    with PatchSession(holder) as session:
        for kind in ("lora-rank-8-fp16", "set-fp16", "diff-bf16"):
            session.apply([("file", {"layer": recipe(kind, (16, 256)).adapter}, 1.0)])
            assert session.attached == ("layer",)
            assert not torch.equal(holder(x), plain)
    assert holder.layer.weight is parameter
    assert stored_bytes(case) == before
    assert torch.equal(holder(x), plain)


def test_a_session_keeps_no_model_alive() -> None:
    model = Mixed()
    session = PatchSession(model)
    session.apply(EVERYTHING)
    outputs(model)
    gone = weakref.ref(model)
    layers = [weakref.ref(layer) for layer in model.modules()]
    del model
    gc.collect()
    assert gone() is None
    assert len(layers) > 5
    assert all(layer() is None for layer in layers)
    session.clear()
    with pytest.raises(ReferenceError, match="gone"):
        session.apply(EVERYTHING)


def test_a_model_dies_without_the_garbage_collector() -> None:
    gc.disable()
    try:
        model = Mixed()
        session = PatchSession(model)
        session.apply(EVERYTHING)
        outputs(model)
        gone = weakref.ref(model)
        del model
        assert gone() is None
        assert session.attached
    finally:
        gc.enable()


def test_a_session_that_is_dropped_is_freed_while_its_branches_run() -> None:
    model = Mixed()
    session = PatchSession(model)
    session.apply(files_on(["linear.weight"]))
    patched, gone = outputs(model), weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None
    assert torch.equal(outputs(model), patched)


def test_the_context_manager_detaches_after_an_exception() -> None:
    model = Mixed()
    before = image_of(model)
    session = PatchSession(model)

    def interrupted() -> None:
        with session:
            session.apply(EVERYTHING)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert session.attached == ()
    assert image_of(model) == before
    assert hooks_of(model) == 0


def test_applied_says_what_was_found_and_what_is_missing() -> None:
    adapters = {
        "linear": recipe("lora-rank-1", (12, 8)).adapter,
        "norm.bias": recipe("diff-fp32", (12,)).adapter,
        "rms": recipe("diff-fp32", (12,)).adapter,
        "nowhere": recipe("lora-rank-1", (12, 8)).adapter,
    }
    model = Mixed()
    with PatchSession(model) as session:
        applied = session.apply(
            [("file", adapters, 1.0), ("other", {"conv": recipe("lora-rank-1", (4, 3, 3, 3)).adapter}, 0.5)]
        )
        assert applied.parameters == {
            "file": ("linear.weight", "norm.bias", "rms.scale"),
            "other": ("conv.weight",),
        }
        assert applied.missing == {"file": ("nowhere",)}
        assert set(session.attached) == {"linear", "norm", "rms", "conv"}


def test_a_file_that_matches_nothing_is_refused_by_name() -> None:
    model = Mixed()
    session = PatchSession(model)
    adapters = {f"other.{n}": recipe("lora-rank-1", (12, 8)).adapter for n in range(3)}
    with pytest.raises(PatchError, match=r"mylora: none of its 3 layers"):
        session.apply([("mylora", adapters, 1.0)])
    assert hooks_of(model) == 0


def test_strength_zero_attaches_nothing_but_a_set() -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply(files_on(["linear.weight"], 0.0))
        assert session.attached == ()
        session.apply(files_on(["linear.weight"], 0.0, kind=4))
        assert session.attached == ("linear",)


def test_a_module_that_the_host_exchanged_gets_its_own_branch() -> None:
    model = Mixed()
    session = PatchSession(model)
    session.apply(files_on(["linear.weight"]))
    old, model.linear = model.linear, nn.Linear(8, 12).requires_grad_(False)
    plain = outputs(model)
    session.apply(files_on(["linear.weight"]))
    assert hooks_of(old) == 0
    assert not torch.equal(outputs(model), plain)
    session.clear()
    assert hooks_of(model) == 0


def test_release_changes_no_output() -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply(EVERYTHING)
        patched = outputs(model)
        session.release()
        assert torch.equal(outputs(model), patched)


def test_the_same_file_twice_adds_up() -> None:
    model = Mixed()
    (file,) = files_on(["linear.weight", "conv.weight", "rms.scale"])
    with PatchSession(model) as session:
        session.apply([file, file])
        twice = outputs(model)
        session.apply([(file[0], file[1], 2.0)])
        torch.testing.assert_close(outputs(model), twice, rtol=1e-5, atol=1e-6)
        session.apply([file])
        assert not torch.allclose(outputs(model), twice, rtol=1e-3)


def test_other_hooks_of_the_host_stay() -> None:
    model, calls = Mixed(), []
    model.linear.register_forward_hook(lambda *_: calls.append(1))
    with PatchSession(model) as session:
        session.apply(EVERYTHING)
        model(IDS, IMAGE)
    model(IDS, IMAGE)
    assert len(calls) == 2
    assert hooks_of(model) == 1


def test_a_quantized_tensor_that_is_read_outside_of_its_layer_is_refused_by_name() -> None:
    """It says that it is bf16, and no dense parameter can stand for it."""

    class Reader(StoredLinear):
        """No host's linear layer by its name."""

    case = stored_variant("comfy-nvfp4", noise((16, 64), generator(1)))
    model = nn.ModuleDict({"layer": Reader(case.parameter, case.expected)}).requires_grad_(False)
    original = model["layer"].weight
    with PatchSession(model) as session, pytest.raises(PatchError, match=r"layer.* is stored as nvfp4"):
        session.apply([("file", {"layer.weight": recipe("lora-rank-8-fp16", (16, 64)).adapter}, 1.0)])
    assert model["layer"].weight is original


def test_a_stored_layer_is_patched_beside_and_not_shadowed() -> None:
    holder, _ = stored_holder("gguf-Q4_0", noise((16, 256), generator(1)))
    parameter = holder.layer.weight
    with PatchSession(holder) as session:
        session.apply([("file", {"layer": recipe("lora-rank-1", (16, 256)).adapter}, 1.0)])
        assert holder.layer.weight is parameter
        assert hooks_of(holder) > 0
