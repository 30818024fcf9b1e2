"""Every family against `peft`: files as it saves them, read with ours, mean the weights that it merges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import peft
import peft.tuners.boft.layer as peft_boft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lib_precision_lora.adapters import AdapterFile, read_adapters
from lib_precision_lora.branch import PatchSession

TOLERANCE = 1e-5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"to_q": nn.Linear(48, 32), "proj": nn.Linear(32, 16, bias=False)})
        self.conv = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.block["proj"](self.block["to_q"](x))
        return self.conv(tokens.unflatten(-1, (4, 4)).movedim(2, 1)).flatten(1)


LINEAR, ALL = ["to_q", "proj"], ["to_q", "proj", "conv"]
CONFIGS: Mapping[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=4, target_modules=ALL),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=4, target_modules=ALL, use_dora=True),
    "dora-linear": lambda: peft.LoraConfig(r=4, lora_alpha=4, target_modules=LINEAR, use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=3, target_modules=ALL),
    "loha-effective": lambda: peft.LoHaConfig(r=3, alpha=3, target_modules=ALL, use_effective_conv2d=True),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=2, target_modules=ALL),
    "lokr-both": lambda: peft.LoKrConfig(r=1, alpha=1, target_modules=LINEAR, decompose_both=True),
    "lokr-effective": lambda: peft.LoKrConfig(r=2, alpha=2, target_modules=ALL, use_effective_conv2d=True),
    "ia3": lambda: peft.IA3Config(target_modules=ALL, feedforward_modules=[]),
    "ia3-feedforward": lambda: peft.IA3Config(target_modules=ALL, feedforward_modules=ALL),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=ALL),
    "oft-shared": lambda: peft.OFTConfig(oft_block_size=4, block_share=True, target_modules=ALL),
    "oft-coft": lambda: peft.OFTConfig(oft_block_size=8, coft=True, eps=0.1, target_modules=LINEAR),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=ALL),
    "boft-stages": lambda: peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=3, target_modules=LINEAR
    ),
}


@contextmanager
def butterfly_extension() -> Iterator[None]:
    """Stands in for PEFT's CUDA extension, without which it trains one stage alone."""

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*stage) for stage in blocks])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft_boft, "get_fbd_cuda", lambda: BlockDiagonal)
        patch.setattr(peft_boft, "FastBlockDiag", BlockDiagonal)
        yield


def randomize(model: nn.Module) -> None:
    """fp32 values of the size that trainings reach, in every parameter that is trained."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "magnitude" in name or "ia3_l" in name or "boft_s" in name:
                parameter.mul_(1.0 + 0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.1 * torch.randn_like(parameter))


@cache
def trained(kind: str, folder: Path) -> tuple[Model, dict[str, Tensor], nn.Module]:
    """The base model, the file that PEFT saves, and the model that it merges, in float64."""
    with torch.random.fork_rng(devices=[]), butterfly_extension():
        torch.manual_seed(list(CONFIGS).index(kind))
        base = Model().requires_grad_(False)
        wrapped = peft.get_peft_model(copy.deepcopy(base), CONFIGS[kind]())
        randomize(wrapped)
        if kind == "oft-coft":
            wrapped(torch.ones(1, 1, 48))
        wrapped.save_pretrained(folder / kind)
        merged = wrapped.double().merge_and_unload()
    return base, load_file(folder / kind / "adapter_model.safetensors"), merged


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peft")


def read(file: Mapping[str, Tensor]) -> AdapterFile:
    """The names that a host would know these modules by, as PEFT writes them."""
    modules = ("block.to_q", "block.proj", "conv")
    return read_adapters(file, {f"base_model.model.{name}": f"{name}.weight" for name in modules})


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_means_the_model_that_peft_merges(kind: str, folder: Path) -> None:
    base, file, merged = trained(kind, folder)
    base, adapters = base.double(), read(file)
    assert adapters.unmatched == ()
    assert {str(name).removesuffix(".weight") for name in adapters} >= {"block.to_q", "block.proj"}
    assert difference(base, adapters, merged) <= TOLERANCE


def difference(base: Model, adapters: AdapterFile, merged: nn.Module) -> float:
    """Of the base with the file from the merged model, relative to what the merge changes."""
    x = torch.randn(3, 10, 48, generator=torch.manual_seed(1)).double()
    with torch.no_grad(), PatchSession(base) as session:
        before = base(x)
        session.apply([("file", adapters, 1.0)])
        y, expected = base(x), merged(x)
    return float((y - expected).norm() / (expected - before).norm())


def test_peft_trains_its_butterflies_in_as_many_stages_as_it_is_asked_for(folder: Path) -> None:
    _, file, _ = trained("boft-stages", folder)
    assert {tuple(blocks.shape) for key, blocks in file.items() if key.endswith("boft_R")} == {
        (3, 12, 4, 4),
        (3, 8, 4, 4),
    }


def test_a_file_of_the_exact_transform_turns_the_other_way(folder: Path) -> None:
    """It cannot be told from one of the series; with its triangle negated it is that, but for θ⁴."""
    torch.manual_seed(0)
    base = Model().requires_grad_(False)
    config = peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=ALL)
    wrapped = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "oft_R" in name:
                parameter.copy_(0.02 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder / "exact")
    file = load_file(folder / "exact" / "adapter_model.safetensors")
    merged, base = wrapped.double().merge_and_unload(), base.double()
    assert 1.9 <= difference(base, read(file), merged) <= 2.1
    assert 0.0 < difference(base, read({key: -value for key, value in file.items()}), merged) <= 1e-3


def test_the_scale_of_a_lora_is_not_in_its_file_but_in_its_configuration(folder: Path) -> None:
    """alpha / r, or alpha / √r if rank-stabilized, stands in adapter_config.json alone."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(Model(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR))
    wrapped.save_pretrained(folder / "scaled")
    file = load_file(folder / "scaled" / "adapter_model.safetensors")
    assert not any("alpha" in key for key in file)
    assert {adapter.scale for adapter in read(file).values()} == {1.0}


def test_the_bias_of_a_lora_is_added_to_the_layers(folder: Path) -> None:
    torch.manual_seed(0)
    base = Model().requires_grad_(False)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "conv"], lora_bias=True)
    wrapped = peft.get_peft_model(copy.deepcopy(base), config)
    randomize(wrapped)
    wrapped.save_pretrained(folder / "bias")
    file = load_file(folder / "bias" / "adapter_model.safetensors")
    assert sum(key.endswith("lora_B.bias") for key in file) == 2
    merged, base, adapters = wrapped.double().merge_and_unload(), base.double(), read(file)
    assert adapters.unmatched == ()
    x = torch.randn(3, 10, 48).double()
    with torch.no_grad(), PatchSession(base) as session:
        before = base(x)
        session.apply([("file", adapters, 1.0)])
        y, expected = base(x), merged(x)
    assert float((y - expected).norm() / (expected - before).norm()) <= TOLERANCE
