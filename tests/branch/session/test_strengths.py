"""A change of strengths alone exchanges numbers, where files only add to weights; all else is as before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lib_precision_lora.adapters import Target
from lib_precision_lora.branch import Patch, PatchError, PatchSession
from lib_precision_lora.branch.forward import weight_branch
from lib_precision_lora.branch.session import compose
from tests.branch.hosts import SHAPES, Mixed
from tests.branch.patch_sets import outputs, snapshot
from tests.branch.session.test_failure import ERRORS, failing
from tests.families import family

ADDITIVE = ("lora", "loha", "loha-streamed", "lokr-right")
LAYERS = ("linear.weight", "second.weight", "conv.weight")


def patches(
    first: float = 1.0, second: float = 0.5, kinds: tuple[str, ...] = ADDITIVE, layers: Any = LAYERS
) -> list[Patch]:
    """Two files with all these kinds on each layer; a set of the same adapters every time."""
    return [
        Patch(source, Target(name), family(kind, SHAPES[name], seed).adapter, strength)
        for seed, (source, strength) in enumerate((("one", first), ("two", second)))
        for kind in kinds
        for name in layers
    ]


def fresh_outputs(wanted: list[Patch], change: Callable[[Mixed], None] = lambda model: None) -> torch.Tensor:
    model = Mixed()
    change(model)
    with PatchSession(model) as session:
        session.apply_patches(wanted)
        return outputs(model)


def at(former: list[Patch], *strengths: float) -> list[Patch]:
    """The same patches, each file's at its strength."""
    by_source = dict(zip(("one", "two"), strengths, strict=True))
    return [dataclasses.replace(patch, strength=by_source[patch.source]) for patch in former]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parameters that were looked up to be patched, and the modules that had something made for them."""
    found: list[str] = []
    find_site, make_branch = compose.find_site, compose._make_branch

    def looked_up(model: nn.Module, name: str, shadows: Any = ()) -> Any:
        found.append(name)
        return find_site(model, name, shadows)

    def branched(site: Any, path: str, *rest: Any) -> Any:
        found.append(path)
        return make_branch(site, path, *rest)

    monkeypatch.setattr(compose, "find_site", looked_up)
    monkeypatch.setattr(compose, "_make_branch", branched)
    return found


@pytest.mark.parametrize("kind", [*ADDITIVE, ADDITIVE])
def test_other_strengths_look_nothing_up_make_nothing_and_give_what_a_fresh_session_gives(
    made: list[str], kind: Any
) -> None:
    model, former = Mixed(), patches(kinds=(kind,) if isinstance(kind, str) else kind)
    with PatchSession(model) as session:
        session.apply_patches(former)
        outputs(model)
        assert made
        for strengths in ((0.3, -2.0), (0.3, 0.7), (1.0, 0.5)):
            made.clear()
            session.apply_patches(at(former, *strengths))
            assert not made
            changed = outputs(model)
            assert torch.equal(changed, fresh_outputs(at(former, *strengths)))
            assert [patch.strength for patch in session.patches[:1]] == [strengths[0]]


def test_strengths_that_change_before_the_first_forward_are_those_of_it(made: list[str]) -> None:
    model, former = Mixed(), patches()
    with PatchSession(model) as session:
        session.apply_patches(former)
        made.clear()
        session.apply_patches(at(former, 2.0, -1.0))
        assert not made
        assert torch.equal(outputs(model), fresh_outputs(at(former, 2.0, -1.0)))


def with_first(former: list[Patch], **changes: Any) -> list[Patch]:
    return [dataclasses.replace(former[0], **changes), *former[1:]]


def another_module(model: Mixed) -> None:
    torch.manual_seed(5)
    model.second = nn.Linear(12, 12, bias=False).requires_grad_(False)


SAME = patches()
MORE: dict[str, list[Patch]] = {
    "a strength of 0": at(SAME, 0.0, 0.5),
    "one patch less": SAME[1:],
    "one patch more": [*SAME, SAME[0]],
    "another order": SAME[::-1],
    "another adapter": with_first(SAME, adapter=family("lora", SHAPES["linear.weight"], 7).adapter),
    "a factor of the base": with_first(SAME, base_factor=0.5),
    "a part of the rows": with_first(
        SAME, target=Target("linear.weight", (2, 6)), adapter=family("lora", (6, 8), 3).adapter
    ),
}


@pytest.mark.parametrize("wanted", MORE.values(), ids=MORE)
def test_whatever_else_differs_is_made_and_comes_back_again(made: list[str], wanted: list[Patch]) -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply_patches(SAME)
        outputs(model)
        for patches_now in (wanted, SAME):
            made.clear()
            session.apply_patches(patches_now)
            assert made
            assert torch.equal(outputs(model), fresh_outputs(patches_now))


def test_another_module_of_the_same_name_has_its_branch_made(made: list[str]) -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply_patches(SAME)
        outputs(model)
        another_module(model)
        made.clear()
        session.apply_patches(at(SAME, 0.3, 0.3))
        assert "second" in made
        assert torch.equal(outputs(model), fresh_outputs(at(SAME, 0.3, 0.3), another_module))


@pytest.mark.parametrize("kind", ["dora-out", "glora", "diff", "oft"])
def test_a_file_that_reads_or_turns_the_base_has_everything_looked_up(made: list[str], kind: str) -> None:
    model, former = Mixed(), [*SAME, *patches(kinds=(kind,), layers=LAYERS[:2])]
    with PatchSession(model) as session:
        session.apply_patches(former)
        outputs(model)
        made.clear()
        session.apply_patches(at(former, 0.5, 0.25))
        assert made
        assert torch.equal(outputs(model), fresh_outputs(at(former, 0.5, 0.25)))


@pytest.mark.parametrize("strength", [1e39, float("nan"), float("-inf")])
def test_a_strength_that_is_refused_names_file_and_layer_and_leaves_everything(strength: float) -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply_patches(SAME)
        before = snapshot(model, session)
        with pytest.raises(PatchError, match=r"two: layer linear\.weight: .*strength") as caught:
            session.apply_patches(at(SAME, 0.5, strength))
        assert caught.value.source == "two"
        assert snapshot(model, session) == before
        session.apply_patches(at(SAME, 0.5, 2.0))
        assert torch.equal(outputs(model), fresh_outputs(at(SAME, 0.5, 2.0)))


@pytest.mark.parametrize("name", ["take_steps", "_scale"])
@ERRORS
def test_an_exception_amid_the_exchange_leaves_everything_as_it_was(
    error: type[BaseException], name: str
) -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply_patches(SAME)
        before = snapshot(model, session)
        for call in range(1, len(LAYERS) + 1):
            with pytest.MonkeyPatch.context() as patch:
                whole = getattr(weight_branch.WeightBranch, name)
                patch.setattr(weight_branch.WeightBranch, name, failing(whole, call, error))
                with pytest.raises(error):
                    session.apply_patches(at(SAME, 0.5, 0.25))
            assert snapshot(model, session) == before
        session.apply_patches(at(SAME, 0.5, 0.25))
        assert torch.equal(outputs(model), fresh_outputs(at(SAME, 0.5, 0.25)))


def test_what_a_file_left_behind_is_forgotten_after_changes_of_strength() -> None:
    model = Mixed()
    with PatchSession(model) as session:
        former = patches(kinds=("loha-streamed",))
        session.apply_patches(former)
        assert len(session._memo._kept) == len(former)
        session.apply_patches(at(former, 0.5, 0.25))
        assert len(session._memo._kept) == len(former)
        session.apply_patches(former[:1])
        assert len(session._memo._kept) == 1


def test_a_change_of_strengths_ticks_once_a_layer_and_can_be_given_up() -> None:
    model, heard = Mixed(), []
    with PatchSession(model) as session:
        session.apply_patches(SAME)
        session.apply_patches(at(SAME, 2.0, 0.5), tick=lambda done, total: heard.append((done, total)))
        assert heard == [(0, 3), (1, 3), (2, 3)]
