"""Generations that the page asks for, made over the double with the extension's own script, and what is seen
in the host while they run."""

from __future__ import annotations

import dataclasses
from typing import Any

from lib_precision_lora.host import installation
from lib_precision_lora.host.generation.override import in_effect
from tests.host.jobs import CheckpointFile, Jobs
from tests.host.lora_files import Active, LoraFile, exact_output
from tests.host.observers import branches
from tests.host.webui import Host


class ScriptRunner:
    """The script of a tab with the values of its controls, as the host runs it."""

    def __init__(self, script: Any, values: tuple[Any, ...]) -> None:
        self._script, self._values = script, values

    def before_process(self, p: Any) -> None:
        self._script.before_process(p, *self._values)

    def process(self, p: Any) -> None:
        """Nothing of ours happens here."""

    def before_process_batch(self, p: Any, **kwargs: Any) -> None:
        self._script.before_process_batch(p, *self._values, **kwargs)

    def process_before_every_sampling(self, p: Any) -> None:
        self._script.process_before_every_sampling(p, *self._values)

    def post_sample(self, p: Any, samples: Any) -> None:
        self._script.post_sample(p, samples, *self._values)

    def postprocess(self, p: Any, processed: Any) -> None:
        self._script.postprocess(p, processed, *self._values)


class PageJobs(Jobs):
    """seen: what was found in the host in the middle of each generation; loras: the files it may name."""

    def __init__(self, host: Host, files: dict[str, CheckpointFile], loras: list[LoraFile]) -> None:
        super().__init__(host, files)
        self.loras = {lora.name: lora for lora in loras}
        self.seen: list[dict[str, Any]] = []

    def sample_once(self, p: Any) -> None:
        super().sample_once(p)
        self.seen.append(self._look(p))

    def generate(self, task: str, prompt: str, script: Any, values: tuple[Any, ...]) -> Any:
        """As the host does what a page has asked for; returns the processing object and what came of it."""
        from modules import progress

        progress.current_task = task
        p = self.new(prompt)
        p.scripts = ScriptRunner(script, values)
        processed = self.host.processing.process_images(p)
        return p, processed

    def _look(self, p: Any) -> dict[str, Any]:
        """override, settings: what is in effect; storage: of the diffusion model; branches, merged, online:
        layers that have a branch of ours, that the host has merged, that it merges in every forward; error:
        of the output, relative, to that of a float64 merge."""
        active, loader = installation.active(), self.host.current.model.lora_loader
        assert active is not None
        exact = exact_output(self.host.current, p.prompts[0], self._active(p))
        return {
            "override": dataclasses.asdict(in_effect(p)),
            "settings": flat(active.settings()),
            "storage": str(self.host.current.model.storage_dtype),
            "branches": branches(self.host.current.model),
            "merged": len(loader.backup),
            "online": len(loader.online_backup),
            "error": float((p.outputs[-1].double() - exact).norm() / exact.norm()),
        }

    def _active(self, p: Any) -> list[Active]:
        found = [params.positional for params in p.extra_network_data["lora"]]
        return [Active(self.loras[name], float(strength)) for name, strength in found if name in self.loras]


def flat(settings: Any) -> dict[str, Any]:
    """All fields of the settings, those of the arithmetic among them."""
    fields = dataclasses.asdict(settings)
    return fields.pop("arithmetic") | fields
