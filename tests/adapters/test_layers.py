"""Parts of one layer under several names are one layer; a part that is not understood is a finding."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import AdapterFile, DoRA, LoRA, Target, read_adapters
from lib_precision_lora.branch import PatchSession

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
DOTTED = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1.to_k"
PARAMETER = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
KEY_MAP = {NAME: PARAMETER, NAME.replace("to_k", "to_q"): PARAMETER.replace("to_k", "to_q")}


def lora(name: str = NAME, out: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {
        f"{name}.lora_down.weight": torch.randn(2, 5, generator=g),
        f"{name}.lora_up.weight": torch.randn(out, 2, generator=g),
        f"{name}.alpha": torch.tensor(2.0),
    }


MAGNITUDES = {
    "diffusers for kohya, with a dot left": f"{DOTTED}.lora_magnitude_vector",
    "diffusers": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora_magnitude_vector",
    "PEFT's layer": f"{NAME}.lora_magnitude_vector.weight",
    "PEFT's raw layer": f"{NAME}.lora_magnitude_vector.default.weight",
    "PEFT's raw vector": f"{NAME}.lora_magnitude_vector.default",
    "PEFT's raw vector of a named adapter": f"{DOTTED}.lora_magnitude_vector.my-style_2",
    "ai-toolkit": f"{NAME}.magnitude",
    "a trailing underscore": f"{NAME}_.lora_magnitude_vector",
    "torch.compile": "unet._orig_mod.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.magnitude",
}


@pytest.mark.parametrize("with_map", [True, False])
@pytest.mark.parametrize("magnitude_first", [True, False])
@pytest.mark.parametrize("writer", MAGNITUDES)
def test_a_magnitude_under_another_spelling_makes_its_layer_a_dora(
    writer: str, magnitude_first: bool, with_map: bool
) -> None:
    vector = {MAGNITUDES[writer]: torch.arange(1.0, 7.0)}
    state = vector | lora() if magnitude_first else lora() | vector
    file = read_adapters(state, KEY_MAP if with_map else None)
    (adapter,) = file.values()
    assert isinstance(adapter, DoRA)
    assert torch.equal(adapter.magnitude, torch.arange(1.0, 7.0))
    assert (file.unmatched, file.parts, file.findings) == ((), (), ())


def test_a_magnitude_of_another_layer_stays_apart() -> None:
    """The near miss: to_q's magnitude beside to_k's LoRA."""
    state = lora() | {f"{DOTTED.replace('to_k', 'to_q')}.lora_magnitude_vector": torch.ones(6)}
    file = read_adapters(state, KEY_MAP)
    assert {name: adapter.kind for name, adapter in file.items()} == {PARAMETER: "lora"}
    assert (len(file.unmatched), file.parts, file.findings) == (1, (), ())


PARTS = [
    "surprise",
    "dora_norm",
    "lora_E",
    "vera_lambda_b.default",
    "lora_up.weight.absmax",
    "diff",
    "scalar.x.y",
]


@pytest.mark.parametrize("name", [NAME, DOTTED])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_not_understood_is_a_finding_with_its_key(part: str, name: str) -> None:
    file = read_adapters(lora() | {f"{name}.{part}": torch.ones(2)}, KEY_MAP)
    assert set(file) == {PARAMETER}
    assert file.parts == file.unmatched == (f"{name}.{part}",)
    (finding,) = file.findings
    assert f"{name}.{part}" in finding
    assert "not understood" in finding


def test_the_same_part_of_many_layers_is_one_finding_that_counts_them() -> None:
    state = {}
    for number in range(30):
        state |= lora(f"block.{number}.to_k") | {f"block.{number}.to_k.surprise": torch.ones(1)}
    (finding,) = read_adapters(state).findings
    assert finding.startswith("30 tensors")
    assert "block.0.to_k.surprise" in finding


def test_a_file_that_says_something_else_of_each_layer_is_cut_short() -> None:
    state = {}
    for number in range(30):
        state |= lora(f"block.{number}.to_k") | {f"block.{number}.to_k.surprise{number}": torch.ones(1)}
    findings = read_adapters(state).findings
    assert len(findings) == 13
    assert findings[-1] == "and 18 more of such findings"


def test_what_belongs_to_no_patched_layer_is_no_finding() -> None:
    """The near misses: a layer that the model lacks, one without an adapter, an alpha that scales nothing."""
    state = lora() | lora("lora_unet_nowhere") | {f"{NAME.replace('to_k', 'to_q')}.surprise": torch.ones(1)}
    file = read_adapters(state, KEY_MAP)
    assert len(file.unmatched) == 4
    assert (file.parts, file.findings) == ((), ())
    dense = read_adapters({"a.diff": torch.ones(2, 2), "a.alpha": torch.tensor(1.0)})
    assert (dense.unmatched, dense.findings) == ((), ())


@pytest.mark.parametrize(
    "name", [f"{NAME}_", f"{NAME}__", NAME.replace("_attn1", "__attn1"), DOTTED, f"{DOTTED}_", f"{DOTTED}."]
)
def test_a_name_that_is_nearly_right_is_read(name: str) -> None:
    file = read_adapters(lora(name), KEY_MAP)
    (adapter,) = file.values()
    assert isinstance(adapter, LoRA)
    assert (set(file), file.unmatched, file.findings) == ({PARAMETER}, (), ())


@pytest.mark.parametrize("name", [f"{NAME}x", NAME[:-1], f"{NAME}_x", f"x_{NAME}"])
def test_a_name_that_is_another_one_is_not(name: str) -> None:
    assert len(read_adapters(lora(name), KEY_MAP)) == 0


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "unet._fsdp_wrapped_module."]
)
def test_what_torchs_wrappers_add_to_a_name_is_left_out(wrapper: str) -> None:
    file = read_adapters(lora(f"{wrapper}mid_block.attn.to_k"), {"unet.mid_block.attn.to_k": "w.weight"})
    assert set(file) == {"w.weight"}


def test_two_layers_that_differ_in_dots_alone_are_two_where_no_model_tells_more() -> None:
    file = read_adapters(lora("a.b_c") | lora("a.b.c"))
    assert set(file) == {"a.b_c", "a.b.c"}
    assert file.unmatched == ()


def test_a_layer_under_two_names_is_a_finding() -> None:
    file = read_adapters(lora() | lora(DOTTED), KEY_MAP)
    assert set(file.parts) == set(lora(DOTTED))
    assert all("not understood" in finding for finding in file.findings)
    assert len(file.findings) == 3


def test_rows_of_a_fused_weight_are_layers_of_their_own() -> None:
    target = ("m.qkv.weight", (0, 6, 6))
    state = lora("t.to_k") | {"t.to_k.magnitude": torch.ones(6)} | lora("t.qkv", out=18)
    file = read_adapters(state, {"t.to_k": target, "t.qkv": "m.qkv.weight"})
    assert {str(name): adapter.kind for name, adapter in file.items()} == {
        str(Target("m.qkv.weight", (6, 6))): "dora",
        "m.qkv.weight": "lora",
    }


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.proj = nn.Embedding(11, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.proj(self.words(x))
        return result


RAW = {
    "lora": lambda: peft.LoraConfig(r=2, lora_alpha=2, target_modules=["words", "proj"]),
    "dora": lambda: peft.LoraConfig(r=2, lora_alpha=2, target_modules=["proj"], use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=2, target_modules=["proj"]),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=2, target_modules=["proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["proj"], feedforward_modules=[]),
    "oft": lambda: peft.OFTConfig(oft_block_size=2, target_modules=["proj"]),
    "boft": lambda: peft.BOFTConfig(boft_block_size=2, target_modules=["proj"]),
}


@pytest.mark.parametrize("adapter_name", ["default", "my_style-2"])
@pytest.mark.parametrize("kind", RAW)
def test_a_raw_state_dict_of_peft_means_the_model_that_it_merges(kind: str, adapter_name: str) -> None:
    """As `model.state_dict()` has it: the adapter's name in every key, vectors and embeddings included."""
    torch.manual_seed(1)
    base = Words().requires_grad_(False)
    wrapped = peft.get_peft_model(copy.deepcopy(base), RAW[kind](), adapter_name=adapter_name)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                near_one = "magnitude" in name or "ia3_l" in name or "boft_s" in name
                change = 0.1 * torch.randn_like(parameter)
                parameter.copy_(parameter * (1.0 + change) if near_one else change)
    state = {key: value.clone() for key, value in wrapped.state_dict().items() if adapter_name in key}
    assert all(f".{adapter_name}" in key for key in state)
    merged = wrapped.double().merge_and_unload()
    file: AdapterFile = read_adapters(
        state, {"words": "words.weight", "proj": "proj.weight", "base_model.model.proj": "proj.weight"}
    )
    assert len(file) >= 1
    assert (file.unmatched, file.findings) == ((), ())
    base, x = base.double(), torch.arange(11)
    with torch.no_grad(), PatchSession(base) as session:
        before = base(x)
        session.apply([("file", file, 1.0)])
        y, expected = base(x), merged(x)
    assert float((y - expected).norm() / (expected - before).norm()) <= 1e-5
