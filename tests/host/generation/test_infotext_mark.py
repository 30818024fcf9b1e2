"""An image that we made carries our mark, and no other image does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lib_precision_lora import __version__
from lib_precision_lora.host import installation
from lib_precision_lora.host.generation.infotext import LOW_BITS, MARK, MODE, OURS_IN_INFOTEXT, VERSION
from lib_precision_lora.host.generation.notices import INFOTEXT_SKIPPED
from lib_precision_lora.host.loras.hosted import HostedSession
from lib_precision_lora.host.page import script
from lib_precision_lora.ui.choices import AS_SET, OURS, STOCK_MERGE
from lib_precision_lora.ui.settings import ENABLED
from tests.host.jobs import BeforeProcess, Jobs, Override
from tests.host.lora_files import make_lora, values

MARKED = {MARK: __version__}


class Script(BeforeProcess):
    """All of our script's steps; images: what is written into each batch's parameters, of ours."""

    def __init__(self, arguments: tuple[Any, ...] = (False, AS_SET, AS_SET)) -> None:
        super().__init__(Override())
        self.arguments = arguments
        self.images: list[dict[str, str]] = []

    def before_process(self, p: Any) -> None:
        script.request_override(p, self.arguments)

    def before_process_batch(self, p: Any, **kwargs: Any) -> None:
        script.begin_batch(p)

    def process_before_every_sampling(self, p: Any, **kwargs: Any) -> None:
        script.show_notices(p)
        script.write_parameters(p)

    def post_sample(self, p: Any, samples: Any) -> None:
        script.show_notices(p)
        script.write_parameters(p)
        present = p.extra_generation_params
        self.images.append({name: present[name] for name in OURS_IN_INFOTEXT if name in present})


def images(
    jobs: Jobs, prompt: str, during: Callable[[Any], None] = lambda p: None, **fields: Any
) -> list[dict[str, str]]:
    """What each image of a generation says of us."""
    arguments = fields.pop("arguments", (False, AS_SET, AS_SET))
    p = jobs.new(prompt, during=during, **fields)
    p.scripts = Script(arguments)
    jobs.host.processing.process_images(p)
    assert p.scripts.images
    return p.scripts.images


@pytest.fixture(autouse=True)
def _files(jobs: Jobs) -> None:
    make_lora("cats").write(jobs.host)


@pytest.mark.parametrize(
    ("prompt", "written"),
    [
        ("<lora:cats:1>", MARKED),
        ("<lora:cats:-0.5:0>", MARKED),
        ("<lora:cats:0:0.5>", MARKED),
        ("<lora:cats:1><lora:nobody:1>", {**MARKED, INFOTEXT_SKIPPED: "nobody"}),
        ("a cat", {}),
        ("<lora:cats:0>", {}),
        ("<lora:nobody:1>", {INFOTEXT_SKIPPED: "nobody"}),
    ],
)
def test_the_mark_is_on_what_we_made_with_default_settings(
    jobs: Jobs, prompt: str, written: dict[str, str]
) -> None:
    assert images(jobs, prompt, n_iter=2) == [written] * 2


def test_what_the_webui_made_has_no_mark(jobs: Jobs) -> None:
    merged = images(jobs, "<lora:cats:1>", arguments=(True, AS_SET, AS_SET, STOCK_MERGE))
    assert merged == [{MODE: STOCK_MERGE, VERSION: __version__}]
    assert images(jobs, "<lora:cats:1>") == [MARKED]
    jobs.host.set_option(ENABLED, False)
    assert images(jobs, "<lora:cats:1>") == [{}]


def test_choices_stand_beside_the_mark(jobs: Jobs) -> None:
    arguments = (True, "float8-e4m3fn", "fp16", OURS)
    chosen = {LOW_BITS: "float8-e4m3fn"}
    assert images(jobs, "<lora:cats:1>", arguments=arguments) == [{**MARKED, **chosen, MODE: "fp16"}]
    assert images(jobs, "a cat", arguments=arguments) == [{**chosen, VERSION: __version__}]


def test_an_image_whose_loras_could_not_be_attached_has_no_mark(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two: before it is sampled, nobody knows that it will have none. What was left out of one
    image stands in the parameters of all."""
    active = installation.active()
    assert active is not None
    first, follow = active.record.present.number + 1, HostedSession.follow

    def fail(session: Any, model: Any, patches: Any, *args: Any, **kwargs: Any) -> Any:
        if patches and active.record.present.number == first:
            raise RuntimeError("injected")
        return follow(session, model, patches, *args, **kwargs)

    monkeypatch.setattr(HostedSession, "follow", fail)
    skipped = {INFOTEXT_SKIPPED: "all"}
    assert images(jobs, "<lora:cats:1>", n_iter=2) == [skipped, {**skipped, **MARKED}]


def test_a_second_pass_without_loras_leaves_the_mark_of_the_first(jobs: Jobs) -> None:
    def second_pass(p: Any) -> None:
        _, networks = jobs.host.extra_networks.parse_prompts(["a cat"])
        jobs.host.extra_networks.activate(p, networks)
        p.scripts.process_before_every_sampling(p)
        jobs.sample_once(p)

    assert images(jobs, "<lora:cats:1>", during=second_pass) == [MARKED]
    assert images(jobs, "a cat") == [{}]


def test_what_is_still_in_effect_where_extra_networks_are_disabled_is_marked(jobs: Jobs) -> None:
    """The host then leaves the former prompt's LoRAs on the checkpoint."""
    plain = jobs.run("a cat").outputs
    assert images(jobs, "<lora:cats:1>") == [MARKED]
    p = jobs.run("a cat", disable_extra_networks=True)
    assert not torch.equal(p.outputs[0], plain[0])
    assert images(jobs, "a cat", disable_extra_networks=True) == [MARKED]


@pytest.mark.only_on("forge", "patches of other extensions go Neo's own way")
@pytest.mark.parametrize(("strength", "written"), [(0.5, MARKED), (0.0, {})])
def test_another_extensions_patches_that_we_apply_are_marked(
    jobs: Jobs, strength: float, written: dict[str, str]
) -> None:
    patch = {"diffusion_model.blocks.0.attn.weight": ("lora", (values(8, 2), values(2, 8), 2.0, None, None))}

    class Theirs(Script):
        def process_before_every_sampling(self, p: Any, **kwargs: Any) -> None:
            super().process_before_every_sampling(p)
            unet = p.sd_model.forge_objects.unet.clone()
            unet.add_patches(filename="theirs", patches=patch, strength_patch=strength)
            p.sd_model.forge_objects.unet = unet

    p = jobs.new("a cat")
    p.scripts = Theirs()
    jobs.host.processing.process_images(p)
    assert p.scripts.images == [written]
