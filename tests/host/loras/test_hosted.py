"""A hosted session by itself: what is left out, what stays on, and what it keeps alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lib_precision_lora.adapters import Adapter, to_forge_patch
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.session.sites import Site, find_site
from lib_precision_lora.host.loras import division
from lib_precision_lora.host.loras.hosted import HostedSession, StillMerged
from lib_precision_lora.host.page.settings import Arithmetic
from tests.families import family


def small_model() -> nn.ModuleDict:
    torch.manual_seed(3)
    model = nn.ModuleDict({"words": nn.Embedding(16, 8), "linear": nn.Linear(8, 16)})
    return model.requires_grad_(False)


def entry(value: Any, strength: float = 1.0) -> list[Any]:
    return [strength, value, 1.0, None, None]


def ours(name: str, shape: tuple[int, ...]) -> Any:
    adapter: Adapter = family(name, shape).adapter
    return to_forge_patch(adapter)


def identifier(name: str) -> tuple[Any, ...]:
    return name, 1.0, 1.0, False


def test_a_stack_that_cannot_stand_costs_its_last_file_alone_and_keeps_no_model_alive() -> None:
    model = small_model()
    session, alive = HostedSession(model), weakref.ref(model)
    patches = {
        identifier("good"): {"linear.weight": [entry(ours("lora", (16, 8)))]},
        identifier("rotates words"): {
            "words.weight": [entry(ours("oft", (16, 8)))],
            "linear.weight": [entry(ours("lora", (16, 8)))],
        },
    }
    problems = session.follow(model, patches, Arithmetic(), lambda theirs: None)
    assert [problem.source for problem in problems] == ["rotates words"]
    assert "words.weight" in str(problems[0])
    assert session.attached == ("linear",)
    alone = small_model()
    with PatchSession(alone) as fresh:
        fresh.apply([("good", {"linear.weight": family("lora", (16, 8)).adapter}, 1.0)])
        x = torch.ones(2, 8)
        assert torch.equal(model["linear"](x), alone["linear"](x))
    del model
    gc.collect()
    assert alive() is None


def test_what_the_host_cannot_read_is_left_out_before_the_host_sees_it() -> None:
    model = small_model()
    session, merged = HostedSession(model), []
    patches = {
        identifier("loha"): {"linear.weight": [entry(ours("loha-streamed", (16, 8)))]},
        identifier("inpaint"): {"linear.weight": [entry(("fooocus", (torch.ones(1),)))]},
    }
    problems = session.follow(model, patches, Arithmetic(), merged.append)
    assert [problem.source for problem in problems] == ["loha"]
    assert merged == [{identifier("inpaint"): patches[identifier("inpaint")]}]
    assert session.attached == ()


def test_what_the_host_cannot_take_out_is_told_each_time_and_tried_again() -> None:
    model = small_model()
    session, broken = HostedSession(model), False
    patches = {identifier("inpaint"): {"linear.weight": [entry(("fooocus", (torch.ones(1),)))]}}

    def merge(theirs: Any) -> None:
        if broken:
            raise RuntimeError("no such luck")

    assert session.follow(model, patches, Arithmetic(), merge) == []
    for broken in (True, True, False):
        problems = session.follow(model, {}, Arithmetic(), merge)
        assert [type(problem) for problem in problems] == [StillMerged] * broken
    assert session.follow(model, {}, Arithmetic(), merge) == []


def test_a_norm_is_read_anew_where_the_host_has_put_another_base_under_the_same_name() -> None:
    model = small_model()
    item = ("dora", {"linear.weight": family("dora-out", (16, 8)).adapter}, 1.0)
    x = torch.ones(2, 8)
    with PatchSession(model) as session:
        session.apply([item])
        before = model["linear"](x)
        model["linear"].weight.data.mul_(3.0)
        session.apply([item])
        after = model["linear"](x)
        assert not torch.equal(before, after)
    with PatchSession(model) as fresh:
        fresh.apply([item])
        assert torch.equal(model["linear"](x), after)


def test_each_layer_is_looked_up_once_however_many_files_patch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []

    def counted(model: nn.Module, name: str) -> Site:
        looked_up.append(name)
        return find_site(model, name)

    monkeypatch.setattr(division, "find_site", counted)
    patches = {
        identifier(f"file {number}"): {
            "linear.weight": [entry(ours("lora", (16, 8))), entry(ours("loha", (16, 8)))],
            "words.weight": [entry(ours("lora", (16, 8)))],
        }
        for number in range(3)
    }
    mine, theirs = division.Division().divide(small_model(), patches)
    assert (len(mine), theirs) == (9, {})
    assert sorted(looked_up) == ["linear.weight", "words.weight"]
