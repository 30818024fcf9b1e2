"""Patches that other extensions put on the same models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_precision_lora.branch import PatchError
from lib_precision_lora.branch.session import session
from lib_precision_lora.host import uninstall
from lib_precision_lora.ui.settings import ENABLED
from tests.host.checkpoints import Checkpoint
from tests.host.images import distance, generate
from tests.host.lora_files import (
    Active,
    LoraFile,
    exact_output,
    exact_weights,
    make_lora,
    prompt,
    values,
)
from tests.host.observers import bases_of, branches, bytes_of_bases, hooks_of
from tests.host.webui import Host

pytestmark = pytest.mark.only_on("forge", "patches of other extensions go Neo's own way: tests/host/neo")

EXACT = 1e-5
ATTN = "diffusion_model.blocks.0.attn.weight"
MLP = "diffusion_model.blocks.1.mlp.weight"


@pytest.fixture
def cats(host: Host) -> LoraFile:
    file = make_lora("cats")
    file.write(host)
    return file


def adds(patches: Mapping[Any, Any], strength: float = 1.0, name: str = "theirs") -> Callable[[Any], None]:
    """What an extension does before sampling: a clone of the patcher with its own patches."""

    def before_sampling(checkpoint: Any) -> None:
        unet = checkpoint.forge_objects.unet.clone()
        unet.add_patches(filename=name, patches=patches, strength_patch=strength, strength_model=1.0)
        checkpoint.forge_objects.unet = unet

    return before_sampling


def weights_with(
    checkpoint: Checkpoint, active: list[Active], extra: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`exact_weights`, and these ΔW on top."""
    unet, te = exact_weights(checkpoint, active)
    return {
        **unet,
        **{name: unet.get(name, checkpoint.weight(name)) + delta for name, delta in extra.items()},
    }, te


def test_a_lora_of_another_extension_is_computed_beside_the_base(
    host: Host, checkpoint: Checkpoint, cats: LoraFile
) -> None:
    base = bases_of(checkpoint)
    up, down, bias = values(8, 3), values(3, 8), values(8)
    patches = {
        ATTN: ("lora", (up, down, 1.5, None, None)),
        "diffusion_model.blocks.1.attn.weight": ("lora", (up, down, None, None, None)),
        "diffusion_model.blocks.1.attn.bias": ("diff", (bias,)),
        "diffusion_model.blocks.0.mlp.bias": (bias,),
    }
    active = [Active(cats, 0.5)]
    image = generate(host, prompt("a cat", *active), before_sampling=adds(patches, 0.75))
    product = up.double() @ down.double()
    expected = weights_with(
        checkpoint,
        active,
        {
            ATTN: 0.75 * 0.5 * product,
            "diffusion_model.blocks.1.attn.weight": 0.75 * product,
            "diffusion_model.blocks.1.attn.bias": 0.75 * bias.double(),
            "diffusion_model.blocks.0.mlp.bias": 0.75 * bias.double(),
        },
    )
    assert distance(image, checkpoint.exact("a cat", *expected)) < EXACT
    assert bases_of(checkpoint) == base
    assert not host.contract.merged(checkpoint)
    image = generate(host, prompt("a cat", *active))
    assert distance(image, exact_output(checkpoint, "a cat", active)) < EXACT, (
        "its clone is gone, and its patches"
    )


@pytest.mark.parametrize("leave", [uninstall, None])
def test_a_patcher_that_stays_loaded_is_merged_once_we_are_off(
    host: Host, checkpoint: Checkpoint, leave: Callable[[], None] | None
) -> None:
    """The host refreshes no patcher that it holds to be loaded."""
    up, down = values(8, 3), values(3, 8)
    unet = checkpoint.forge_objects.unet.clone()
    unet.add_patches(filename="theirs", patches={ATTN: ("lora", (up, down, None, None, None))})

    def before_sampling(checkpoint: Any) -> None:
        checkpoint.forge_objects.unet = unet

    exact = checkpoint.exact("a cat", {ATTN: checkpoint.weight(ATTN) + up.double() @ down.double()})
    image = generate(host, "a cat", before_sampling=before_sampling)
    assert distance(image, exact) < EXACT
    assert branches(checkpoint.model) == 1
    host.set_option(ENABLED, False)
    if leave is not None:
        leave()
    image = generate(host, "a cat", before_sampling=before_sampling)
    assert distance(image, exact) < EXACT
    assert host.contract.merged(checkpoint) == {ATTN}


def test_rows_of_a_fused_weight_and_a_base_factor_are_understood(
    host: Host, checkpoint: Checkpoint, cats: LoraFile
) -> None:
    up, down = values(4, 2), values(2, 8)

    def before_sampling(checkpoint: Any) -> None:
        unet = checkpoint.forge_objects.unet.clone()
        patch = {(ATTN, (0, 2, 4)): ("lora", (up, down, None, None, None))}
        unet.add_patches(filename="rows", patches=patch, strength_patch=0.5, strength_model=0.9)
        checkpoint.forge_objects.unet = unet

    active = [Active(cats, 0.5)]
    image = generate(host, prompt("a cat", *active), before_sampling=before_sampling)
    unet, te = exact_weights(checkpoint, active)
    rows = unet[ATTN] = unet[ATTN].clone()
    rows[2:6] = 0.9 * rows[2:6] + 0.5 * up.double() @ down.double()
    assert distance(image, checkpoint.exact("a cat", unet, te)) < EXACT
    assert branches(checkpoint.model) == 4


def unknown(host: Host) -> Any:
    """A kind of its own, as Fooocus' inpainting has."""
    host.lora.extra_weight_calculators["fooocus"] = lambda weight, strength, content: (
        weight + strength * content[0].to(weight)
    )
    return "fooocus", (values(8, 8),)


def loha(host: Host) -> Any:
    return "loha", (
        values(8, 2),
        values(2, 8),
        2.0,
        values(8, 2, seed=6),
        values(2, 8, seed=7),
        None,
        None,
        None,
    )


def lokr(host: Host) -> Any:
    return "lokr", (values(2, 2), values(4, 4), None, None, None, None, None, None, None)


@pytest.mark.parametrize("make", [loha, lokr])
def test_another_kind_of_adapter_runs_beside_the_base_as_the_host_would_merge_it(
    host: Host, checkpoint: Checkpoint, make: Callable[[Host], Any]
) -> None:
    before_sampling = adds({ATTN: make(host)}, 0.75)
    plain = generate(host, "a cat")
    image = generate(host, "a cat", before_sampling=before_sampling)
    assert not host.contract.merged(checkpoint)
    assert branches(checkpoint.model) == 1
    host.set_option(ENABLED, False)
    merged = generate(host, "a cat", before_sampling=before_sampling)
    assert host.contract.merged(checkpoint) == {ATTN}
    assert distance(image, merged.values) < EXACT < distance(image, plain.values)


@pytest.mark.parametrize("make", [unknown])
def test_what_we_do_not_compute_goes_the_hosts_way_for_that_parameter_alone(
    host: Host, checkpoint: Checkpoint, cats: LoraFile, make: Callable[[Host], Any]
) -> None:
    base = bytes_of_bases(checkpoint)
    before_sampling = adds({ATTN: make(host)}, 0.75)
    text = prompt("a cat", Active(cats, 0.5))
    try:
        image = generate(host, text, before_sampling=before_sampling)
        assert host.contract.merged(checkpoint) == {ATTN}
        assert branches(checkpoint.model) == 3
        merged = checkpoint.model.get_parameter(ATTN).double()
        unet, te = exact_weights(checkpoint, [Active(cats, 0.5)])
        assert not torch.allclose(merged, unet[ATTN])
        assert distance(image, checkpoint.exact("a cat", {**unet, ATTN: merged}, te)) < EXACT
        host.set_option(ENABLED, False)
        generate(host, text, before_sampling=before_sampling)
        assert torch.equal(checkpoint.model.get_parameter(ATTN).double(), merged), "as without us"
        host.set_option(ENABLED, True)
        assert torch.equal(generate(host, text, before_sampling=before_sampling).values, image.values)
        host.set_option(ENABLED, False)
        generate(host, "a cat")
        assert bytes_of_bases(checkpoint) == base
        assert hooks_of(checkpoint.model) == 0
    finally:
        host.lora.extra_weight_calculators.pop("fooocus", None)


@pytest.mark.parametrize("named", [True, False])
def test_what_the_host_has_merged_of_a_source_goes_with_the_part_that_we_cannot_attach(
    host: Host, checkpoint: Checkpoint, cats: LoraFile, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """named: whether the failure says whose it is; where not, it is found."""
    base = bytes_of_bases(checkpoint)
    lora = "lora", (values(8, 2), values(2, 8), 1.0, None, None)
    before_sampling = adds({ATTN: unknown(host), MLP: lora}, 0.75)
    attach = session.effective_weights

    def refusing(model: Any, patches: Any, *args: Any, **kwargs: Any) -> Any:
        if any(patch.source == "theirs" for patch in patches):
            raise PatchError("theirs: does not fit", "theirs" if named else None)
        return attach(model, patches, *args, **kwargs)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(session, "effective_weights", refusing)
            image = generate(host, "a cat<lora:cats:te=0:unet=0.5>", before_sampling=before_sampling)
            left = [Active(cats, 0.5, te=0.0)]
            assert distance(image, exact_output(checkpoint, "a cat", left)) < EXACT
            assert image.parameters["Precision LoRA skipped"] == "theirs"
            assert bytes_of_bases(checkpoint) == base
            assert any("does not fit" in comment for comment in image.comments)
        image = generate(host, "a cat", before_sampling=before_sampling)
        assert host.contract.merged(checkpoint) == {ATTN}
        assert branches(checkpoint.model) == 1
    finally:
        host.lora.extra_weight_calculators.pop("fooocus", None)


def unmergeable(host: Host) -> Any:
    """A kind of its own, whose calculator fails on this layer."""

    def calculate(weight: Tensor, strength: float, content: Any) -> Tensor:
        raise RuntimeError("a mask of another size")

    host.lora.extra_weight_calculators["broken"] = calculate
    return "broken", (values(8, 8),)


def of_a_kind_that_the_host_cannot_read(lora: LoraFile) -> LoraFile:
    """The same file with (IA)³ instead of a LoRA on the layer at hand: W + v · W."""
    key, tensors = "lora_unet_blocks_0_attn", dict(lora.tensors)
    for part in ("lora_up.weight", "lora_down.weight", "alpha"):
        del tensors[f"{key}.{part}"]
    tensors |= {f"{key}.weight": values(8), f"{key}.on_input": torch.tensor(False)}
    return LoraFile(lora.name, tensors, {})


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("first", [True, False], ids=["before it", "after it"])
def test_a_patch_that_the_host_cannot_merge_takes_no_lora_of_its_layer_with_it(
    host: Host, checkpoint: Checkpoint, cats: LoraFile, kind: str, first: bool
) -> None:
    base, active = bytes_of_bases(checkpoint), [Active(cats, 0.5)]
    unet, te = exact_weights(checkpoint, active)
    if kind == "ia3":
        of_a_kind_that_the_host_cannot_read(cats).write(host)
        unet[ATTN] = checkpoint.weight(ATTN) * (1.0 + 0.5 * values(8).double()[:, None])
    adds_it = adds({ATTN: unmergeable(host)}, 0.75)

    def before_sampling(checkpoint: Any) -> None:
        adds_it(checkpoint)
        if first:
            patches = checkpoint.forge_objects.unet.lora_patches
            checkpoint.forge_objects.unet.lora_patches = dict(reversed(patches.items()))

    try:
        for _ in range(2):
            image = generate(host, prompt("a cat", *active), before_sampling=before_sampling)
            assert distance(image, checkpoint.exact("a cat", unet, te)) < EXACT
            (comment,) = image.comments
            assert "theirs: the WebUI's own merge failed (RuntimeError: a mask of another size)" in comment
            assert image.parameters["Precision LoRA skipped"] == "theirs"
            assert not host.contract.merged(checkpoint)
        image = generate(host, prompt("a cat", *active))
        assert not image.comments
        assert distance(image, checkpoint.exact("a cat", unet, te)) < EXACT
        generate(host, "a cat")
        assert bytes_of_bases(checkpoint) == base
    finally:
        host.lora.extra_weight_calculators.pop("broken", None)


def test_of_two_patches_that_only_the_host_understands_the_one_that_fails_goes(
    host: Host, checkpoint: Checkpoint, cats: LoraFile
) -> None:
    """The near miss: the other one is merged, on the same layer."""
    broken, sound = adds({ATTN: unmergeable(host)}), adds({ATTN: unknown(host)}, 0.75, "sound")
    active = [Active(cats, 0.5)]

    def before_sampling(checkpoint: Any) -> None:
        broken(checkpoint)
        sound(checkpoint)

    try:
        alone = generate(host, prompt("a cat", *active), before_sampling=sound)
        image = generate(host, prompt("a cat", *active), before_sampling=before_sampling)
        assert image.parameters["Precision LoRA skipped"] == "theirs"
        assert host.contract.merged(checkpoint) == {ATTN}
        assert torch.equal(image.values, alone.values)
    finally:
        for kind in ("broken", "fooocus"):
            host.lora.extra_weight_calculators.pop(kind, None)


def test_a_patch_that_widens_an_input_layer_stays_the_hosts_while_our_loras_change(
    host: Host, checkpoint: Checkpoint
) -> None:
    """As IC-Light's: once the host has merged it, it fits the layer that it has made wider itself."""
    base, wide, name = bytes_of_bases(checkpoint), (4, 7, 3, 3), "diffusion_model.input_blocks.0.0.weight"
    file = make_lora("cats", modules=["diffusion_model.blocks.0.attn", name.removesuffix(".weight")])
    file.write(host)
    value = values(*wide)
    before_sampling = adds({name: ("diff", (value,))})
    widened = torch.zeros(wide, dtype=torch.float64)
    widened[:, :4] = checkpoint.weight(name)
    for strength in (0.5, None, -0.7):
        active = [] if strength is None else [Active(file, strength)]
        image = generate(host, prompt("a cat", *active), before_sampling=before_sampling)
        assert not image.comments
        unet, te = exact_weights(checkpoint, active)
        merged = widened + value.double()
        if active:
            merged[:, :4] += strength * file.deltas[name]
        assert distance(image, checkpoint.exact("a cat", {**unet, name: merged}, te)) < EXACT
        assert host.contract.merged(checkpoint) == {name}
    generate(host, "a cat")
    assert bytes_of_bases(checkpoint) == base
    assert hooks_of(checkpoint.model) == 0


def test_a_file_of_another_kind_is_merged_by_the_host_and_read_anew_when_it_changes(
    host: Host, checkpoint: Checkpoint
) -> None:
    """The list of identifiers is the same both times, which the host takes for no change."""
    before = {}
    for seed in (1, 2):
        factors = {
            f"hada_w{index}_{part}": values(*shape, seed=seed * index)
            for index in (1, 2)
            for part, shape in (("a", (8, 2)), ("b", (2, 8)))
        }
        file = LoraFile(
            "odd", {f"lora_unet_blocks_0_attn.{name}": value for name, value in factors.items()}, {}
        )
        file.write(host)
        image = generate(host, "a cat<lora:odd:1>")
        a, b, c, d = (factors[name].double() for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
        weight = checkpoint.weight(ATTN) + (a @ b) * (c @ d)
        assert distance(image, checkpoint.exact("a cat", {ATTN: weight})) < EXACT
        before[seed] = image.values
    assert not torch.equal(before[1], before[2])


def test_strengths_that_are_changed_in_place_act_at_once(
    host: Host, checkpoint: Checkpoint, cats: LoraFile
) -> None:
    """As extensions that set LoRA strengths per block or per step do, in the middle of sampling."""
    for entries, rename in ((list, False), (tuple, False), (list, True), (tuple, True)):
        factors = {ATTN: 0.25, MLP: -0.5}

        def between_steps(
            checkpoint: Any, entries: Any = entries, rename: bool = rename, factors: Any = factors
        ) -> None:
            unet = checkpoint.forge_objects.unet
            for identifier in list(unet.lora_patches):
                patches = unet.lora_patches.pop(identifier)
                for name, stack in patches.items():
                    patches[name] = [
                        entries([entry[0] * factors.get(name, 1.0), *entry[1:]]) for entry in stack
                    ]
                filename, *others = identifier
                unet.lora_patches[(f"{filename}_step" if rename else filename, *others)] = patches
            unet.refresh_loras()

        image = generate(host, prompt("a cat", Active(cats, 0.5)), between_steps=between_steps)
        unet, te = exact_weights(checkpoint, [Active(cats, 0.5)])
        for name, factor in factors.items():
            unet[name] = checkpoint.weight(name) + 0.5 * factor * cats.deltas[name]
        assert distance(image, checkpoint.exact("a cat", unet, te)) < EXACT
        image = generate(host, prompt("a cat", Active(cats, 0.5)))
        assert distance(image, exact_output(checkpoint, "a cat", [Active(cats, 0.5)])) < EXACT


def test_an_object_that_is_patched_in_is_followed(host: Host, checkpoint: Checkpoint, cats: LoraFile) -> None:
    """What `add_object_patch` puts on a clone stands in the model while that is loaded, and not after."""
    original = checkpoint.model.predictor
    replaced = copy.copy(original)

    def before_sampling(checkpoint: Any) -> None:
        unet = checkpoint.forge_objects.unet.clone()
        unet.object_patches["predictor"] = replaced
        checkpoint.forge_objects.unet = unet

    active = [Active(cats, 0.5)]
    for _ in range(2):
        image = generate(host, prompt("a cat", *active), before_sampling=before_sampling)
        assert checkpoint.model.predictor is replaced
        assert distance(image, exact_output(checkpoint, "a cat", active)) < EXACT
        image = generate(host, prompt("a cat", *active))
        assert checkpoint.model.predictor is original
        assert distance(image, exact_output(checkpoint, "a cat", active)) < EXACT
