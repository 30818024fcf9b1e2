"""Law 1 and 5: a patch set that cannot be applied changes nothing, at whichever point it fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lib_precision_lora.branch import PatchError, PatchSession
from lib_precision_lora.branch.forward import norm, weight_branch
from lib_precision_lora.branch.session import compose
from lib_precision_lora.branch.session import session as session_module
from tests.branch.hosts import SHAPES, Mixed, hooks_of, image_of
from tests.branch.patch_sets import EVERYTHING, Items, files_on, outputs, snapshot
from tests.branch.recipes import recipe

FORMER: Items = files_on(["linear.weight", "register", "conv.weight", "norm.weight"])
SAME_FACTORS: Items = [(name, adapters, 0.25) for name, adapters, _ in FORMER]
CHANGED: Items = files_on(list(SHAPES), -0.5, kind=3)
FEWER: Items = files_on(["linear.bias", "second.weight"])


class InjectedError(RuntimeError):
    pass


def failing(call: Callable[..., object], at: int, error: type[BaseException]) -> Callable[..., object]:
    """The call, but its `at`-th (from 1) raises instead."""
    count = 0

    def run(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == at:
            raise error
        return call(*args, **kwargs)

    return run


def assert_every_failure_is_undone(
    former: Items, wanted: Items, error: type[BaseException], owner: object, name: str
) -> None:
    """Fails the first call of `owner.name`, then the second, and so on until `apply` gets through."""
    model = Mixed()
    session = PatchSession(model)
    if former:
        session.apply(former)
    before = snapshot(model, session)
    failures = 0
    while failures < 40:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, failing(getattr(owner, name), failures + 1, error))
            try:
                session.apply(wanted)
                break
            except error:
                failures += 1
        assert snapshot(model, session) == before
    assert 0 < failures < 40
    after = outputs(model)
    session.clear()
    session.apply(wanted)
    assert torch.equal(outputs(model), after)
    session.clear()
    assert hooks_of(model) == 0


ERRORS = pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt])


@pytest.mark.parametrize("former", [[], FORMER], ids=["nothing attached", "a set attached"])
@pytest.mark.parametrize("wanted", [CHANGED, EVERYTHING, SAME_FACTORS, FEWER])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(session_module, "attach"), (session_module, "make_attachments"), (compose, "stored_weight")],
    ids=["attach", "make_attachments", "stored_weight"],
)
@ERRORS
def test_an_exception_at_any_point_leaves_everything_as_it_was(
    former: Items, wanted: Items, error: type[BaseException], owner: object, name: str
) -> None:
    assert_every_failure_is_undone(former, wanted, error, owner, name)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (weight_branch.WeightBranch, "restrength"),
        (weight_branch.WeightBranch, "_scale"),
        (norm.NormBranch, "restrength"),
        (session_module, "same_structure"),
    ],
    ids=["restrength", "half of restrength", "restrength of a norm", "comparison"],
)
@ERRORS
def test_an_exception_amid_a_change_of_strength_leaves_everything_as_it_was(
    error: type[BaseException], owner: object, name: str
) -> None:
    assert_every_failure_is_undone(FORMER, SAME_FACTORS, error, owner, name)
    assert_every_failure_is_undone(FORMER, [*SAME_FACTORS[:1], *FEWER], error, owner, name)


@pytest.mark.parametrize("former", [[], FORMER], ids=["nothing attached", "a set attached"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_wrong_shape_in_the_second_file_leaves_everything_as_it_was(former: Items, name: str) -> None:
    model = Mixed()
    session = PatchSession(model)
    if former:
        session.apply(former)
    before = snapshot(model, session)
    shape = (SHAPES[name][0] + 1, *SHAPES[name][1:])
    kind = "lora-rank-1" if len(shape) > 1 else "diff-fp32"
    bad = ("broken", {name: recipe(kind, shape).adapter}, 1.0)
    with pytest.raises(PatchError) as caught:
        session.apply([*EVERYTHING, bad])
    assert snapshot(model, session) == before
    message = str(caught.value)
    assert message.startswith(f"broken: layer {name}: ")
    assert str(shape[0]) in message
    assert "×".join(map(str, SHAPES[name])) in message


def test_a_refused_set_on_a_fresh_model_leaves_no_hook() -> None:
    model = Mixed()
    before = image_of(model)
    session = PatchSession(model)
    for strength in (float("nan"), float("inf")):
        with pytest.raises(PatchError, match=f"file: layer .*{strength}"):
            session.apply(files_on(list(SHAPES), strength))
        assert image_of(model) == before
        assert hooks_of(model) == 0
        assert session.attached == ()


def test_a_bias_on_a_layer_whose_weight_is_not_understood_is_refused_by_name() -> None:
    model = Mixed()
    model.linear.weight = torch.nn.Parameter(torch.zeros(12, 8, dtype=torch.int8), requires_grad=False)
    session = PatchSession(model)
    with pytest.raises(PatchError, match=r"linear\.weight.*int8"):
        session.apply(files_on(["linear.bias"]))
    assert session.attached == ()
