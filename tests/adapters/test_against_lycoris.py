"""Every family against `lycoris-lora`: its files, read with ours, mean the weights that it computes."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.norms import NormModule
from torch import Tensor, nn

from lib_precision_lora.adapters import Dense, Kronecker, LowRank, read_adapters
from lib_precision_lora.adapters.terms import Hadamard
from lib_precision_lora.branch import EffectiveWeight, PatchSession
from lib_precision_lora.storage import stored_weight
from tests.adapters.lycoris_files import KINDS, LAYERS, Trained, randomize, trained

TOLERANCE = 1e-5
CONV_ALONE = ("lora-tucker", "dora-tucker", "loha-tucker", "lokr-tucker")
CASES = [
    (kind, layer)
    for kind in KINDS
    for layer in LAYERS
    if layer in ("linear", "conv") or kind in ("lora", "dora-in", "loha", "lokr-factored", "ia3-in", "oft")
    if not (kind in CONV_ALONE and layer == "linear")
]


def difference(mine: Tensor, theirs: Tensor, base: Tensor) -> float:
    """`‖mine − theirs‖ / ‖theirs − base‖`."""
    size = float((theirs - base.double()).norm())
    assert size > 0.0
    return float((mine.double() - theirs).norm()) / size


def ours(case: Trained) -> EffectiveWeight:
    file = read_adapters(case.file, {"lycoris_layer": "layer.weight"})
    assert file.unmatched == ()
    adapter = file["layer.weight"]
    return EffectiveWeight.identity(stored_weight(case.layer.weight, case.layer)).apply(adapter)


@pytest.mark.parametrize(("kind", "layer"), CASES)
def test_a_file_means_the_weight_that_lycoris_computes(kind: str, layer: str) -> None:
    case = trained(kind, layer)
    base = case.layer.weight
    effective = ours(case)
    for dtype in (torch.float64, torch.float32):
        mine = base.double() + effective.delta(dtype).double()
        assert difference(mine, case.weight, base) <= TOLERANCE
        if case.scale == 1.0 or not kind.startswith(("loha", "lokr")):
            assert difference(mine, case.merged, base) <= TOLERANCE


@pytest.mark.parametrize(("kind", "layer"), CASES)
def test_a_layer_with_the_file_computes_what_lycoris_computes(kind: str, layer: str) -> None:
    case = trained(kind, layer)
    kernel = case.layer.weight.shape[2:]
    x = torch.randn(3, case.layer.weight.shape[1], *(9 for _ in kernel), generator=torch.manual_seed(1))
    exact = LAYERS[layer]().requires_grad_(False).double()
    exact.weight.data, exact.bias.data = case.weight, case.layer.bias.double()
    if kind == "full":
        exact.bias.data = exact.bias.data + case.file["lycoris_layer.diff_b"].double()
    model = nn.ModuleDict({"layer": case.layer})
    with torch.no_grad(), PatchSession(model) as session:
        session.apply([("file", read_adapters(case.file, {"lycoris_layer": "layer.weight"}), 1.0)])
        y = case.layer(x)
    expected = exact(x.double())
    assert float((y.double() - expected).norm() / expected.norm()) <= TOLERANCE


@pytest.mark.parametrize(("kind", "term"), [
    ("loha", LowRank), ("loha-tucker", LowRank), ("loha-streamed", Hadamard), ("lokr-full", Kronecker),
    ("lokr-both", Kronecker), ("lokr-tucker", Kronecker),
])  # fmt: skip
def test_a_product_stays_in_the_form_that_is_cheapest(kind: str, term: type) -> None:
    steps = ours(trained(kind, "conv")).steps
    assert [type(step.term) for step in steps] == [term]


def test_a_full_difference_is_dense_and_brings_its_bias() -> None:
    case = trained("full", "linear")
    file = read_adapters(case.file, {"lycoris_layer": "layer.weight"})
    assert set(file) == {"layer.weight", "layer.bias"}
    assert torch.equal(file["layer.bias"].tensors()[0], case.file["lycoris_layer.diff_b"])
    assert [type(step.term) for step in ours(case).steps] == [Dense]


@pytest.mark.parametrize("norm", [nn.LayerNorm(12), nn.GroupNorm(3, 12)], ids=["layer", "group"])
def test_norms_mean_what_lycoris_computes(norm: nn.Module) -> None:
    norm.requires_grad_(False)
    module = NormModule("layer", norm, rank_dropout=0.0)
    randomize(module)
    file = read_adapters(module.state_dict(prefix="lycoris_norm."), {"lycoris_norm": "norm.weight"})
    assert file.unmatched == ()
    x = torch.randn(5, 12)
    model = nn.ModuleDict({"norm": norm})
    with torch.no_grad(), PatchSession(model) as session:
        expected = module(x)
        session.apply([("file", file, 1.0)])
        torch.testing.assert_close(norm(x), expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert float((expected - module.org_forward(x)).norm()) > 0.0


def test_dylora_is_the_lora_of_its_whole_rank() -> None:
    layer = nn.Linear(10, 6).requires_grad_(False)
    module = DyLoraModule("layer", layer, lora_dim=4, alpha=2, block_size=1)
    randomize(module)
    with torch.no_grad():
        expected, _ = module.get_merged_weight(1.0, rank=3)
    (adapter,) = read_adapters(module.state_dict(prefix="lycoris_layer.")).values()
    delta = EffectiveWeight.identity(stored_weight(layer.weight)).apply(adapter).delta()
    assert adapter.kind == "lora"
    assert difference(layer.weight + delta, expected.double(), layer.weight) <= TOLERANCE
