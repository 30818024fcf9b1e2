"""Every name that trainers write finds its parameter, and its rows, in a key map like the host's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_precision_lora.adapters import LoRA, Target, read_adapters
from lib_precision_lora.adapters.key_map import complete_key_map
from tests.oracles import swap_halves
from tests.trainer_files import ALL_LAYOUTS, EVERY, EVERY_OF_NEO, make_file
from tests.trainer_models import CLIP, HIDDEN, ROOTS, diffusers, parameters, places_of, shape_in, shape_of

Whereabouts = tuple[str, tuple[int, int] | None, bool]
"""Parameter, rows, whether halves are swapped."""

CLIP_OF_THE_HOST = ("self_attn", "mlp.fc")


def host_names(model: str, known: Iterable[str]) -> dict[str, Any]:
    """What the host's own key map has: authors' names, diffusers' of the U-Net and of Flux, CLIP's layers."""
    names: dict[str, Any] = {}
    for parameter in known:
        module, _, attribute = parameter.rpartition(".")
        root, _, path = module.partition(".")
        flat = path.removeprefix("transformer.").replace(".", "_")
        if root == "diffusion_model":
            names[module if attribute == "weight" else parameter] = parameter
            if attribute == "weight":
                names[f"lora_unet_{flat}"] = parameter
        elif root == "t5xxl":
            names |= {f"lora_te{number}_{flat}": parameter for number in (1, 2, 3)}
        elif any(part in path for part in CLIP_OF_THE_HOST):
            dotted = path.removeprefix("transformer.")
            if root == "clip_l":
                names |= {f"lora_te_{flat}": parameter, f"lora_te1_{flat}": parameter}
            number = {"clip_l": "", "clip_g": "_2"}[root]
            names[f"text_encoder{number}.{dotted}"] = parameter
            names.setdefault(f"lora_te2_{flat}", parameter) if root == "clip_g" else None
        elif path.endswith("text_projection") and root == "clip_g":
            names["text_encoder.text_projection"] = parameter
    if model in ("SD 1.5", "SDXL"):
        for path, place in diffusers(model).items():
            flat, processor = path.replace(".", "_"), path.replace(".to_", ".processor.to_")
            processor = processor.removesuffix(".0") if processor.endswith("to_out.0") else processor
            keys = (f"lora_unet_{flat}", f"lycoris_{flat}", processor, f"unet.{processor}")
            names |= dict.fromkeys(keys, place.parameter)
    if model == "Flux":
        for path, place in diffusers(model).items():
            rows = place.rows and (0, *place.rows)
            target: Any = (place.parameter, rows) if rows else place.parameter
            if place.swapped:
                target = (place.parameter, None, swap_halves)
            flat = path.replace(".", "_")
            keys = (f"transformer.{path}", f"lycoris_{flat}", f"lora_transformer_{flat}")
            names |= dict.fromkeys(keys, target)
    return names


def whereabouts(target: Target) -> Whereabouts:
    function = target.row_function
    swapped = function is not None and function(torch.arange(4)).tolist() == [2, 3, 0, 1]
    assert swapped or function is None
    return target.parameter, target.rows, swapped


@pytest.mark.parametrize(("model", "layout"), [*EVERY, *EVERY_OF_NEO])
def test_every_name_finds_its_parameter_and_its_rows(model: str, layout: str) -> None:
    form, known, shape = ALL_LAYOUTS[model][layout], parameters(model), shape_in(model)
    shapes = {parameter: shape(parameter) for parameter in known}
    key_map = complete_key_map(host_names(model, known), known, shape)
    expected, actual = {}, {}
    for path, place in places_of(model, form.paths).items():
        state, _ = make_file(form, {path: place}, shapes)
        if not state:
            continue
        file = read_adapters(state, key_map)
        assert file.unmatched == ()
        whole_qkv = form.writer == "XLabs" and path.endswith("linear1")
        rows = (0, 3 * HIDDEN) if whole_qkv else place.rows
        expected[path] = [(place.parameter, rows, place.swapped)]
        actual[path] = [whereabouts(Target.parse(target)) for target in file]
    assert len(expected) > 3
    assert actual == expected


def pair(out: int = 6) -> tuple[Tensor, Tensor]:
    return torch.ones(out, 2), torch.ones(2, 5)


def test_the_hosts_names_stay_but_for_the_projection_of_clip_l() -> None:
    """The host files CLIP-G's projection under CLIP-L's name; the two have different widths."""
    known = [f"{root}text_projection.weight" for root in (ROOTS["CLIP-L"], ROOTS["CLIP-G"])]
    theirs = {"text_encoder.text_projection": known[1], "lora_te2_text_projection": known[0]}
    complete = complete_key_map(theirs, known, shape_of)
    assert complete["text_encoder.text_projection"] == known[0]
    assert complete["lora_te2_text_projection"] == known[0]
    assert theirs["text_encoder.text_projection"] == known[1], "the host's own map stays as it is"
    assert complete_key_map(theirs, known[1:], shape_of)["text_encoder.text_projection"] == known[1]


def test_a_clip_g_alone_is_the_text_encoder() -> None:
    known = [f"{ROOTS['CLIP-G']}{module}.weight" for module in CLIP]
    up, down = pair()
    state = {f"lora_te_{CLIP[6].replace('.', '_')}.lora_up.weight": up}
    state |= {f"lora_te_{CLIP[6].replace('.', '_')}.lora_down.weight": down}
    assert set(read_adapters(state, complete_key_map({}, known, shape_of))) == {known[6]}


def test_a_layer_under_two_names_is_read_once_and_listed_once() -> None:
    up, down = pair()
    state = {"lora_unet_a_b.lora_up.weight": up, "lora_unet_a_b.lora_down.weight": down}
    state |= {"unet.a.b.lora_B.weight": 2 * up, "unet.a.b.lora_A.weight": down}
    file = read_adapters(state, {"lora_unet_a_b": "diffusion_model.a.b.weight"})
    (adapter,) = file.values()
    assert isinstance(adapter, LoRA)
    assert torch.equal(adapter.up, up)
    assert file.unmatched == ("unet.a.b.lora_B.weight", "unet.a.b.lora_A.weight")


@pytest.mark.parametrize("adapter", ["default", "default_0", "my-style"])
def test_an_adapters_name_in_pefts_keys_is_no_part_of_the_layers(adapter: str) -> None:
    up, down = pair()
    state = {f"a.lora_B.{adapter}.weight": up, f"a.lora_A.{adapter}.weight": down}
    state[f"a.lora_magnitude_vector.{adapter}.weight"] = torch.ones(6)
    file = read_adapters(state)
    assert {name: found.kind for name, found in file.items()} == {"a": "dora"}
    assert (file.layout, file.unmatched) == ("PEFT", ())


def test_a_control_loras_biases_and_norms_are_read() -> None:
    up, down = pair()
    state = {
        "double_blocks.0.img_attn.proj.lora_B.weight": up,
        "double_blocks.0.img_attn.proj.lora_A.weight": down,
    }
    state["double_blocks.0.img_attn.proj.lora_B.bias"] = torch.ones(6)
    state["double_blocks.0.img_attn.norm.key_norm.scale"] = torch.ones(3)
    state["img_in.lora_B.weight"], state["img_in.lora_A.weight"] = pair()
    block = "diffusion_model.double_blocks.0.img_attn."
    names: Mapping[str, str] = {
        "diffusion_model.img_in": "diffusion_model.img_in.weight",
        f"{block}proj": f"{block}proj.weight",
        f"{block}norm.key_norm.scale": f"{block}norm.key_norm.scale",
    }
    file = read_adapters(state, names)
    assert {name: found.kind for name, found in file.items()} == {
        "diffusion_model.img_in.weight": "lora",
        f"{block}proj.weight": "lora",
        f"{block}proj.bias": "diff",
        f"{block}norm.key_norm.scale": "set",
    }
    assert file.unmatched == ()
