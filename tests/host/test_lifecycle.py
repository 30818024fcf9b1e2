"""Any sequence of what users, the host and other extensions do, against a model that is trivially right.

PRECISION_LORA_LIFECYCLE=500 runs that many sequences instead of a few, other ones every time, and makes
one that fails as short as it can, which takes minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lib_precision_lora.branch.session import session
from lib_precision_lora.host import install, installation, uninstall
from lib_precision_lora.host.page.settings import register_settings
from lib_precision_lora.ui.settings import AUTOMATIC, BESIDE, COMPUTE, DENSE, ENABLED, MERGE
from tests.host.checkpoints import Checkpoint
from tests.host.damage import DAMAGE
from tests.host.images import Image, distance, generate, load_checkpoint
from tests.host.lora_files import Active, LoraFile, exact_weights, make_lora, prompt, with_loha
from tests.host.observers import bases_of, hooks_of
from tests.host.webui import Host, running_host

TOLERANCE = {"Automatic": 1e-5, "fp32": 1e-5, "fp16": 5e-3}
GOOD = {
    "cats": make_lora("cats", size=0.3),
    "dogs": make_lora("dogs", seed=1, rank=3, size=0.3),
    "odd": with_loha(make_lora("odd", seed=2, size=0.3)),
    "low": make_lora("low", seed=3, modules=["diffusion_model.low"], size=0.3),
}
"""`odd` goes the host's way in part."""

BAD = ("truncated", "other architecture", "NaN", "missing up")
STRENGTHS = st.sampled_from([0.0, 0.25, 0.5, 1.0, -0.5])
LORAS = st.lists(st.tuples(st.sampled_from([*GOOD, "bad", "nobody"]), STRENGTHS, STRENGTHS), max_size=3)
THEIRS = "diffusion_model.blocks.1.attn.weight"


class Lifecycle(RuleBasedStateMachine):
    """kind: the host. After every generation the image is the one that float64 arithmetic gives."""

    kind = "double"
    data = Path()

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.lora_dir = Path(self.stack.enter_context(TemporaryDirectory()))
        self.host = self.stack.enter_context(running_host(self.kind, self.data, self.lora_dir))
        register_settings()
        for file in GOOD.values():
            file.write(self.host)
        self.files: dict[str, LoraFile] = dict(GOOD)
        DAMAGE[BAD[0]][0](self.host, "bad")
        self.enabled, self.compute, self.installed, self.seed = True, "Automatic", True, 0
        self.dense = AUTOMATIC
        self.theirs: tuple[str, float] | None = None
        self.values = dict(_their_values(self.host))
        self.host_merged = False
        assert install()
        self.checkpoint = load_checkpoint(self.host, lambda: Checkpoint(self.host))
        self.base = bases_of(self.checkpoint)

    def teardown(self) -> None:
        """Leaving the host puts every object back."""
        try:
            uninstall()
            assert hooks_of(self.checkpoint.model) == hooks_of(self.checkpoint.encoder) == 0
            generate(self.host, "a text that no cache holds, so that the text encoder is loaded")
            self.same_objects()
        finally:
            self.stack.close()

    @property
    def ours(self) -> bool:
        return self.enabled and self.installed

    @invariant()
    def the_base_is_untouched_while_ours(self) -> None:
        """But for what the host has merged, which it takes out when it loads the model next, and for what
        we have, which we take out when we leave, or follow another setting."""
        if self.ours and not self.host.contract.merged(self.checkpoint) and not self.merged:
            self.same_objects()

    @property
    def merged(self) -> bool:
        return any(session.merged for session in installation.active().sessions().values())

    def same_objects(self) -> None:
        """Where a host makes other ones of what it has merged and taken out, the same bytes."""
        now, base = bases_of(self.checkpoint), self.base
        if self.host_merged and not self.host.contract.keeps_objects:
            now, base = ({name: bytes_ for name, (_, bytes_) in found.items()} for found in (now, base))
        assert now == base

    @invariant()
    def no_hook_is_left_where_we_are_not(self) -> None:
        if not self.installed:
            assert hooks_of(self.checkpoint.model) == hooks_of(self.checkpoint.encoder) == 0

    @rule(loras=LORAS, hires=st.none() | LORAS)
    def generation(self, loras: list[Any], hires: list[Any] | None) -> None:
        """`bad` and `nobody` only while we are in: the host itself goes on with the former LoRAs then."""
        passes = [loras] if hires is None else [loras, hires]
        if not self.ours:
            passes = [[lora for lora in one if self.known_to_host(lora)] for one in passes]
        texts = [self.text(one) for one in passes]
        image = generate(
            self.host,
            texts[0],
            hires_prompt=None if hires is None else texts[1],
            before_sampling=self.their_patches,
        )
        for values, one in zip(image.passes, passes, strict=True):
            self.check(values, one)
        told = {name for name in ("bad", "nobody") for one in passes for lora in one if lora[0] == name}
        assert len(image.comments) == len(told), image.comments
        self.host_merged |= bool(self.host.contract.merged(self.checkpoint))
        kept = self.ours and not self.theirs and self.dense != MERGE
        if kept and not any(lora[0] == "odd" for one in passes for lora in one):
            assert bases_of(self.checkpoint)[THEIRS][1] == self.base[THEIRS][1]
        if not self.ours:
            assert hooks_of(self.checkpoint.model) == hooks_of(self.checkpoint.encoder) == 0

    def known_to_host(self, lora: tuple[str, float, float]) -> bool:
        return lora[0] in GOOD

    def text(self, loras: list[Any]) -> str:
        parts = [
            prompt("", Active(self.files[name], unet, te)) if name in self.files else f"<lora:{name}:{unet}>"
            for name, unet, te in loras
        ]
        return "a cat" + "".join(parts)

    def their_patches(self, checkpoint: Any) -> None:
        if self.theirs is None:
            return
        kind, strength = self.theirs
        unet = checkpoint.forge_objects.unet.clone()
        unet.add_patches(filename="theirs", patches={THEIRS: self.values[kind][0]}, strength_patch=strength)
        checkpoint.forge_objects.unet = unet

    def check(self, values: torch.Tensor, loras: list[Any]) -> None:
        """Against the weights that float64 arithmetic gives; where the host merges, rounded as it stores."""
        active = []
        for name, unet, te in loras:
            if name not in self.files:
                continue
            same = [one for one in active if (one.file.name, one.unet, one.te) == (name, unet, te)]
            if self.ours or self.host.contract.same_twice_adds or not same:
                active.append(Active(self.files[name], unet, te))
        weights = exact_weights(self.checkpoint, self.as_keyed(active), stored=not self.ours)
        if self.theirs is not None:
            kind, strength = self.theirs
            delta = strength * self.values[kind][1]
            weights[0][THEIRS] = weights[0].get(THEIRS, self.checkpoint.weight(THEIRS)) + delta
        exact = self.checkpoint.exact("a cat", *weights)
        image = Image((values,), (), {})
        assert distance(image, exact) < TOLERANCE[self.compute if self.ours else "fp32"], loras

    def as_keyed(self, active: list[Active]) -> list[Active]:
        """Forge's dictionary counts the same file at the same strength once, for each model by itself."""
        if self.ours or self.host.contract.same_twice_adds:
            return active
        counted: set[tuple[str, str, float]] = set()
        result = []
        for lora in active:
            strengths = []
            for part, strength in (("unet", lora.unet), ("te", lora.text_strength)):
                key = (lora.file.name, part, strength)
                strengths.append(0.0 if key in counted else strength)
                counted.add(key)
            result.append(Active(lora.file, *strengths))
        return result

    @rule(enabled=st.booleans())
    def toggle(self, enabled: bool) -> None:
        self.enabled = enabled
        self.host.set_option(ENABLED, enabled)

    @rule(mode=st.sampled_from(list(TOLERANCE)))
    def compute_mode(self, mode: str) -> None:
        self.compute = mode
        self.host.set_option(COMPUTE, mode)

    @rule(choice=st.sampled_from([AUTOMATIC, BESIDE, MERGE, MERGE]))
    def dense_policy(self, choice: str) -> None:
        self.dense = choice
        self.host.set_option(DENSE, choice)

    @rule()
    def unload(self) -> None:
        self.host.memory.unload_all_models()

    @rule(seed=st.sampled_from([0, 1]))
    def checkpoint_change(self, seed: int) -> None:
        self.checkpoint = None
        self.checkpoint = load_checkpoint(self.host, lambda: Checkpoint(self.host, seed))
        self.base, self.host_merged = bases_of(self.checkpoint), False

    @rule(damage=st.sampled_from(BAD))
    def another_damage(self, damage: str) -> None:
        DAMAGE[damage][0](self.host, "bad")

    @precondition(lambda self: self.ours)
    @rule(seed=st.integers(10, 12))
    def a_file_is_written_anew(self, seed: int) -> None:
        """Only while we are in: the host itself would not read it again."""
        self.files["dogs"] = make_lora("dogs", seed=seed, size=0.3)
        self.files["dogs"].write(self.host)
        self.host.contract.forget_files()

    @rule(theirs=st.none() | st.tuples(st.sampled_from(["lora", "loha"]), st.sampled_from([0.5, -0.25])))
    def another_extension(self, theirs: tuple[str, float] | None) -> None:
        self.theirs = theirs

    @precondition(lambda self: self.ours)
    @rule(count=st.integers(1, 4), name=st.sampled_from(list(GOOD)))
    def attaching_fails(self, count: int, name: str) -> None:
        """The generation goes on; the next one is right again, which the other rules see."""
        attach, calls = session.attach, []

        def broken(*args: Any) -> Any:
            calls.append(None)
            if len(calls) >= count:
                raise RuntimeError("no such luck")
            return attach(*args)

        session.attach = broken
        try:
            generate(self.host, self.text([(name, 0.375, 0.375)]))
        finally:
            session.attach = attach

    @rule()
    def leave_and_enter(self) -> None:
        """The script is reloaded, or unloaded and back later."""
        if self.installed:
            uninstall()
        else:
            assert install()
        self.installed = not self.installed


def _their_values(host: Host) -> Iterator[tuple[str, tuple[Any, torch.Tensor]]]:
    """Kind → (the host's patch value, ΔW)."""
    generator = torch.Generator().manual_seed(9)
    up, down = (0.3 * torch.randn(*shape, generator=generator) for shape in ((8, 2), (2, 8)))
    product = up.double() @ down.double()
    yield "lora", (host.contract.patch_value(up=up, down=down), product)
    factors = {f"hada_w{index}_{part}": value for index in (1, 2) for part, value in (("a", up), ("b", down))}
    yield "loha", (host.contract.patch_value(**factors), product.square())


def test_any_sequence_gives_the_right_image(host_kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    Lifecycle.kind, Lifecycle.data = host_kind, tmp_path_factory.getbasetemp() / "host-data"
    examples = os.environ.get("PRECISION_LORA_LIFECYCLE")
    run_state_machine_as_test(
        Lifecycle,
        settings=settings(
            max_examples=int(examples or 25),
            phases=list(Phase) if examples else [Phase.generate],
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=examples is None,
            database=None,
        ),
    )
