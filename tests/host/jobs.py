"""Generations by the host's own `process_images`, from checkpoints that it loads and lets go by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_precision_lora.host import installation
from lib_precision_lora.host.generation.override import Override, request
from lib_precision_lora.host.page.settings import Settings
from tests.host.checkpoints import PICTURE, TOKENS, Checkpoint
from tests.host.images import context_of
from tests.host.webui import Host

FIRST, SECOND = "first.safetensors", "second.safetensors"
E4M3, E5M2 = Override("float8-e4m3fn"), Override("float8-e5m2")
FP8, FP8_WIDE = torch.float8_e4m3fn, torch.float8_e5m2
OPTION = "forge_unet_storage_dtype"


class CheckpointFile:
    """What the host knows of a file that it lists."""

    def __init__(self, path: Path, seed: int) -> None:
        self.filename, self.seed = str(path), seed
        self.name = self.title = self.short_title = path.name
        self.name_for_extra = self.model_name = path.stem
        self.sha256 = "0" * 64

    def calculate_shorthash(self) -> str:
        return self.sha256[:10]

    def __repr__(self) -> str:
        return self.name


class Images(list[Tensor]):
    """What `sample` returns where nothing is left to be decoded."""

    already_decoded = True


@dataclass(eq=False)
class Jobs:
    """A host with some checkpoints on disk, the first of them selected.

    loads: file name and storage type of every one that was loaded; broken: storage types in which loading
    fails.
    """

    host: Host
    files: dict[str, CheckpointFile]
    loads: list[tuple[str, Any]] = field(default_factory=list)
    broken: set[Any] = field(default_factory=set)

    def select(self, file: str = FIRST, low_bits: str = "Automatic") -> None:
        """As the user does on the page."""
        self.host.set_option("sd_model_checkpoint", file)
        self.host.set_option(OPTION, low_bits)
        self.host.main_entry.refresh_model_loading_parameters()

    def load(self, path: str, additional_state_dicts: Any = None) -> Checkpoint:
        """In the place of the host's `forge_loader`."""
        file = self.files[Path(path).name]
        storage = self.host.args.dynamic_args["forge_unet_storage_dtype"]
        self.loads.append((file.name, storage))
        if storage in self.broken:
            raise RuntimeError(f"no room for {storage}")
        checkpoint: Any = Checkpoint(self.host, file.seed)
        checkpoint.model.storage_dtype = storage or torch.float32
        checkpoint.forge_objects.vae = SimpleNamespace(latent_channels=4, upscale_ratio=8)
        checkpoint.forge_objects_original.vae = checkpoint.forge_objects.vae
        checkpoint.tiling_enabled = False
        return checkpoint

    def new(
        self,
        prompt: str = "a cat",
        override: Override | None = None,
        during: Callable[[Any], None] = lambda p: None,
        **fields: Any,
    ) -> Any:
        """A processing object; during: what happens while it samples, after each pass.

        Of it, `outputs` are the diffusion model's, `storage` the types it was stored in.
        """
        sample_once = self.sample_once

        class Processing(self.host.processing.StableDiffusionProcessingTxt2Img):  # type: ignore[name-defined, misc]
            def sample(self, *args: Any, **kwargs: Any) -> Images:
                if self.scripts is not None:
                    self.scripts.process_before_every_sampling(self)
                sample_once(self)
                during(self)
                return Images([torch.zeros(3, 8, 8)])

        p = Processing(prompt=prompt, steps=2, **fields)
        p.outputs, p.storage = [], []
        p.sampler_name, p.scheduler = "Euler", "Automatic"
        p.width = p.height = 64
        p.do_not_save_samples = p.do_not_save_grid = True
        if override is not None:
            p.scripts = BeforeProcess(override)
        return p

    def sample_once(self, p: Any) -> None:
        unet = p.sd_model.forge_objects.unet
        with torch.inference_mode():
            self.host.sampling.sampling_prepare(unet, x=PICTURE)
            p.storage.append(unet.model.storage_dtype)
            output = unet.model.diffusion_model(TOKENS, PICTURE, context_of(p.c))
            self.host.sampling.sampling_cleanup(unet)
        p.outputs.append(output.clone())

    def run(self, prompt: str = "a cat", override: Override | None = None, **fields: Any) -> Any:
        """Make it; returns the processing object."""
        p = self.new(prompt, override, **fields)
        self.host.processing.process_images(p)
        return p

    def _change(self, name: str) -> bool:
        """Select this checkpoint, as hires fix does; whether it is another one."""
        change = self.host.main_entry.checkpoint_change
        return bool(change(name, **self.host.contract.preset, save=False, refresh=False))

    def second_pass(self, p: Any, name: str) -> None:
        """As hires fix and the refiner do it: load this checkpoint, then select the former one again."""
        former = self.host.shared.opts.sd_model_checkpoint
        if self._change(name):
            try:
                self.host.main_entry.refresh_model_loading_parameters()
                self.host.sd_models.forge_model_reload()
            finally:
                self._change(former)
                self.host.main_entry.refresh_model_loading_parameters()
        self.host.extra_networks.activate(p, p.extra_network_data)
        p.setup_conds()
        self.sample_once(p)


class BeforeProcess:
    """Our accordion's script, alone among the host's scripts; every other callback does nothing."""

    def __init__(self, override: Override) -> None:
        self.override = override

    def before_process(self, p: Any) -> None:
        request(p, self.override)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def start_jobs(
    host: Host,
    folder: Path,
    patch: pytest.MonkeyPatch,
    files: Sequence[str] = (),
    make: Callable[[Host, dict[str, CheckpointFile]], Any] = Jobs,
) -> Any:
    """files: in the folder, next to two checkpoints of which it has no files; make: the kind of `Jobs`."""
    names = [FIRST, SECOND, *files]
    listed = {name: CheckpointFile(folder / name, seed) for seed, name in enumerate(names)}
    jobs = make(host, listed)
    host.set_option("live_previews_enable", False)
    patch.setattr(host.sd_models, "checkpoint_aliases", dict(listed))
    patch.setattr(host.sd_models, "checkpoints_list", dict(listed))
    patch.setattr(host.sd_models, "forge_loader", jobs.load)
    patch.setattr(host.processing, "need_global_unload", False)
    patch.setattr(host.shared, "config_filename", str(folder / "config.json"))
    patch.setattr(host.shared.cmd_opts, "no_prompt_history", True, raising=False)
    for flag in ("interrupted", "skipped", "stopping_generation"):
        patch.setattr(host.shared.state, flag, False)
    for key in ("online_lora", OPTION):
        patch.setitem(host.args.dynamic_args, key, host.args.dynamic_args.get(key))
    jobs.select()
    host.shared.opts.data["sd_checkpoint_hash"] = "0" * 64
    host.shared.opts.save(host.shared.config_filename)
    return jobs


def settings() -> Settings:
    active = installation.active()
    assert active is not None
    return active.settings()


def chosen_by_the_user(host: Host) -> tuple[Any, ...]:
    """All that an override must leave alone; the options' file with its bytes."""
    return (
        dict(host.shared.opts.data),
        Path(host.shared.config_filename).read_bytes(),
        dict(host.sd_models.model_data.forge_loading_parameters),
        host.contract.loading_arguments(),
        settings(),
    )
