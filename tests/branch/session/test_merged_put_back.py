"""Law 1 and 5 for merged layers: the host's own objects are put back, whatever happens in between."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.session import merged
from lib_precision_lora.branch.session import session as session_module
from tests.branch.hosts import Mixed, hooks_of, image_of
from tests.branch.patch_sets import EVERYTHING, Items, files_on, outputs
from tests.branch.session.test_failure import CHANGED, FEWER, FORMER, SAME_FACTORS, InjectedError, failing


def test_two_hundred_cycles_leave_no_trace() -> None:
    model = Mixed()
    before, plain = image_of(model), outputs(model)
    session = PatchSession(model)
    counts = []
    for cycle in range(200):
        session.apply(EVERYTHING if cycle % 3 else files_on(["linear.weight"], kind=cycle % 5), dense="merge")
        assert not torch.equal(outputs(model), plain)
        session.clear()
        assert image_of(model) == before
        if cycle in (50, 199):
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert torch.equal(outputs(model), plain)
    assert hooks_of(model) == 0
    assert abs(counts[1] - counts[0]) < 50


@pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt])
@pytest.mark.parametrize("former", [[], FORMER], ids=["nothing attached", "a set attached"])
@pytest.mark.parametrize("wanted", [CHANGED, EVERYTHING, SAME_FACTORS, FEWER])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (session_module, "attach"),
        (merged, "write_merged"),
        (merged, "park"),
        (merged, "stored_weight"),
        (merged, "_give_room"),
        (merged.Merged, "restrength"),
    ],
    ids=["attach", "write", "park", "stored_weight", "room", "restrength"],
)
def test_an_exception_at_any_point_leaves_everything_as_it_was(
    former: Items, wanted: Items, owner: object, name: str, error: type[BaseException]
) -> None:
    failures = undone_failures(former, wanted, owner, name, error)
    assert (failures > 0) == is_called(name, former, wanted)


@pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt])
def test_an_exception_amid_taking_off_leaves_everything_as_it_was(error: type[BaseException]) -> None:
    assert undone_failures(FORMER, FEWER, merged.Shadow, "detach", error) > 1


def undone_failures(
    former: Items, wanted: Items, owner: object, name: str, error: type[BaseException]
) -> int:
    """Fails the first call of `owner.name`, then the second, and so on; how many until it gets through."""
    model = Mixed()
    untouched = image_of(model)
    session = PatchSession(model)
    if former:
        session.apply(former, dense="merge")
    before = outputs(model), image_of(model), set(session.attached), hooks_of(model)
    for failure in range(1, 40):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, failing(getattr(owner, name), failure, error))
            try:
                session.apply(wanted, dense="merge")
                break
            except error:
                pass
        assert torch.equal(outputs(model), before[0])
        assert (image_of(model), set(session.attached), hooks_of(model)) == before[1:]
    assert failure < 39
    session.clear()
    assert image_of(model) == untouched
    assert hooks_of(model) == 0
    return failure - 1


def is_called(name: str, former: Items, wanted: Items) -> bool:
    """Whether there is anything to do for it: a change of strength writes into the parameters in place."""
    in_place = bool(former) and wanted is SAME_FACTORS
    return {"park": not in_place, "_give_room": not in_place, "restrength": in_place}.get(name, True)


def test_a_layer_that_finds_no_room_on_its_device_does_not_keep_the_others_from_coming_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Mixed()
    before = image_of(model)
    session = PatchSession(model)
    session.apply(EVERYTHING, dense="merge")
    monkeypatch.setattr(merged.Shadow, "detach", failing_after(merged.Shadow.detach, at=2))
    with pytest.raises(InjectedError):
        session.clear()
    assert session.attached == ()
    assert image_of(model) == before
    assert hooks_of(model) == 0


def failing_after(call: Callable[..., None], at: int) -> Callable[..., None]:
    """The call; its `at`-th raises when it has done its work."""
    count = 0

    def run(*args: object, **kwargs: object) -> None:
        nonlocal count
        count += 1
        call(*args, **kwargs)
        if count == at:
            raise InjectedError

    return run


def test_a_session_that_is_dropped_gives_the_parameters_back() -> None:
    model = Mixed()
    before = image_of(model)
    session = PatchSession(model)
    session.apply(EVERYTHING, dense="merge")
    assert image_of(model) != before
    del session
    gc.collect()
    assert image_of(model) == before


def test_the_original_comes_back_as_the_host_has_cast_the_layer_meanwhile() -> None:
    model, alone = Mixed(), Mixed()
    original = model.linear.weight
    with PatchSession(model) as session:
        session.apply(files_on(["linear.weight", "linear.bias"]), dense="merge")
        model.to(torch.float64)
        alone.to(torch.float64)
    assert model.linear.weight is original
    assert [value for _, value in image_of(model).values()] == [
        value for _, value in image_of(alone).values()
    ]


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["as it is", "cast"])
def test_a_copy_that_the_host_has_made_of_a_merged_parameter_is_no_base(dtype: torch.dtype | None) -> None:
    """A host that swaps layers, or casts them in their forward, makes new parameters of what stands there."""
    model, alone = Mixed(), Mixed()
    plain = model.linear.weight
    session = PatchSession(model)
    for end in (session.clear, lambda: session.apply(files_on(["conv.weight"]), dense="merge")):
        session.apply(files_on(["linear.weight"]), dense="merge")
        for layer in (model.linear, alone.linear):
            copy = layer.weight.detach().clone().to(dtype or layer.weight.dtype)
            layer.weight = nn.Parameter(copy, requires_grad=False)
        end()
        assert model.linear.weight is plain
        assert torch.equal(model.linear.weight, alone.linear.weight)
        assert model.linear.weight.dtype == alone.linear.weight.dtype


def test_a_parameter_that_the_host_has_exchanged_is_the_hosts() -> None:
    model = Mixed()
    session = PatchSession(model)
    session.apply(files_on(["linear.weight"]), dense="merge")
    theirs = model.linear.weight = nn.Parameter(torch.ones(12, 8), requires_grad=False)
    session.apply(files_on(["linear.weight"]), dense="merge")
    assert session.merged == ("linear",)
    assert model.linear.weight is not theirs
    session.clear()
    assert model.linear.weight is theirs
    assert torch.equal(theirs, torch.ones(12, 8))


@pytest.mark.parametrize("made_in", [False, True], ids=["normal model", "model made in inference mode"])
@pytest.mark.parametrize("attached_in", [False, True], ids=["normal", "in inference mode"])
def test_inference_mode_is_the_hosts_to_choose(made_in: bool, attached_in: bool) -> None:
    with torch.inference_mode(made_in):
        model = Mixed()
    before, plain = image_of(model), outputs(model)
    session = PatchSession(model)
    for cast in (False, True):
        with torch.inference_mode(attached_in):
            session.apply(EVERYTHING, dense="merge")
            if cast:
                model.to(torch.float64).to(torch.float32)
        assert not torch.equal(outputs(model), plain)
        with torch.inference_mode(not attached_in):
            session.apply(files_on(["linear.weight"], 0.5), dense="merge")
        assert not torch.equal(outputs(model), plain)
        session.clear()
        assert image_of(model) == before
        assert torch.equal(outputs(model), plain)
