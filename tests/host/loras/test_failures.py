"""When attaching or merging fails in the middle of loading a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch

from lib_precision_lora.branch.session import session
from lib_precision_lora.host.generation.notices import GenerationStopped
from lib_precision_lora.ui.settings import ON_FAILURE, STOP
from tests.host.checkpoints import Checkpoint
from tests.host.damage import cats_and_dogs
from tests.host.images import distance, generate
from tests.host.lora_files import Active, exact_output, make_lora
from tests.host.observers import bases_of, branches, bytes_of_bases, hooks_of, log_lines
from tests.host.webui import Host

EXACT = 1e-5


def failing_at(count: int, patch: pytest.MonkeyPatch) -> None:
    """Make the attachment of the `count`-th module raise, once and for all."""
    attach = session.attach
    calls: list[None] = []

    def broken(*args: Any) -> Any:
        calls.append(None)
        if len(calls) >= count:
            raise RuntimeError("no such luck")
        return attach(*args)

    patch.setattr(session, "attach", broken)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("former", ["a cat", "a cat<lora:dogs:1>"])
def test_an_error_while_attaching_leaves_the_base_and_a_message(
    host: Host, checkpoint: Checkpoint, count: int, former: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cats, _ = cats_and_dogs(host)
    base = bases_of(checkpoint)
    generate(host, former)
    with monkeypatch.context() as patch:
        failing_at(count, patch)
        for _ in range(2):
            with log_lines() as lines:
                image = generate(host, "a cat<lora:cats:te=0:unet=1>")
            assert any("no such luck" in line for line in lines)
            assert sum("no such luck" in comment for comment in image.comments) == 1, image.comments
            assert distance(image, exact_output(checkpoint, "a cat")) < EXACT
            assert hooks_of(checkpoint.model) == 0
            assert bases_of(checkpoint) == base
    image = generate(host, "a cat<lora:cats:te=0:unet=1>")
    assert not image.comments, "the same prompt is tried anew"
    assert distance(image, exact_output(checkpoint, "a cat", [Active(cats, 1.0, te=0.0)])) < EXACT


def test_conditioning_that_lacks_a_lora_is_not_used_again(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    cats, _ = cats_and_dogs(host)
    text = "a cat<lora:cats:te=1:unet=0>"
    with monkeypatch.context() as patch:
        failing_at(1, patch)
        for _ in range(2):
            image = generate(host, text)
            assert any("no such luck" in comment for comment in image.comments)
            assert distance(image, exact_output(checkpoint, "a cat")) < EXACT
    image = generate(host, text)
    assert not image.comments
    assert distance(image, exact_output(checkpoint, "a cat", [Active(cats, 0.0, te=1.0)])) < EXACT
    encodes = checkpoint.encodes
    generate(host, text)
    assert checkpoint.encodes == encodes, "and then it is"


def test_an_error_while_attaching_stops_the_generation_where_that_is_set(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    cats, _ = cats_and_dogs(host)
    host.set_option(ON_FAILURE, STOP)
    with monkeypatch.context() as patch:
        failing_at(2, patch)
        for _ in range(2):
            with pytest.raises(GenerationStopped, match="no such luck"):
                generate(host, "a cat<lora:cats:te=0:unet=1>")
            assert hooks_of(checkpoint.model) == 0
    image = generate(host, "a cat<lora:cats:1>")
    assert not image.comments
    assert distance(image, exact_output(checkpoint, "a cat", [Active(cats)])) < EXACT


def test_a_message_of_the_first_pass_is_not_lost_in_the_second(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    cats_and_dogs(host)
    with monkeypatch.context() as patch:
        failing_at(1, patch)
        image = generate(host, "a cat<lora:cats:te=0:unet=1>", hires_prompt="a cat")
    assert len(image.comments) == 1
    assert "no such luck" in image.comments[0]
    assert not generate(host, "a cat").comments


def test_an_interrupt_while_attaching_is_passed_on(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an error: the user's. Nothing stays half attached."""
    cats, _ = cats_and_dogs(host)
    attach = session.attach

    def interrupted(*args: Any) -> Any:
        if branches(checkpoint.model) == 2:
            raise KeyboardInterrupt
        return attach(*args)

    with monkeypatch.context() as patch:
        patch.setattr(session, "attach", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(host, "a cat<lora:cats:te=0:unet=1>")
    assert hooks_of(checkpoint.model) == 0
    image = generate(host, "a cat<lora:cats:1>")
    assert distance(image, exact_output(checkpoint, "a cat", [Active(cats)])) < EXACT


def test_a_shape_that_only_the_hosts_merge_refuses_leaves_its_file_out_whole(
    host: Host, checkpoint: Checkpoint
) -> None:
    """Kinds that go the host's way are not checked beforehand; its merge raises in the middle of loading."""
    base = bytes_of_bases(checkpoint)
    _, dogs = cats_and_dogs(host)
    odd = dict(make_lora("odd").tensors)
    for index in (1, 2):
        odd |= {
            f"lora_unet_blocks_0_mlp.hada_w{index}_a": torch.randn(5, 2),
            f"lora_unet_blocks_0_mlp.hada_w{index}_b": torch.randn(2, 7),
        }
    safetensors.torch.save_file(odd, host.lora_dir / "odd.safetensors")
    for _ in range(2):
        image = generate(host, "a cat<lora:odd:te=0:unet=1><lora:dogs:0.5>")
        assert len(image.comments) == 1
        assert "odd" in image.comments[0]
        assert distance(image, exact_output(checkpoint, "a cat", [Active(dogs, 0.5)])) < EXACT
    image = generate(host, "a cat<lora:dogs:0.5>")
    assert not image.comments
    assert distance(image, exact_output(checkpoint, "a cat", [Active(dogs, 0.5)])) < EXACT
    generate(host, "a cat")
    assert bytes_of_bases(checkpoint) == base


@pytest.mark.parametrize(
    "text", ["<lora:cats:te=0:unet=1><lora:dogs:0.5>", "<lora:dogs:0.5><lora:cats:te=0:unet=1>"]
)
def test_a_failure_that_nobody_has_foreseen_leaves_its_source_out_alone(
    host: Host, checkpoint: Checkpoint, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, dogs = cats_and_dogs(host)
    original: Callable[..., Any] = session.effective_weights

    def failing(model: Any, patches: Any, *args: Any, **kwargs: Any) -> Any:
        if any("cats" in patch.source and not patch.changes_nothing for patch in patches):
            raise ZeroDivisionError("no such luck")
        return original(model, patches, *args, **kwargs)

    monkeypatch.setattr(session, "effective_weights", failing)
    for _ in range(2):
        image = generate(host, "a cat" + text)
        (comment,) = image.comments
        assert "cats: attaching failed (ZeroDivisionError: no such luck)" in comment
        assert image.parameters["Precision LoRA skipped"] == "cats"
        assert distance(image, exact_output(checkpoint, "a cat", [Active(dogs, 0.5)])) < EXACT


def test_a_patch_that_does_not_fit_leaves_its_source_out_alone(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape that shows only when it is attached, as where the model is another one than the file's."""
    from lib_precision_lora.branch.session import compose
    from lib_precision_lora.branch.session.patch import PatchError

    _, dogs = cats_and_dogs(host)
    original: Callable[..., Any] = compose.effective_weights

    def refusing(model: Any, patches: Any, *args: Any, **kwargs: Any) -> Any:
        for patch in patches:
            if "cats" in patch.source:
                raise PatchError(f"{patch.source}: does not fit", patch.source)
        return original(model, patches, *args, **kwargs)

    monkeypatch.setattr(session, "effective_weights", refusing)
    for _ in range(2):
        image = generate(host, "a cat<lora:cats:te=0:unet=1><lora:dogs:0.5>")
        assert len(image.comments) == 1
        assert "does not fit" in image.comments[0]
        assert distance(image, exact_output(checkpoint, "a cat", [Active(dogs, 0.5)])) < EXACT
