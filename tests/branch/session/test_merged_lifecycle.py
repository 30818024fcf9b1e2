"""Any sequence of attaching, failing, moving and copying leaves the host what it would have had."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from torch import nn

from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.session import merged
from tests.branch.hosts import Mixed, hooks_of
from tests.branch.patch_sets import EVERYTHING, Items, outputs
from tests.branch.session.test_failure import CHANGED, FEWER, FORMER, SAME_FACTORS, InjectedError, failing

SETS: dict[str, Items] = {
    "former": FORMER,
    "weaker": SAME_FACTORS,
    "changed": CHANGED,
    "fewer": FEWER,
    "all": EVERYTHING,
}


class Lifecycle(RuleBasedStateMachine):
    """Attach, detach, move, cast, copy and fail in any order: in the end the host has what it would have."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.alone = Mixed(), Mixed()
        self.objects = dict(self.model.named_parameters())
        self.session = PatchSession(self.model)
        self.present: tuple[Items, str] | None = None

    @rule(name=st.sampled_from(list(SETS)), dense=st.sampled_from(["merge", "merge", "branch", "auto"]))
    def apply(self, name: str, dense: str) -> None:
        self.session.apply(SETS[name], "fp32", dense)
        self.present = SETS[name], dense

    @rule()
    def clear(self) -> None:
        self.session.clear()
        self.present = None

    @rule()
    def clear_merged(self) -> None:
        self.session.clear_merged()
        assert self.session.merged == ()
        if self.present is not None:
            self.session.apply(self.present[0], "fp32", self.present[1])

    @rule(dtype=st.sampled_from([torch.float64, torch.float32]))
    def cast_and_return(self, dtype: torch.dtype) -> None:
        for model in (self.model, self.alone):
            model.to(dtype).to(torch.float32)

    @rule()
    def the_host_copies_a_layer(self) -> None:
        """As it swaps it; where something stands there, the next change sees it."""
        layer = self.model.second
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        if self.present is None or "second" not in self.session.merged:
            self.objects["second.weight"] = layer.weight
        if self.present is not None:
            self.session.apply(self.present[0], "fp32", self.present[1])

    @rule(
        name=st.sampled_from(list(SETS)),
        at=st.integers(1, 6),
        place=st.sampled_from(["write_merged", "park"]),
    )
    def a_failure(self, name: str, at: int, place: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merged, place, failing(getattr(merged, place), at, InjectedError))
            try:
                self.session.apply(SETS[name], "fp32", "merge")
                self.present = SETS[name], "merge"
            except InjectedError:
                pass

    @invariant()
    def the_model_computes_the_present_set(self) -> None:
        fresh = Mixed()
        with PatchSession(fresh) as session:
            if self.present is not None:
                session.apply(self.present[0], "fp32")
            torch.testing.assert_close(outputs(self.model), outputs(fresh), rtol=1e-4, atol=1e-5)

    @invariant()
    def what_is_not_patched_is_the_hosts(self) -> None:
        if self.present is None:
            self.same_as_alone()

    def same_as_alone(self) -> None:
        for name, value in self.model.named_parameters():
            assert value is self.objects[name], name
            assert torch.equal(value, self.alone.get_parameter(name)), name

    def teardown(self) -> None:
        self.session.clear()
        self.same_as_alone()
        assert hooks_of(self.model) == 0


def test_any_sequence_leaves_the_host_what_it_would_have() -> None:
    run_state_machine_as_test(
        Lifecycle,
        settings=settings(
            max_examples=40,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
