"""Saving what is packed or stands under two names, over models as hosts hold them; no host runs here."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lib_precision_lora.branch import PatchSession
from lib_precision_lora.host.saving import Saving
from lib_precision_lora.storage import stored_weight
from tests.branch.recipes import BASE_STD, generator, noise, recipe
from tests.host.observers import log_lines
from tests.storage.quantized_tensors import MAKERS, StandInTensor

pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")

SHAPE = (16, 256)
LORA = recipe("lora-rank-8-fp16", SHAPE)


def host_state_dict(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """As the host's: copies of the plain tensors, with the entries of 4-bit weights beside them, and a
    `QuantizedTensor` in its parts."""
    state = {prefix + name: value.detach().clone() for name, value in model.state_dict().items()}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "_qdata"):
            parts = [weight._qdata, weight._params.block_scale, weight._params.scale]
            parts = [part.clone() for part in parts if part is not None]
            names = ("weight", "weight_scale", "weight_scale_2")
            state.update(zip((f"{prefix}{path}.{name}" for name in names), parts, strict=False))
            state[f"{prefix}{path}.comfy_quant"] = torch.tensor(list(b"{}"), dtype=torch.uint8)
        quant_state = getattr(getattr(module, "weight", None), "quant_state", None)
        if quant_state is not None:
            for key, value in quant_state.as_dict(packed=True).items():
                state[f"{prefix}{path}.weight.{key}"] = value.clone()
    return state


def saving(*models: tuple[nn.Module, PatchSession], state: Any = host_state_dict) -> Any:
    """Ours in the place of the host's `get_state_dict_after_quant`, for these models and sessions."""
    sessions = {}
    for model, session in models:
        sources = tuple(dict.fromkeys(patch.source for patch in session.patches))
        sessions[model] = SimpleNamespace(
            attached=session.attached, effective=session.effective, sources=sources, host_layers={}
        )
    utils = SimpleNamespace(get_state_dict_after_quant=state)
    engine = type("Engine", (), {})
    Saving(sessions).replacements(utils, engine)  # type: ignore[arg-type]
    return utils.get_state_dict_after_quant


def in_a_file(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """As it comes back from safetensors, which refuse tensors that share memory."""
    safetensors.torch.save_file(state, folder / "file.safetensors")
    return safetensors.torch.load_file(folder / "file.safetensors")


def layer(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """A host's layer in this stored format, and its values."""
    from tests.branch.hosts import Linear
    from tests.storage.formats import stored_variant

    case = stored_variant(name, noise(SHAPE, generator(seed), BASE_STD))
    module = Linear(case.parameter, case.expected, case.module.scale_weight)
    return module.requires_grad_(False), case.expected


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_all_gguf_weights_of_a_model_with_a_lora_are_written_in_their_compute_type(
    kind: str, compute: str
) -> None:
    (first, base), (second, other) = (layer(f"gguf-{kind}-baked-{compute}", seed) for seed in (1, 2))
    model = nn.ModuleDict({"first": first, "second": second, "third": nn.Linear(4, 4)})
    session = PatchSession(model)
    state_dict = saving((model, session))
    assert not state_dict(model)["first.weight"].is_floating_point(), "without a LoRA it is the host's own"
    session.apply([("file", {"first.weight": LORA.adapter}, 0.8)])
    with log_lines(logging.INFO) as lines:
        state = saving((model, session))(model, "its.")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[compute]
    assert LORA.delta is not None
    exact = base.double() + 0.8 * LORA.delta
    for key, values in (("its.first.weight", exact), ("its.second.weight", other.double())):
        assert (state[key].dtype, tuple(state[key].shape)) == (dtype, SHAPE)
        half_unit = 0.5 * torch.finfo(dtype).eps
        assert float((state[key].double() - values).norm() / values.norm()) < half_unit
    assert torch.equal(state["its.third.weight"], model["third"].weight)
    (line,) = lines
    assert line.endswith("The file holds 2 GGUF weights unpacked, since it cannot hold GGUF.")
    assert f"Rounding to {compute} costs" in line


@pytest.mark.parametrize("name", MAKERS)
def test_a_quantized_tensor_stays_one_in_the_hosts_own_entries(name: str, tmp_path: Path) -> None:
    (first, base), (second, _) = (layer(name, seed) for seed in (1, 2))
    model = nn.ModuleDict({"first": first, "second": second})
    session, before = PatchSession(model), host_state_dict(model)
    session.apply([("file", {"first.weight": LORA.adapter}, 0.8)])
    with log_lines(logging.INFO) as lines:
        state = in_a_file(saving((model, session))(model), tmp_path)
    assert {key: (value.dtype, value.shape) for key, value in state.items()} == {
        key: (value.dtype, value.shape) for key, value in before.items()
    }
    for key, value in state.items():
        if not key.startswith("first.weight"):
            bits, own = (each.reshape(-1).view(torch.uint8) for each in (value, before[key]))
            assert torch.equal(bits, own), key
    own = first.weight
    scale = state.get("first.weight_scale_2", state["first.weight_scale"])
    block_scale = state["first.weight_scale"] if "first.weight_scale_2" in state else None
    params = dataclasses.replace(own._params, scale=scale, block_scale=block_scale)
    written = stored_weight(StandInTensor(state["first.weight"], own._layout_cls, params)).dense()
    assert LORA.delta is not None
    exact = base.double() + 0.8 * LORA.delta
    error = float((written.double() - exact).norm() / exact.norm())
    assert error < (0.15 if "4" in name.replace("e4m3", "") else 0.06)
    assert "costs" in lines[0]
    assert torch.equal(stored_weight(first.weight).dense(), base), "the base is not written"


@pytest.mark.parametrize("name", ["one-buffer-nf4", "one-buffer-int8", "one-buffer-int8-convrot"])
def test_a_weight_in_one_buffer_is_unpacked_since_its_bytes_would_not_say_what_they_are(name: str) -> None:
    (first, base), (second, other) = (layer(name, seed) for seed in (1, 2))
    model = nn.ModuleDict({"first": first, "second": second})
    session = PatchSession(model)
    session.apply([("file", {"first.weight": LORA.adapter}, 0.8)])
    with log_lines(logging.INFO) as lines:
        state = saving((model, session))(model)
    assert LORA.delta is not None
    for key, values in (("first", base.double() + 0.8 * LORA.delta), ("second", other.double())):
        assert torch.equal(state[f"{key}.weight"], values.to(torch.float16)) or key == "first"
        assert float((state[f"{key}.weight"].double() - values).norm() / values.norm()) < 2**-11
    called = "one-buffer NF4" if "nf4" in name else "one-buffer int8"
    assert lines[0].endswith(f"The file holds 2 {called} weights unpacked, since it cannot hold {called}.")


def test_in_one_file_the_parts_without_a_lora_are_unpacked_as_well(tmp_path: Path) -> None:
    """Where the model has one and the text encoder, in GGUF too, has none; else the file could not load."""
    (first, _), (second, other) = (layer("gguf-Q8_0-baked-fp16", seed) for seed in (1, 2))
    model, encoder = nn.ModuleDict({"first": first}), nn.ModuleDict({"second": second})
    session = PatchSession(model)
    session.apply([("file", {"first.weight": LORA.adapter}, 0.8)])
    utils = SimpleNamespace(get_state_dict_after_quant=host_state_dict)

    class Engine:
        forge_objects = SimpleNamespace(
            unet=SimpleNamespace(model=model), clip=SimpleNamespace(cond_stage_model=encoder)
        )

        def save_checkpoint(self, filename: str) -> str:
            parts = (utils.get_state_dict_after_quant(part) for part in (model, encoder))
            safetensors.torch.save_file(
                {key: value for part in parts for key, value in part.items()}, filename
            )
            return filename

    hosted = SimpleNamespace(
        attached=session.attached, effective=session.effective, sources=("file",), host_layers={}
    )
    Saving({model: hosted}).replacements(utils, Engine)  # type: ignore[dict-item]
    path = str(tmp_path / "file.safetensors")
    with log_lines(logging.INFO) as lines:
        assert Engine().save_checkpoint(path) == path
    assert torch.equal(safetensors.torch.load_file(path)["second.weight"], other.half())
    assert not utils.get_state_dict_after_quant(encoder)["second.weight"].is_floating_point()
    assert len(lines) == 1


def test_a_file_is_kept_whose_path_its_saver_does_not_return(tmp_path: Path) -> None:
    model = nn.ModuleDict({"first": nn.Linear(SHAPE[1], SHAPE[0])}).requires_grad_(False)
    session = PatchSession(model)
    session.apply([("file", {"first.weight": LORA.adapter}, 1.0)])
    state_dict = saving((model, session))
    hosted = SimpleNamespace(attached=session.attached)

    class Engine:
        forge_objects = SimpleNamespace(unet=SimpleNamespace(model=model), clip=None)

        def save_unet(self, filename: str) -> None:
            safetensors.torch.save_file(state_dict(model), filename)

    utils = SimpleNamespace(get_state_dict_after_quant=None)
    Saving({model: hosted}).replacements(utils, Engine)  # type: ignore[dict-item]
    path = tmp_path / "file.safetensors"
    assert Engine().save_unet(str(path)) is None  # type: ignore[func-returns-value]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert not torch.equal(safetensors.torch.load_file(path)["first.weight"], model["first"].weight)


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-nf4-nested", "bnb-fp4"])
def test_a_4_bit_layer_keeps_its_entries_and_bitsandbytes_reads_the_merge_from_the_file(
    name: str, tmp_path: Path
) -> None:
    import bitsandbytes.functional as bnb

    from tests.storage.four_bit import decoded_by_bitsandbytes

    (first, base), (second, _) = layer(name, 1), layer(name, 2)
    model = nn.ModuleDict({"first": first, "second": second})
    theirs = host_state_dict(model)
    session = PatchSession(model)
    session.apply([("file", {"first.weight": LORA.adapter}, 1.0)])
    with log_lines(logging.WARNING) as lines:
        state = saving((model, session))(model)
    loaded = in_a_file(state, tmp_path)
    assert loaded.keys() == theirs.keys()
    assert all(torch.equal(loaded[key], theirs[key]) for key in theirs if key.startswith("second"))
    start = "first.weight."
    entries = {key.removeprefix(start): value for key, value in loaded.items() if key.startswith(start)}
    values = decoded_by_bitsandbytes(
        loaded["first.weight"], bnb.QuantState.from_dict(entries, device=torch.device("cpu"))
    )
    exact = base.double() + LORA.delta
    cost = float((values.double() - exact).norm() / (exact - base.double()).norm())
    assert f"costs {100 * cost:.0f} % of what they add: most of it is lost" in lines[0]


class Wrapper(nn.Module):
    """As the host wraps CLIP's token embedding: its weight stands under two names."""

    def __init__(self, wrapped: nn.Embedding) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.weight = wrapped.weight


@pytest.mark.parametrize("dense", ["branch", "merge"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_wrapped_embedding_is_merged_under_both_of_its_names(
    dense: Any, apart: bool, tmp_path: Path
) -> None:
    """apart: after the host has made a new object under one of them."""
    model = nn.ModuleDict({"tokens": Wrapper(nn.Embedding(*SHAPE))}).requires_grad_(False)
    base = model["tokens"].weight.double()
    if apart:
        model["tokens"].wrapped.weight = nn.Parameter(model["tokens"].weight.clone(), requires_grad=False)
    session = PatchSession(model)
    session.apply([("file", {"tokens.weight": LORA.adapter}, 0.5)], dense=dense)
    state = in_a_file(saving((model, session))(model), tmp_path)
    exact = base + 0.5 * LORA.delta
    assert set(state) == {"tokens.weight", "tokens.wrapped.weight"}
    for value in state.values():
        assert float((value.double() - exact).norm() / exact.norm()) < 1e-6


def test_a_layer_that_stands_at_two_places_is_merged_at_both(tmp_path: Path) -> None:
    twice = nn.Linear(SHAPE[1], SHAPE[0]).requires_grad_(False)
    model = nn.ModuleDict({"one": twice, "two": twice})
    session = PatchSession(model)
    session.apply([("file", {"one.weight": LORA.adapter}, 1.0)])
    state = in_a_file(saving((model, session))(model), tmp_path)
    assert torch.equal(state["one.weight"], state["two.weight"])
    assert not torch.equal(state["one.weight"], twice.weight)


def test_a_scale_that_the_hosts_file_has_no_name_for_is_an_error() -> None:
    module, _ = layer("fp8-e4m3fn-scaled", 1)
    model = nn.ModuleDict({"first": module})

    def without_scales(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
        state = host_state_dict(model, prefix)
        return {key: value for key, value in state.items() if "scale" not in key}

    session = PatchSession(model)
    session.apply([("file", {"first.weight": LORA.adapter}, 1e5)])
    with pytest.raises(ValueError, match="its scale_weight is not among what this WebUI saves"):
        saving((model, session), state=without_scales)(model)
