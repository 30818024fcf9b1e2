"""Law 4 for every stored weight × family × (512, 4096 tokens), on small layers: what is measured keeps below
what is predicted, and the two lie within the law's bound."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.session.patch import resolve
from lib_precision_lora.memory.meter import ByteMeter
from tests.branch.algebra.test_family_laws import SHAPE, stored_base
from tests.branch.hosts import Holder, Linear
from tests.families import FAMILIES, family
from tests.storage.formats import VARIANTS

CPU = torch.device("cpu")
LAW = 32 * 2**20
"""The part of the bound that does not shrink with the layer."""

SLACK = 2**18
"""Index tensors, scalars and the like, which no formula has."""


def peak(run: Callable[..., object], *given: object) -> int:
    with torch.no_grad(), ByteMeter() as meter:
        run(*given)
    return meter.peak


@pytest.mark.parametrize("stored", VARIANTS)
def test_every_family_takes_what_is_predicted_on_this_stored_weight(stored: str) -> None:
    case = stored_base(stored)
    for name in FAMILIES:
        holder = Holder(Linear(case.parameter, case.expected, case.module.scale_weight))
        items = [("file", {"layer.weight": family(name, SHAPE).adapter}, 0.7)]
        patches, _ = resolve(holder, items)
        for tokens in (512, 4096):
            x = torch.randn(tokens, SHAPE[1])
            with PatchSession(holder) as session:
                planned = session.footprints(patches, "fp32", CPU, torch.float32)["layer"]
                bare = peak(holder, x)
                made = peak(attach, session, items)
                measured = max(made, peak(holder, x) - bare)
            factors = planned.factor_bytes - planned.shared
            predicted = factors + planned.workspace_bytes(tokens)
            assert measured <= predicted + SLACK, (name, tokens)
            assert abs(predicted - measured) <= max(0.05 * measured, LAW), (name, tokens)


def attach(session: PatchSession, items: list) -> None:
    session.apply(items, "fp32")
    session.place(CPU, torch.float32)
