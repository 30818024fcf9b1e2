"""What the settings do, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib_precision_lora.host.page.settings import Arithmetic, Settings, read_settings
from lib_precision_lora.ui.settings import (
    AS_STOCK,
    AS_TRAINED,
    AUTOMATIC,
    BESIDE,
    CACHE,
    COMPUTE,
    CONTINUE,
    DENSE,
    DETAILED,
    DORA_NORM,
    ENABLED,
    LOG_DETAIL,
    MARGIN,
    MERGE,
    NORMAL,
    ON_FAILURE,
    OPTIONS,
    PLACEMENT,
    SECTION,
    STOP,
    STREAMED,
    TEXT_ENCODERS,
)
from tests.host.checkpoints import Checkpoint
from tests.host.images import distance, generate
from tests.host.lora_files import LAYERS, Active, exact_output, make_lora, prompt, values, with_loha
from tests.host.observers import bases_of, branches, hooks_of
from tests.host.webui import Host

EXACT = 1e-5


def test_a_lora_is_computed_exactly_beside_an_untouched_base(host: Host, checkpoint: Checkpoint) -> None:
    base = bases_of(checkpoint)
    lora = make_lora("cats")
    lora.write(host)
    image = generate(host, prompt("a cat", Active(lora)))
    assert distance(image, exact_output(checkpoint, "a cat", [Active(lora)])) < EXACT
    assert distance(image, exact_output(checkpoint, "a cat")) > 0.1
    assert bases_of(checkpoint) == base
    assert not host.contract.merged(checkpoint)


def test_off_is_stock_on_is_exact_at_the_next_generation(host: Host, checkpoint: Checkpoint) -> None:
    lora = make_lora("cats")
    lora.write(host)
    active = [Active(lora)]
    exact, stock = (exact_output(checkpoint, "a cat", active, stored) for stored in (False, True))
    for enabled in (True, False, True, True, False, False, True):
        host.set_option(ENABLED, enabled)
        image = generate(host, prompt("a cat", *active))
        assert distance(image, exact if enabled else stock) < EXACT, enabled
        assert distance(image, stock if enabled else exact) > 1e-3, enabled
        assert bool(hooks_of(checkpoint.model)) is enabled


def test_off_applies_the_loras_that_a_prompt_while_on_did_not_mention(
    host: Host, checkpoint: Checkpoint
) -> None:
    lora = make_lora("cats")
    lora.write(host)
    stock = exact_output(checkpoint, "a cat", [Active(lora)], stored=True)
    for enabled, active, expected in (
        (False, [Active(lora)], stock),
        (True, [], exact_output(checkpoint, "a cat")),
        (False, [Active(lora)], stock),
    ):
        host.set_option(ENABLED, enabled)
        assert distance(generate(host, prompt("a cat", *active)), expected) < EXACT


def test_off_leaves_nothing_of_ours_on_the_model(host: Host, checkpoint: Checkpoint) -> None:
    base = bases_of(checkpoint)
    lora = make_lora("cats")
    lora.write(host)
    generate(host, prompt("a cat", Active(lora)))
    host.set_option(ENABLED, False)
    image = generate(host, "a cat")
    assert distance(image, exact_output(checkpoint, "a cat")) < EXACT
    assert hooks_of(checkpoint.model) == hooks_of(checkpoint.encoder) == 0
    assert bases_of(checkpoint) == base
    assert checkpoint.forge_objects.unet is checkpoint.forge_objects_original.unet


@pytest.mark.parametrize("first", [True, False])
def test_a_file_of_mixed_kinds_changes_sides_whole(host: Host, checkpoint: Checkpoint, first: bool) -> None:
    """Identifiers are the same on both sides, so the host alone would believe that nothing has changed."""
    lora = with_loha(make_lora("cats"))
    lora.write(host)
    active = [Active(lora, 0.5)]
    for enabled in (first, not first, first, not first):
        host.set_option(ENABLED, enabled)
        image = generate(host, prompt("a cat", *active))
        assert distance(image, exact_output(checkpoint, "a cat", active, stored=not enabled)) < EXACT, enabled


def test_a_change_of_compute_mode_acts_at_the_next_generation(host: Host, checkpoint: Checkpoint) -> None:
    """All four places where the host skips believe that nothing has changed: only the setting has."""
    lora = make_lora("cats")
    lora.write(host)
    active = [Active(lora)]
    exact = exact_output(checkpoint, "a cat", active)
    errors = {}
    for mode in ("fp16", "fp32", "fp16", "Automatic"):
        host.set_option(COMPUTE, mode)
        encodes = checkpoint.encodes
        errors[mode] = distance(generate(host, prompt("a cat", *active)), exact)
        assert checkpoint.encodes > encodes, "the text encoder's branch computes in the new mode too"
    assert errors["fp32"] < EXACT
    assert errors["Automatic"] < EXACT
    assert 10 * errors["fp32"] < errors["fp16"] < 5e-3


def test_conditioning_is_kept_where_nothing_of_it_changes(host: Host, checkpoint: Checkpoint) -> None:
    lora = make_lora("cats")
    lora.write(host)
    text = prompt("a cat", Active(lora))
    generate(host, text)
    encodes = checkpoint.encodes
    generate(host, text)
    assert checkpoint.encodes == encodes
    generate(host, "a cat")
    without = checkpoint.encodes
    assert without > encodes
    for change in ({ENABLED: False}, {COMPUTE: "fp16"}, {ENABLED: True}, {ON_FAILURE: STOP}):
        for key, value in change.items():
            host.set_option(key, value)
        generate(host, "a cat")
        assert checkpoint.encodes == without, f"{change} is nothing to a prompt without LoRAs"


def test_text_encoders_are_left_alone_where_that_is_set(host: Host, checkpoint: Checkpoint) -> None:
    cats = make_lora("cats")
    cats.write(host)
    text = prompt("a cat", Active(cats, 0.75))
    for both in (True, False, True, False):
        host.set_option(TEXT_ENCODERS, both)
        expected = exact_output(checkpoint, "a cat", [Active(cats, 0.75, te=None if both else 0.0)])
        other = exact_output(checkpoint, "a cat", [Active(cats, 0.75, te=0.0 if both else None)])
        image = generate(host, text)
        assert distance(image, expected) < EXACT < 1e-3 < distance(image, other), both
        assert bool(branches(checkpoint.encoder)) is both
    encodes = checkpoint.encodes
    generate(host, text)
    assert checkpoint.encodes == encodes


def test_conditioning_is_computed_anew_on_a_toggle(host: Host, checkpoint: Checkpoint) -> None:
    lora = make_lora("cats")
    lora.write(host)
    text = prompt("a cat", Active(lora))
    for enabled in (True, False, True):
        host.set_option(ENABLED, enabled)
        encodes = checkpoint.encodes
        generate(host, text)
        assert checkpoint.encodes > encodes


def test_the_section_says_what_it_does_and_has_these_defaults() -> None:
    assert SECTION == ("precision_lora", "Precision LoRA")
    options = {option.key: option for option in OPTIONS}
    assert list(options) == [
        ENABLED,
        COMPUTE,
        DENSE,
        DORA_NORM,
        TEXT_ENCODERS,
        ON_FAILURE,
        PLACEMENT,
        MARGIN,
        CACHE,
        LOG_DETAIL,
    ]
    assert all(key.startswith("precision_lora_") for key in options)
    assert options[ENABLED].default is True
    assert options[COMPUTE].default == options[COMPUTE].component_args["choices"][0] == "Automatic"
    assert options[DENSE].default == AUTOMATIC
    assert options[DENSE].component_args["choices"] == [AUTOMATIC, BESIDE, MERGE]
    assert options[DORA_NORM].default == options[DORA_NORM].component_args["choices"][0] == AS_TRAINED
    assert options[ON_FAILURE].default == CONTINUE
    assert options[ON_FAILURE].component_args["choices"] == [CONTINUE, STOP]
    assert options[LOG_DETAIL].default == options[LOG_DETAIL].component_args["choices"][0] == NORMAL
    assert all(option.label and option.info for option in OPTIONS)
    for option in OPTIONS:
        if option.component == "Radio":
            assert option.default in option.component_args["choices"]
        elif option.component == "Slider":
            assert option.component_args["minimum"] <= option.default <= option.component_args["maximum"]
    assert (options[PLACEMENT].default, options[MARGIN].default, options[CACHE].default) == (
        AUTOMATIC,
        0,
        1024,
    )


def test_registered_defaults_read_as_the_default_settings(host: Host) -> None:
    options = host.shared.opts
    assert (
        read_settings(options)
        == Settings()
        == Settings(True, Arithmetic("auto", False, "auto"), True, "continue")
    )
    for option in OPTIONS:
        assert options.data_labels[option.key].section == SECTION
        assert option.info in options.data_labels[option.key].comment_after


@pytest.mark.parametrize("nonsense", [None, "", "yes", 0, 7, -1.5, [], ["fp16"], {}, object()])
def test_nonsense_reads_as_the_default(nonsense: Any) -> None:
    for key in (ENABLED, COMPUTE, DENSE, DORA_NORM, TEXT_ENCODERS, ON_FAILURE, PLACEMENT, LOG_DETAIL):
        assert read_settings(SimpleNamespace(**{key: nonsense})) == Settings(), key
    assert read_settings(SimpleNamespace()) == Settings()


@pytest.mark.parametrize("nonsense", [None, "", "yes", -1.5, [], {}, object(), True, float("nan"), 2.0**60])
def test_a_nonsense_count_of_megabytes_reads_as_the_default(nonsense: Any) -> None:
    for key in (MARGIN, CACHE):
        assert read_settings(SimpleNamespace(**{key: nonsense})) == Settings(), key


def test_values_read_as_what_they_say() -> None:
    values = {ENABLED: False, COMPUTE: "fp32", DORA_NORM: AS_STOCK, ON_FAILURE: STOP, LOG_DETAIL: DETAILED}
    values |= {PLACEMENT: STREAMED, MARGIN: 256, CACHE: 0, TEXT_ENCODERS: False}
    expected = Settings(False, Arithmetic("fp32", True, "auto"), False, "stop", 2**28, True, 0, True)
    assert read_settings(SimpleNamespace(**values)) == expected
    for choice, policy in ((AUTOMATIC, "auto"), (BESIDE, "branch"), (MERGE, "merge")):
        assert read_settings(SimpleNamespace(**{DENSE: choice})).arithmetic.dense == policy


def test_a_change_of_the_dense_policy_acts_at_the_next_generation(host: Host, checkpoint: Checkpoint) -> None:
    """fp32 layers are merged, the FP8 one and what is read around its layer are as ever."""
    base = bases_of(checkpoint)
    lora = make_lora("cats")
    lora.write(host)
    active = [Active(lora)]
    exact = exact_output(checkpoint, "a cat", active)
    merged = {f"{name}.weight" for name in LAYERS if name != "diffusion_model.low"}
    merged = {name.removeprefix("clip_l.") for name in merged}
    for choice in (MERGE, BESIDE, MERGE, MERGE, AUTOMATIC):
        host.set_option(DENSE, choice)
        assert distance(generate(host, prompt("a cat", *active)), exact) < EXACT, choice
        now = bases_of(checkpoint)
        changed = {name.removeprefix("clip_l.") for name in base if now[name][0] != base[name][0]}
        assert changed == (merged if choice == MERGE else set())
        assert branches(checkpoint.model) == (1 if choice == MERGE else 4)
    host.set_option(DENSE, MERGE)
    generate(host, prompt("a cat", *active))
    host.set_option(ENABLED, False)
    generate(host, "a cat")
    assert bases_of(checkpoint) == base


def test_another_strength_reaches_merged_layers(host: Host, checkpoint: Checkpoint) -> None:
    lora = make_lora("cats")
    lora.write(host)
    host.set_option(DENSE, MERGE)
    for strength in (1.0, 0.25, -0.5, 1.0):
        active = [Active(lora, strength)]
        image = generate(host, prompt("a cat", *active))
        assert distance(image, exact_output(checkpoint, "a cat", active)) < EXACT
    assert distance(generate(host, "a cat"), exact_output(checkpoint, "a cat")) < EXACT


def test_what_is_computed_in_bf16_is_not_merged(host: Host, checkpoint: Checkpoint) -> None:
    base = bases_of(checkpoint)
    checkpoint.model.computation_dtype = torch.bfloat16
    lora = make_lora("cats", modules=["diffusion_model.blocks.1.mlp"])
    lora.write(host)
    host.set_option(DENSE, MERGE)
    active = [Active(lora)]
    image = generate(host, prompt("a cat", *active))
    assert distance(image, exact_output(checkpoint, "a cat", active)) < EXACT
    assert bases_of(checkpoint) == base


def test_a_prompt_without_loras_attaches_nothing(host: Host, checkpoint: Checkpoint) -> None:
    image = generate(host, "a cat")
    assert distance(image, exact_output(checkpoint, "a cat")) < EXACT
    assert branches(checkpoint.model) == branches(checkpoint.encoder) == 0
    assert checkpoint.forge_objects.unet is checkpoint.forge_objects_original.unet


@pytest.mark.only_on("forge", "patches of other extensions go Neo's own way")
def test_the_dora_norm_of_stock_forge_makes_old_images_again(host: Host, checkpoint: Checkpoint) -> None:
    """A DoRA as its own extension would add it: ours as trained, ours as stock, and stock's own merge."""
    parameter = "diffusion_model.blocks.0.attn.weight"
    value = host.contract.patch_value(
        up=values(8, 2), down=values(2, 8), alpha=torch.tensor(1.0), dora_scale=1.0 + values(8, 1)
    )

    def before_sampling(target: Any) -> None:
        unet = target.forge_objects.unet.clone()
        unet.add_patches(filename="dora", patches={parameter: value}, strength_patch=0.75, strength_model=1.0)
        target.forge_objects.unet = unet

    trained = generate(host, "a cat", before_sampling=before_sampling).values
    host.set_option(DORA_NORM, AS_STOCK)
    as_stock = generate(host, "a cat", before_sampling=before_sampling).values
    assert not host.contract.merged(checkpoint)
    host.set_option(ENABLED, False)
    stock = generate(host, "a cat", before_sampling=before_sampling)
    assert host.contract.merged(checkpoint) == {parameter}
    assert distance(stock, as_stock) < EXACT < 1e-3 < distance(stock, trained)
