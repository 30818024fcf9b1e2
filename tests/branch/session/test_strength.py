"""What a change of a patch set leaves alone: the factors of what has only another strength, other layers."""

from __future__ import annotations

import pytest
import torch

from lib_precision_lora.branch import Compute, Patch, PatchSession
from tests.branch.hosts import SHAPES, Mixed
from tests.branch.patch_sets import EVERYTHING, files_on, outputs
from tests.branch.recipes import recipe

BRANCHED = ["embedding.weight", "linear.weight", "linear.bias", "second.weight", "conv.weight"]


def pieces(session: PatchSession) -> dict[str, object]:
    return {name: attached.piece for name, attached in session._attached.items()}


def factors(session: PatchSession) -> dict[str, list[torch.Tensor]]:
    """The stacked factor tensors of every branch that has some."""
    stacked = {name: piece for name, piece in pieces(session).items() if getattr(piece, "_stack", None)}
    return {
        name: [
            piece._stack.down,
            piece._stack.exponents,
            *(part.up for phase in piece._operands.phases for part in phase.ranges if part.up is not None),
        ]
        for name, piece in stacked.items()
    }


@pytest.mark.parametrize("compute", ["auto", "fp16", "fp32"])
def test_a_change_of_strength_keeps_the_very_same_factor_tensors(compute: Compute) -> None:
    model, fresh = Mixed(), Mixed()
    with PatchSession(model) as session, PatchSession(fresh) as other:
        session.apply(files_on(BRANCHED, 1.0) + files_on(BRANCHED, 0.5, kind=1), compute)
        outputs(model)
        before, branches = factors(session), pieces(session)
        bytes_before = {name: [t.clone() for t in tensors] for name, tensors in before.items()}
        assert set(before) == {
            "linear",
            "second",
            "conv",
        }  # embeddings use the file's factors
        for first, second in ((0.3, -2.0), (0.3, 0.3), (1.0, 0.5)):
            items = files_on(BRANCHED, first) + files_on(BRANCHED, second, kind=1)
            session.apply(items, compute)
            other.clear()
            other.apply(items, compute)
            assert torch.equal(outputs(model), outputs(fresh))
            assert pieces(session) == branches
            after = factors(session)
            for name, tensors in before.items():
                assert all(mine is its for mine, its in zip(tensors, after[name], strict=True))
                assert all(map(torch.equal, tensors, bytes_before[name]))


def test_a_change_of_strength_of_a_fused_weight_keeps_the_factors() -> None:
    model = Mixed()
    whole, part = recipe("lora-rank-8-fp16", (12, 8)), recipe("lora-rank-1", (4, 8))

    def patches(first: float, second: float) -> list[Patch]:
        return [
            whole.patch("linear.weight", first)[0],
            part.patch("linear.weight", second, (4, 4))[0],
            recipe("diff-bf16", (12, 8)).patch("linear.weight", second)[0],
        ]

    with PatchSession(model) as session:
        session.apply_patches(patches(1.0, 1.0))
        outputs(model)
        before = factors(session)["linear"]
        assert before[0].shape == (9, 8)
        session.apply_patches(patches(0.5, -1.0))
        assert all(mine is its for mine, its in zip(before, factors(session)["linear"], strict=True))


def test_a_change_at_one_layer_leaves_the_others_attachments_untouched() -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply(files_on(BRANCHED))
        outputs(model)
        before = dict(session._attached)
        stacks = factors(session)
        session.apply(
            files_on([name for name in BRANCHED if name != "second.weight"])
            + files_on(["second.weight"], kind=1)
        )
        outputs(model)
        after = session._attached
        assert set(after) == set(before)
        for name in ("embedding", "linear", "conv"):
            assert after[name] is before[name]
            kept, present = stacks.get(name, []), factors(session).get(name, [])
            assert all(mine is its for mine, its in zip(kept, present, strict=True))
        assert after["second"].piece is not before["second"].piece


def test_a_change_of_compute_mode_makes_new_branches() -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply(files_on(BRANCHED), "fp32")
        exact = outputs(model)
        session.apply(files_on(BRANCHED), "fp16")
        rounded = outputs(model)
        assert all(tensors[0].dtype == torch.float16 for tensors in factors(session).values())
        assert not torch.equal(exact, rounded)


@pytest.mark.parametrize("name", SHAPES)
def test_any_change_gives_what_a_fresh_session_gives(name: str) -> None:
    model = Mixed()
    session = PatchSession(model)
    for kind, strength in ((0, 1.0), (0, -0.5), (1, 1.0), (3, 2.0), (4, 1.0), (3, 0.5), (0, 1.0)):
        items = EVERYTHING + files_on([name], strength, kind)
        session.apply(items)
        fresh = Mixed()
        with PatchSession(fresh) as other:
            other.apply(items)
            assert torch.equal(outputs(model), outputs(fresh))
