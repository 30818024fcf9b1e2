"""Saving while LoRAs are active: the host's own file with the LoRAs merged in it, and nothing of ours."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lib_precision_lora.host import install, uninstall
from lib_precision_lora.host.page.settings import register_settings
from lib_precision_lora.host.saving import SavingError
from lib_precision_lora.ui.settings import BESIDE, DENSE, MERGE
from tests.host.checkpoints import TEXT_LAYER, Checkpoint
from tests.host.images import distance, generate, load_checkpoint
from tests.host.lora_files import Active, exact_output, exact_weights, make_lora, nearest, prompt, values
from tests.host.loras.test_widening import CONV, conv_lora, with_channels
from tests.host.observers import bases_of, branches, hooks_of, log_lines
from tests.host.webui import Host

EXACT = 1e-5
UNET, ENCODER = "model.diffusion_model.", "text_encoders."
LOW = "diffusion_model.low.weight"
CATS, DOGS = make_lora("cats", size=0.3), make_lora("dogs", seed=1, rank=3, size=0.3)
BOTH = [Active(CATS, 1.0, 0.5), Active(DOGS, -0.6)]
POLICIES = pytest.mark.parametrize("dense", [BESIDE, MERGE])


@pytest.fixture
def checkpoint(host: Host) -> Checkpoint:
    for lora in (CATS, DOGS):
        lora.write(host)
    return load_checkpoint(host, lambda: Checkpoint(host))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "saved").mkdir()
    return tmp_path / "saved/checkpoint.safetensors"


def save(host: Host, checkpoint: Checkpoint, path: Path, what: str = "checkpoint") -> dict[str, Tensor]:
    """By the button "Save UNet" or "Save Checkpoint"; what then stands in the file."""
    checkpoint.forge_objects.vae = SimpleNamespace(first_stage_model=VAE)
    assert getattr(host.engine.ForgeDiffusionEngine, f"save_{what}")(checkpoint, str(path)) == str(path)
    return safetensors.torch.load_file(path)


VAE = nn.Linear(2, 2)


def key_of(name: str) -> str:
    """A parameter's name in the file of a whole checkpoint."""
    return ENCODER + name if name.startswith("clip_l.") else UNET + name.removeprefix("diffusion_model.")


def loaded(host: Host, tensors: dict[str, Tensor]) -> Checkpoint:
    """The checkpoint of a saved file."""

    def make() -> Checkpoint:
        checkpoint = Checkpoint(host, seed=5)
        for prefix, model in ((UNET, checkpoint.model.diffusion_model), (ENCODER, checkpoint.encoder)):
            state = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
            model.load_state_dict(state)
        return checkpoint

    return load_checkpoint(host, make)


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("what", ["unet", "checkpoint"])
def test_without_a_lora_the_file_is_the_hosts_own_to_the_byte_and_nothing_is_said(
    bare_host: Host, path: Path, what: str
) -> None:
    checkpoint = load_checkpoint(bare_host, lambda: Checkpoint(bare_host))
    CATS.write(bare_host)
    save(bare_host, checkpoint, path, what)
    theirs = path.read_bytes()
    register_settings()
    assert install()
    with log_lines(logging.INFO) as lines:
        save(bare_host, checkpoint, path, what)
        assert path.read_bytes() == theirs
        generate(bare_host, prompt("a cat", Active(CATS)))
        generate(bare_host, "a cat")
        save(bare_host, checkpoint, path, what)
        assert path.read_bytes() == theirs
    assert not [line for line in lines if "Saved" in line]


@POLICIES
def test_the_file_has_the_hosts_names_and_one_rounding_of_the_float64_merge(
    host: Host, checkpoint: Checkpoint, path: Path, dense: str
) -> None:
    host.set_option(DENSE, dense)
    before = save(host, checkpoint, path)
    generate(host, prompt("a cat", *BOTH))
    tensors = save(host, checkpoint, path)
    assert tensors.keys() == before.keys()
    unet, te = exact_weights(checkpoint, BOTH)
    merged = {key_of(name): weight for name, weight in {**unet, **te}.items()}
    assert len(merged) == 5
    for key, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (before[key].dtype, before[key].shape)
        if key not in merged:
            assert same_bytes(tensor, before[key]), key
        elif key == key_of(LOW):
            assert torch.equal(tensor.float(), merged[key].float().to(torch.float8_e4m3fn).float())
        else:
            assert float((tensor.double() - merged[key]).norm() / merged[key].norm()) < 1e-6, key


@POLICIES
def test_loaded_again_it_makes_the_image_that_it_was_saved_from(
    host: Host, checkpoint: Checkpoint, path: Path, dense: str
) -> None:
    host.set_option(DENSE, dense)
    parts = [name for name in CATS.deltas if name != LOW]
    high = make_lora("high", modules=[name.removesuffix(".weight") for name in parts], size=0.3)
    high.write(host)
    image = generate(host, prompt("a cat", Active(high, 0.9)))
    tensors = save(host, checkpoint, path)
    again = generate(loaded(host, tensors).host, "a cat")
    assert distance(again, image.values.double()) < EXACT
    assert distance(again, exact_output(checkpoint, "a cat", [Active(high, 0.9)])) < EXACT


def test_a_low_bit_layer_makes_the_image_of_its_rounded_merge(
    host: Host, checkpoint: Checkpoint, path: Path
) -> None:
    generate(host, prompt("a cat", *BOTH))
    again = generate(loaded(host, save(host, checkpoint, path)).host, "a cat")
    assert distance(again, exact_output(checkpoint, "a cat", BOTH, nearest)) < EXACT


@POLICIES
def test_saving_changes_nothing_of_what_is_attached_nor_the_next_image(
    host: Host, checkpoint: Checkpoint, path: Path, dense: str
) -> None:
    host.set_option(DENSE, dense)
    base = bases_of(checkpoint)
    first = generate(host, prompt("a cat", *BOTH))
    standing, hooks = bases_of(checkpoint), hooks_of(checkpoint.model)
    for what in ("unet", "checkpoint"):
        save(host, checkpoint, path, what)
    assert bases_of(checkpoint) == standing
    assert hooks_of(checkpoint.model) == hooks
    assert torch.equal(generate(host, prompt("a cat", *BOTH)).values, first.values)
    stronger = [Active(CATS, 1.5), Active(DOGS, 0.2)]
    assert (
        distance(generate(host, prompt("a cat", *stronger)), exact_output(checkpoint, "a cat", stronger))
        < EXACT
    )
    generate(host, "a cat")
    assert bases_of(checkpoint) == base
    assert hooks_of(checkpoint.model) == 0


@pytest.mark.only_on("forge", "patches of other extensions go Neo's own way")
def test_a_parameter_that_is_read_around_forwards_is_saved_once_merged(
    host: Host, checkpoint: Checkpoint, path: Path
) -> None:
    name, delta = "diffusion_model.register", values(2, 8)
    patcher = checkpoint.forge_objects.unet.clone()
    patcher.add_patches(filename="file", patches={name: ("diff", (delta,))}, strength_patch=0.5)
    host.memory.load_models_gpu([patcher])
    tensors = save(host, checkpoint, path, "unet")
    exact = checkpoint.weight(name) + 0.5 * delta.double()
    assert float((tensors["register"].double() - exact).norm() / exact.norm()) < 1e-6
    assert "register" in dict(checkpoint.model.diffusion_model.named_parameters())


def test_a_widened_input_layer_is_saved_wide(host: Host, checkpoint: Checkpoint, path: Path) -> None:
    tensors, name, delta = conv_lora(6)
    assert name == CONV
    safetensors.torch.save_file(tensors, host.lora_dir / "control.safetensors")
    generate(host, "a cat<lora:control:0.8>")
    saved = save(host, checkpoint, path, "unet")["input_blocks.0.0.weight"]
    exact = with_channels(checkpoint.weight(CONV), 6) + 0.8 * delta
    assert saved.shape == (4, 6, 3, 3)
    assert float((saved.double() - exact).norm() / exact.norm()) < 1e-6


def test_a_file_that_was_left_out_is_not_in_it(host: Host, checkpoint: Checkpoint, path: Path) -> None:
    CATS.with_tensors(
        lambda tensors: tensors.update({k: v * float("nan") for k, v in tensors.items()})
    ).write(host)
    image = generate(host, prompt("a cat", *BOTH))
    assert image.comments
    tensors = save(host, checkpoint, path)
    unet, te = exact_weights(checkpoint, BOTH[1:])
    for name, weight in {**unet, **te}.items():
        if name != LOW:
            assert float((tensors[key_of(name)].double() - weight).norm() / weight.norm()) < 1e-6


def test_one_sentence_says_what_was_merged_and_what_rounding_costs(
    host: Host, checkpoint: Checkpoint, path: Path
) -> None:
    generate(host, prompt("a cat", *BOTH))
    with log_lines(logging.INFO) as lines:
        tensors = save(host, checkpoint, path)
    (line,) = [line for line in lines if line.startswith("Saved")]
    assert line.startswith("Saved with 2 LoRAs (cats, dogs) merged into 5 layers. Rounding costs ")
    exact = exact_weights(checkpoint, BOTH)[0][LOW]
    error = float((tensors[key_of(LOW)].double() - exact).norm() / (exact - checkpoint.weight(LOW)).norm())
    assert f"(FP8 {100 * error:.0f} %, fp32 less than 0.1 %)" in line
    assert "a part of it is lost" in line
    assert f"(worst: {100 * error:.0f} % in diffusion_model.low)" in line


@pytest.mark.parametrize(
    ("modules", "size", "level", "ending"),
    [
        ((LOW.removesuffix(".weight"),), 0.02, logging.WARNING, "in a wider type, before saving."),
        ((TEXT_LAYER,), 0.3, logging.INFO, "Rounding to fp32 costs less than 0.1 % of what they add."),
    ],
)
def test_most_of_it_lost_is_a_warning_with_the_way_out_and_nothing_lost_is_none(
    host: Host,
    checkpoint: Checkpoint,
    path: Path,
    modules: tuple[str, ...],
    size: float,
    level: int,
    ending: str,
) -> None:
    file = make_lora("file", modules=modules, size=size)
    file.write(host)
    generate(host, prompt("a cat", Active(file)))
    with log_lines(logging.INFO) as lines, log_lines(logging.WARNING) as warnings:
        save(host, checkpoint, path)
    (line,) = [line for line in lines if line.startswith("Saved")]
    assert line.endswith(ending)
    assert ("most of it is lost" in line) == (level == logging.WARNING) == (line in warnings)


def test_a_prompts_loras_that_are_not_active_on_what_is_saved_are_spoken_of(
    host: Host, checkpoint: Checkpoint, path: Path
) -> None:
    """The button loads the checkpoint anew where the last generation had another storage type."""
    generate(host, "a cat")
    with log_lines() as lines:
        save(host, checkpoint, path)
    assert lines == []
    text = make_lora("text", modules=(TEXT_LAYER,), size=0.3)
    text.write(host)
    generate(host, prompt("a cat", Active(text)))
    with log_lines() as lines:
        save(host, checkpoint, path)
        assert lines == []
        save(host, checkpoint, path, "unet")
    (line,) = lines
    assert line.startswith("Saved without LoRAs: none is active on what was saved.")
    anew = load_checkpoint(host, lambda: Checkpoint(host))
    with log_lines() as lines:
        save(host, anew, path)
    assert lines == [line]


def test_a_value_out_of_range_is_said_before_anything_is_written(
    host: Host, checkpoint: Checkpoint, path: Path
) -> None:
    generate(host, prompt("a cat", Active(CATS, 1e5)))
    path.write_bytes(b"what was there")
    reason = r"layer diffusion_model\.low\.weight: its largest value would be .*fp8-e4m3fn ends at 448"
    for what in ("unet", "checkpoint"):
        with pytest.raises(SavingError, match=f"Nothing was saved: {reason}"):
            save(host, checkpoint, path, what)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == b"what was there"
    assert distance(generate(host, "a cat"), exact_output(checkpoint, "a cat")) < EXACT


def test_a_disk_that_is_full_leaves_no_part_of_a_file(
    host: Host, checkpoint: Checkpoint, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(host, prompt("a cat", *BOTH))
    path.write_bytes(b"what was there")

    def full(tensors: Any, filename: str, *_: Any, **__: Any) -> None:
        Path(filename).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        for module in (safetensors.torch, host.engine):  # Neo has it under a name of its own
            patch.setattr(module, "save_file", full, raising=False)
        with pytest.raises(SavingError, match=r"Nothing was saved: OSError: .*No space left"):
            save(host, checkpoint, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == b"what was there"
    assert len(save(host, checkpoint, path)) > 10


def test_what_is_pressed_for_a_job_that_runs_meanwhile_keeps_no_file_from_being_saved(
    host: Host, checkpoint: Checkpoint, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(host, prompt("a cat", *BOTH))
    expected = save(host, checkpoint, path)
    for pressed in ("interrupted", "skipped"):
        with monkeypatch.context() as patch:
            patch.setattr(host.shared.state, "job_count", 1)
            patch.setattr(host.shared.state, "textinfo", "of the job")
            patch.setattr(host.shared.state, pressed, True)
            tensors = save(host, checkpoint, path)
            assert host.shared.state.textinfo == "of the job"
        assert tensors.keys() == expected.keys()
        assert all(same_bytes(tensors[key], expected[key]) for key in expected)


@contextmanager
def clicked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """As in the handler of a click in the page; what the page is told."""
    told: list[tuple[str, str]] = []
    gradio, context = ModuleType("gradio"), ModuleType("gradio.context")
    gradio.Error = type("Error", (Exception,), {})
    gradio.Info = lambda message: told.append(("info", message))
    gradio.Warning = lambda message: told.append(("warning", message))
    context.LocalContext = SimpleNamespace(
        blocks=SimpleNamespace(get=object), event_id=SimpleNamespace(get=lambda: "1")
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gradio", gradio)
        patch.setitem(sys.modules, "gradio.context", context)
        yield told


def test_a_click_in_the_page_is_answered_there(
    host: Host, checkpoint: Checkpoint, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(host, prompt("a cat", *BOTH))
    with clicked(monkeypatch) as told:
        save(host, checkpoint, path)
        ((level, message),) = told
        assert (level, message[:36]) == ("info", "Precision LoRA: Saved with 2 LoRAs (")
        generate(host, prompt("a cat", Active(CATS, 1e5)))
        with pytest.raises(Exception, match="Precision LoRA: Nothing was saved: layer ") as raised:
            save(host, checkpoint, path)
        assert type(raised.value).__name__ == "Error", "the page shows the text of gradio's own alone"


def test_another_extension_that_asks_for_the_state_gets_the_merged_one(
    host: Host, checkpoint: Checkpoint
) -> None:
    generate(host, prompt("a cat", *BOTH))
    state = host.engine.utils.get_state_dict_after_quant
    name = "blocks.0.attn.weight"
    exact = exact_weights(checkpoint, BOTH)[0][f"diffusion_model.{name}"]
    for model, prefix in (
        (checkpoint.model, "diffusion_model."),
        (checkpoint.model.diffusion_model, ""),
        (checkpoint.model.diffusion_model.blocks, None),
    ):
        key = name.removeprefix("blocks.") if prefix is None else prefix + name
        found = state(model, "its.")[f"its.{key}"]
        assert float((found.double() - exact).norm() / exact.norm()) < 1e-6
    assert branches(checkpoint.model) > 0


def test_switched_off_the_next_file_is_the_hosts_own(host: Host, checkpoint: Checkpoint, path: Path) -> None:
    host.set_option("precision_lora_enabled", False)
    with log_lines(logging.INFO) as lines:
        generate(host, prompt("a cat", *BOTH))
        tensors = save(host, checkpoint, path)
    unet, _ = exact_weights(checkpoint, BOTH, stored=True)
    name = "diffusion_model.blocks.0.attn.weight"
    assert float((tensors[key_of(name)].double() - unet[name]).norm()) < EXACT
    assert not [line for line in lines if "Saved" in line]


def test_uninstalled_the_hosts_own_functions_save_again(bare_host: Host) -> None:
    engine = bare_host.engine.ForgeDiffusionEngine

    def standing() -> list[Any]:
        return [bare_host.engine.utils.get_state_dict_after_quant, engine.save_unet, engine.save_checkpoint]

    theirs = standing()
    register_settings()
    assert install()
    assert not any(ours is their for ours, their in zip(standing(), theirs, strict=True))
    uninstall()
    assert standing() == theirs
