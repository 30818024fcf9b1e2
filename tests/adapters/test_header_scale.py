"""Alphas, patterns and rsLoRA that stand in a file's header alone, against the model that PEFT merges."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lib_precision_lora.adapters import AdapterError, AdapterFile, read_adapters
from lib_precision_lora.branch import PatchSession

TOLERANCE = 1e-5
KEY = "lora_adapter_metadata"
ALL = ["to_q", "to_out.0"]


class Model(nn.Module):
    """Two blocks whose layers have the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"to_q": nn.Linear(24, 24), "to_out": nn.ModuleList([nn.Linear(24, 24)])})
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["to_out"][0](block["to_q"](x))  # type: ignore[index, operator]
        return x


MODULES = tuple(f"blocks.{n}.{end}" for n in range(2) for end in ALL)
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 16},
    "rsLoRA": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "alpha pattern": {"r": 4, "lora_alpha": 16, "alpha_pattern": {"to_q": 2}},
    "alpha pattern of one block": {"r": 4, "lora_alpha": 16, "alpha_pattern": {"blocks.1.to_q": 2}},
    "rank pattern": {"r": 4, "lora_alpha": 16, "rank_pattern": {"to_q": 8}},
    "both patterns": {"r": 2, "lora_alpha": 3, "rank_pattern": {"to_q": 8}, "alpha_pattern": {"to_out.0": 5}},
    "expressions": {"r": 4, "lora_alpha": 16, "alpha_pattern": {r"blocks\.1\..*": 2, "to_q|nothing": 7}},
    "an anchored name": {"r": 4, "lora_alpha": 16, "alpha_pattern": {"^blocks.0.to_q": 2, "^to_q": 99}},
    "the first pattern counts": {"r": 4, "lora_alpha": 16, "alpha_pattern": {"0.to_q": 2, "to_q": 5}},
    "DoRA": {"r": 4, "lora_alpha": 16, "use_dora": True},
}


@pytest.fixture(scope="module", params=CONFIGS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, dict[str, Tensor], dict[str, Any], nn.Module]:
    """The base, PEFT's file with plain names, its configuration, and what it merges, in float64."""
    folder: Path = tmp_path_factory.mktemp("header")
    torch.manual_seed(list(CONFIGS).index(request.param))
    base = Model().requires_grad_(False)
    wrapped = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=ALL, **CONFIGS[request.param])
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.0 + 0.1 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    file = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    plain = {key.removeprefix("base_model.model."): value for key, value in file.items()}
    return base.double(), plain, config, wrapped.double().merge_and_unload()


def packed(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in config.items()}


FORMS: Mapping[str, tuple[Callable[[str], str], Callable[[Mapping[str, Any]], dict[str, str]]]] = {
    "diffusers": (
        lambda key: f"transformer.{key}",
        lambda config: {"format": "pt", KEY: json.dumps(packed(config, "transformer"), sort_keys=True)},
    ),
    "diffusers, a U-Net": (
        lambda key: f"unet.{key}",
        lambda config: {KEY: json.dumps(packed(config, "unet") | packed({"lora_alpha": 77}, "text_encoder"))},
    ),
    "bare": (lambda key: f"base_model.model.{key}", lambda config: {KEY: json.dumps(config)}),
    "by component": (
        lambda key: f"transformer.{key}",
        lambda config: {"adapter_config": json.dumps({"transformer": config})},
    ),
    "entries of the header": (
        lambda key: f"diffusion_model.{key}",
        lambda config: {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in config.items()
        },
    ),
    "names with underscores": (
        lambda key: (
            "lora_unet_"
            + key.partition(".lora_")[0].replace(".", "_")
            + ".lora_"
            + key.partition(".lora_")[2]
        ),
        lambda config: {KEY: json.dumps(packed(config, "unet"))},
    ),
}


def read(file: Mapping[str, Tensor], name: Callable[[str], str], metadata: Mapping[str, str]) -> AdapterFile:
    key_map = {name(f"{module}.lora_A").removesuffix(".lora_A"): f"{module}.weight" for module in MODULES}
    return read_adapters({name(key): value for key, value in file.items()}, key_map, metadata=metadata)


def difference(base: Model, adapters: AdapterFile, merged: nn.Module) -> float:
    x = torch.randn(5, 24, generator=torch.manual_seed(1)).double()
    with torch.no_grad(), PatchSession(base) as session:
        before = base(x)
        session.apply([("file", adapters, 1.0)])
        y, expected = base(x), merged(x)
    return float((y - expected).norm() / (expected - before).norm())


@pytest.mark.parametrize("form", FORMS)
def test_a_file_with_a_header_means_the_model_that_peft_merges(
    trained: tuple[Model, dict[str, Tensor], dict[str, Any], nn.Module], form: str
) -> None:
    base, file, config, merged = trained
    name, header = FORMS[form]
    adapters = read(file, name, header(config))
    assert len(adapters) == len(MODULES)
    assert (adapters.unmatched, adapters.findings) == ((), ())
    assert difference(base, adapters, merged) <= TOLERANCE


def test_without_the_header_the_factors_are_taken_as_they_stand(
    trained: tuple[Model, dict[str, Tensor], dict[str, Any], nn.Module],
) -> None:
    """The near miss: the same tensors mean another model."""
    base, file, _, merged = trained
    assert difference(base, read(file, FORMS["diffusers"][0], {}), merged) > 0.05


def pair(rank: int = 4) -> dict[str, Tensor]:
    return {
        "transformer.a.to_q.lora_A.weight": torch.ones(rank, 6),
        "transformer.a.to_q.lora_B.weight": torch.ones(6, rank),
    }


def scale_of(file: AdapterFile) -> float:
    (adapter,) = file.values()
    return float(adapter.scale)  # type: ignore[attr-defined]


def header(**config: Any) -> dict[str, str]:
    return {KEY: json.dumps(packed(config, "transformer"))}


def test_an_alpha_of_the_tensors_wins_and_is_a_finding() -> None:
    file = pair() | {"transformer.a.to_q.alpha": torch.tensor(2.0)}
    read = read_adapters(file, metadata=header(r=4, lora_alpha=16))
    assert scale_of(read) == 0.5
    assert dict(read.alphas) == {"transformer.a.to_q": 2.0}
    (finding,) = read.findings
    assert "header says alpha 16" in finding
    assert "tensors say alpha 2" in finding
    assert "transformer.a.to_q" in finding
    agreed = read_adapters(file, metadata=header(r=4, lora_alpha=2))
    assert (scale_of(agreed), agreed.findings) == (0.5, ())


def test_an_alpha_that_is_rounded_agrees() -> None:
    file = pair() | {"transformer.a.to_q.alpha": torch.tensor(22.6).to(torch.float16)}
    assert read_adapters(file, metadata=header(r=4, lora_alpha=22.6)).findings == ()


def test_a_rank_of_the_tensors_wins_and_is_a_finding() -> None:
    read = read_adapters(pair(rank=4), metadata=header(r=8, lora_alpha=16))
    assert scale_of(read) == 4.0
    assert any("rank 8" in finding and "rank 4" in finding for finding in read.findings)


@pytest.mark.parametrize("magnitude", [False, True])
def test_a_dora_without_magnitudes_and_the_other_way_round_are_findings(magnitude: bool) -> None:
    file = pair() | ({"transformer.a.to_q.lora_magnitude_vector": torch.ones(6)} if magnitude else {})
    assert read_adapters(file, metadata=header(r=4, lora_alpha=4, use_dora=magnitude)).findings == ()
    (finding,) = read_adapters(file, metadata=header(r=4, lora_alpha=4, use_dora=not magnitude)).findings
    assert "magnitude of DoRA" in finding


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_a_training_that_changed_the_base_is_a_finding(start: str) -> None:
    config = {"r": 4, "lora_alpha": 4, "init_lora_weights": start}
    (finding,) = read_adapters(pair(), metadata=header(**config)).findings
    assert start in finding
    assert (
        read_adapters(pair(), metadata=header(**{**config, "init_lora_weights": "gaussian"})).findings == ()
    )


def test_the_header_of_another_component_says_nothing() -> None:
    metadata = {KEY: json.dumps(packed({"r": 4, "lora_alpha": 16}, "text_encoder"))}
    assert scale_of(read_adapters(pair(), metadata=metadata)) == 1.0
    encoder = {key.replace("transformer.a", "text_encoder.text_model.a"): v for key, v in pair().items()}
    assert scale_of(read_adapters(encoder, metadata=metadata)) == 4.0


@pytest.mark.parametrize("name", ["ss_network_alpha", "training_info", "lora_alpha_note"])
def test_other_entries_of_a_header_say_nothing(name: str) -> None:
    metadata = {
        name: json.dumps({"step": 16, "alpha": 16}),
        "ss_network_alpha": "16",
        "r": "4",
        "alpha": "16",
    }
    read = read_adapters(pair(), metadata=metadata)
    assert (scale_of(read), read.findings) == (1.0, ())


def test_a_lokr_of_peft_whose_factors_are_whole_has_the_scale_of_its_header() -> None:
    """PEFT: alpha / r, r of the configuration; elsewhere the alpha of whole factors counts for nothing."""
    file = {"transformer.a.lokr_w1": torch.ones(2, 2), "transformer.a.lokr_w2": torch.ones(3, 3)}
    assert scale_of(read_adapters(file)) == 1.0
    assert scale_of(read_adapters(file, metadata=header(peft_type="LOKR", r=8, alpha=4))) == 0.5
    file["transformer.a.alpha"] = torch.tensor(float("inf"))
    assert scale_of(read_adapters(file, metadata=header(peft_type="LOKR", r=8, alpha=4))) == 1.0


def test_the_state_dict_may_carry_the_header() -> None:
    class Carrying(dict[str, Tensor]):
        metadata: Mapping[str, str] = header(r=4, lora_alpha=16)

    assert scale_of(read_adapters(Carrying(pair()))) == 4.0


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '"lora_alpha"', "[" * 100_000, "{" * 100_000, '{"transformer.lora_alpha": "much"}', "{}"],
)
def test_a_header_that_cannot_be_read_is_no_reason_to_fail(text: str) -> None:
    read = read_adapters(pair(), metadata={KEY: text})
    assert scale_of(read) == 1.0
    assert bool(read.findings) == (not text.endswith("}"))


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "1e999"])
def test_an_alpha_that_is_no_number_is_refused_with_its_layer(alpha: str) -> None:
    with pytest.raises(AdapterError, match=r"transformer.a.to_q: alpha is (nan|inf)"):
        read_adapters(pair(), metadata={KEY: f'{{"transformer.r": 4, "transformer.lora_alpha": {alpha}}}'})


HOSTILE = [
    "(a+)+b",
    "(a|a)*b",
    ".*.*.*.*.*.*x",
    "(?:a*)*b",
    "a{1,99999}",
    r"(a)\1",
    "(" * 500,
    "[",
    "a" * 300 + "|b",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_an_expression_that_may_run_for_ever_is_not_run_but_a_finding(pattern: str) -> None:
    file = {key.replace("to_q", "a" * 100): value for key, value in pair().items()}
    started = time.perf_counter()
    read = read_adapters(file, metadata=header(r=4, lora_alpha=16, alpha_pattern={pattern: 1}))
    assert time.perf_counter() - started < 1.0
    assert scale_of(read) == 4.0
    assert any("alpha_pattern" in finding for finding in read.findings)


def test_the_worst_expressions_that_are_run_take_bounded_time() -> None:
    file: dict[str, Tensor] = {}
    for number in range(500):
        layer = f"transformer.{'a.' * 55}{number}"
        file |= {f"{layer}.lora_A.weight": torch.ones(1, 2), f"{layer}.lora_B.weight": torch.ones(2, 1)}
    patterns = {f".*a.*b{number}": 1 for number in range(500)}
    started = time.perf_counter()
    read = read_adapters(file, metadata=header(r=1, lora_alpha=1, alpha_pattern=patterns))
    assert time.perf_counter() - started < 10.0
    assert len(read) == 500
