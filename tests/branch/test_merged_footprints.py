"""Law 4 for layers that are merged: they take the place of the base, and nothing is planned beside them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_precision_lora.branch import DensePolicy, PatchSession
from tests.branch.hosts import Holder
from tests.branch.recipes import recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize("dense", ["branch", "auto", "merge"])
@pytest.mark.parametrize("kind", ["lora-rank-1", "diff-fp32"], ids=["cheap beside", "dear beside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_planned_beside_a_layer_is_what_comes_to_stand_there(
    dense: DensePolicy, kind: str, dtype: torch.dtype
) -> None:
    holder = Holder(nn.Linear(256, 256).to(dtype))
    session = PatchSession(holder)
    patches = [
        recipe(kind, (256, 256)).patch("layer.weight")[0],
        recipe("diff-fp32", (256,)).patch("layer.bias")[0],
    ]
    planned = session.footprints(patches, "auto", CPU, dtype, dense)
    session.apply_patches(patches, "auto", dense)
    session.place(CPU, dtype)
    assert set(planned) == set(session.attached) - set(session.merged)
    assert sum(each.factor_bytes for each in planned.values()) == session.placed_bytes
    expected = dtype == torch.float32 and (dense == "merge" or (dense == "auto" and kind == "diff-fp32"))
    assert bool(session.merged) == expected
