"""Every family against `lycoris-lora`: its files, read with ours, mean the weights that it computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.glora import _glora_weight
from lycoris.modules.locon import LoConModule
from lycoris.modules.norms import NormModule
from lycoris.modules.tlora import TLoraModule
from torch import Tensor, nn

from lib_precision_lora.adapters import AdapterError, Dense, Kronecker, LowRank, read_adapters
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


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_dylora_is_the_lora_of_its_whole_rank(make: Callable[[], nn.Module]) -> None:
    layer = make().requires_grad_(False)
    module = DyLoraModule("layer", layer, lora_dim=4, alpha=2, block_size=1)
    randomize(module)
    with torch.no_grad():
        expected, _ = module.get_merged_weight(1.0, rank=3)
    (adapter,) = read_adapters(module.state_dict(prefix="lycoris_layer.")).values()
    delta = EffectiveWeight.identity(stored_weight(layer.weight)).apply(adapter).delta()
    assert adapter.kind == "lora"
    assert difference(layer.weight + delta, expected.double(), layer.weight) <= TOLERANCE


def test_dylora_of_larger_blocks_is_the_lora_that_lycoris_loads() -> None:
    """In training it divides alpha by the number of blocks; its file, which does not tell the block's size,
    is a LoRA's, and so is the scale with which the library itself loads it: alpha / rank."""
    layer = nn.Linear(10, 6).requires_grad_(False)
    module = DyLoraModule("layer", layer, lora_dim=4, alpha=2, block_size=2)
    randomize(module)
    file = module.state_dict(prefix="layer.")
    up, down, alpha = (file[f"layer.{key}"] for key in ("lora_up.weight", "lora_down.weight", "alpha"))
    loaded = LoConModule.make_module_from_state_dict("layer", layer, up, down, None, alpha, None)
    with torch.no_grad():
        expected, _ = loaded.get_merged_weight(1.0, layer.weight.shape)
        in_training, _ = module.get_merged_weight(1.0, rank=2)
    delta = EffectiveWeight.identity(stored_weight(layer.weight)).apply(read_adapters(file)["layer"]).delta()
    assert difference(layer.weight + delta, expected.double(), layer.weight) <= TOLERANCE
    assert difference(layer.weight + 2 * delta, in_training.double(), layer.weight) <= TOLERANCE


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_tlora_is_refused_by_its_name(make: Callable[[], nn.Module]) -> None:
    module = TLoraModule("layer", make(), lora_dim=4)
    file = module.state_dict(prefix="lycoris_layer.")
    assert not any("base" in key for key in file)
    with pytest.raises(AdapterError, match=r"^lycoris_layer: T-LoRA is not supported, its file lacks"):
        read_adapters(file)


def test_glora_with_a_core_is_what_the_library_computes() -> None:
    """Its module never makes one (it asks for a 1×1 kernel that is none), its function reads one."""
    g = torch.Generator().manual_seed(2)
    base = torch.randn(32, 16, 3, 3, generator=g)
    shapes = {"a1": (16, 4, 1, 1), "a2": (4, 16, 1, 1), "b1": (32, 4, 1, 1), "b2": (4, 16, 1, 1)}
    parts = {role: 0.3 * torch.randn(shape, generator=g) for role, shape in shapes.items()}
    parts["bm"] = 0.3 * torch.randn(4, 4, 3, 3, generator=g)
    file = {f"layer.{role}.weight": part for role, part in parts.items()} | {"layer.alpha": torch.tensor(2.0)}
    delta = EffectiveWeight.identity(stored_weight(nn.Parameter(base))).apply(read_adapters(file)["layer"])
    expected = _glora_weight(base.double(), *(part.double() for part in parts.values()), 0.5)
    assert difference(base + delta.delta(), base.double() + expected, base) <= TOLERANCE
