"""The host's patch values of LoHa, LoKr and DoRA: read in its order, and carried through by ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import from_forge_patch, to_forge_patch
from lib_precision_lora.branch import EffectiveWeight
from lib_precision_lora.storage import stored_weight
from tests.families import BASE_STD, FAMILIES, family
from tests.oracles import Step, merge

ORDER = {
    "lora": ("lora_up.weight", "lora_down.weight", "alpha", "lora_mid.weight", "dora_scale"),
    "loha": ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale"),
    "lokr": (
        *("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        "dora_scale",
    ),
}
"""What Forge's `load_lora` puts into the tuple of each kind (comfyui_lora_collection/lora.py)."""

NAMES = [name for name in FAMILIES if name.startswith(("lora", "loha", "lokr", "dora"))]
SHAPE = (16, 12)


def forge_value(name: str, tensors: dict[str, Tensor]) -> tuple[str, tuple[object, ...]]:
    kind = "lora" if name.startswith(("lora", "dora")) else name[:4]
    parts = {key: value.item() if key == "alpha" else value for key, value in tensors.items()}
    return kind, tuple(parts.get(key) for key in ORDER[kind])


@pytest.mark.parametrize("shape", [SHAPE, (16, 4, 3, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_the_host_means_what_the_file_means(name: str, shape: tuple[int, ...]) -> None:
    made = family(name, shape)
    base = BASE_STD * torch.randn(shape, generator=torch.manual_seed(3))
    adapter = from_forge_patch("layer", forge_value(name, made.tensors))
    assert adapter is not None
    assert adapter.kind == made.adapter.kind
    effective = EffectiveWeight.identity(stored_weight(nn.Parameter(base))).apply(adapter, 0.7)
    weight, size = merge(base, [Step(made.change, 0.7)])
    assert float((effective.delta().double() - (weight - base.double())).norm()) / size <= 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_comes_back_from_the_value_made_of_it(name: str) -> None:
    adapter = family(name, SHAPE).adapter
    value = to_forge_patch(adapter)
    kind, content = value
    assert isinstance(kind, str)
    assert isinstance(content, tuple)
    assert from_forge_patch("layer", value) is adapter


def test_a_value_that_is_not_ours_and_does_not_carry_its_parts_is_left_to_the_host() -> None:
    assert from_forge_patch("layer", ("glora", (*[torch.ones(2, 2)] * 4, 1.0, None))) is None
    assert from_forge_patch("layer", ("oft", (torch.ones(2, 2),))) is None


@pytest.mark.parametrize("kind", ["loha", "lokr", "lora", "diff"])
def test_a_value_of_another_length_is_left_to_the_host(kind: str) -> None:
    assert from_forge_patch("layer", (kind, (torch.ones(2, 2), torch.ones(2, 2)))) is None
