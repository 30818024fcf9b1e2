"""From the binding's record to the report of one generation, kept for the page that asked for it."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lib_precision_lora.branch.session.overhead import StepTime
from lib_precision_lora.host import installation
from lib_precision_lora.host.generation.record import Pass
from lib_precision_lora.host.generation.report import GenerationReport
from lib_precision_lora.memory.meter import PeakMeter
from lib_precision_lora.report.quantities import duration, mebibytes, part_of
from lib_precision_lora.storage import StorageError, stored_weight
from lib_precision_lora.ui.applied import applied_html

logger = logging.getLogger("lib_precision_lora")

KEPT_TASKS = 32
COMPUTE_NAMES = {"auto": "Automatic"}
"""Compute modes by their names in the page, where these are others."""


@dataclass(frozen=True, slots=True)
class Started:
    """A generation that has not come to its end. number: of the binding's last pass before it; peak: measures
    the card's largest use since it began."""

    number: int
    peak: PeakMeter


class Generations:
    """Reports by the WebUI's task, the newest last."""

    def __init__(self) -> None:
        self._tasks: OrderedDict[str, Started | GenerationReport] = OrderedDict()
        self.last: GenerationReport | None = None

    def begin(self, p: Any) -> None:
        """A generation begins; a nested one (of another extension) belongs to its own task's report, too."""
        active = installation.active()
        if active is None:
            return
        p.precision_lora_started = started = Started(active.record.present.number, active.peak_meter())
        task = current_task()
        for other, entry in self._tasks.items():
            if isinstance(entry, Started) and other != task:
                self._tasks[other] = self.last = unfinished(active, entry)
        if not isinstance(self._tasks.get(task), Started):
            self._keep(task, started)

    def end(self, p: Any, low_bits: str | None = None, finished: bool = True) -> GenerationReport | None:
        """The report of a generation at its end; finished: False where the user has interrupted it, perhaps
        before it came to its LoRAs."""
        active, started = installation.active(), getattr(p, "precision_lora_started", None)
        if active is None or started is None:
            return None
        if finished:
            self.last = make_report(active, started, active.record.since(started.number), low_bits)
        else:
            self.last = dataclasses.replace(unfinished(active, started), low_bits=low_bits)
        self._keep(current_task(), self.last)
        p.precision_lora_started = None
        return self.last

    def abandon(self, p: Any) -> None:
        """A generation is over, whatever ended it: one that has not come to its `end` has failed."""
        self.end(p, finished=False)

    def html(self, task: str) -> str:
        """For the page that had this task done; nothing where it is not known (any more)."""
        report, active = self._tasks.get(task), installation.active()
        if isinstance(report, Started):
            report = None if active is None else unfinished(active, report)
        return "" if report is None or not (report.files or report.problems) else applied_html(report)

    def _keep(self, task: str, entry: Started | GenerationReport) -> None:
        self._tasks[task] = entry
        self._tasks.move_to_end(task)
        while len(self._tasks) > KEPT_TASKS:
            self._tasks.popitem(last=False)


GENERATIONS = Generations()
"""Of this server."""


def current_task() -> str:
    """The WebUI's name for what it is doing; the page that has asked for it knows it, too."""
    from modules import progress

    return str(progress.current_task)


def unfinished(active: Any, started: Started) -> GenerationReport:
    """As far as a generation came that ended before its time."""
    passes = [done for done in active.record.since(started.number) if done.number > started.number]
    return dataclasses.replace(make_report(active, started, passes), finished=False)


def make_report(
    active: Any, started: Started, passes: list[Pass], low_bits: str | None = None
) -> GenerationReport:
    """What these passes have done; equal files of several passes are one."""
    memory = getattr(active, "memory_report", None)
    last = passes[-1] if passes else Pass(0, "", "")
    model = diffusion_model()
    # the pass that is in effect, if it is this generation's: those before it are no longer measured
    measured = started.number < last.number == active.record.present.number
    step = step_time(active, model) if measured else None
    return GenerationReport(
        files=tuple(dict.fromkeys(file for done in passes for file in done.reports())),
        patcher=last.patcher,
        compute=COMPUTE_NAMES.get(last.compute, last.compute),
        text_encoders=last.text_encoders,
        low_bits=low_bits,
        stored=stored_kinds(model),
        products=products(active.host, model),
        planned_bytes=getattr(memory, "factor_bytes", None),
        measured_bytes=getattr(memory, "measured_bytes", None),
        streamed_bytes=getattr(memory, "streamed_bytes", None),
        extra_bytes=getattr(memory, "extra_bytes", None),
        peak_bytes=started.peak.read(),
        attach_seconds=sum(done.seconds for done in passes),
        step_seconds=None if step is None else step.whole,
        overhead_seconds=None if step is None else step.branches,
        problems=tuple(dict.fromkeys(problem for done in passes for problem in done.problems)),
    )


def diffusion_model() -> nn.Module | None:
    """The one that is loaded."""
    from modules import sd_models

    engine = sd_models.model_data.get_sd_model()
    unet = getattr(getattr(engine, "forge_objects", None), "unet", None)
    model = getattr(unet, "model", None)
    return model if isinstance(model, nn.Module) else None


def step_time(active: Any, model: nn.Module | None) -> StepTime | None:
    """Of a forward of this model since the prompt's LoRAs were set; None where none was measured."""
    session = None if model is None else active.sessions().get(model)
    return None if session is None else session.overhead.read()


def stored_kinds(model: nn.Module | None) -> Mapping[str, int]:
    """How the weights with two dimensions or more lie in memory: kind → number, most first."""
    kinds: Counter[str] = Counter()
    for module in model.modules() if model is not None else ():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            try:
                stored = stored_weight(weight, module)
            except StorageError:
                continue
            if len(stored.shape) > 1:
                kinds[stored.kind] += 1
    return dict(kinds.most_common())


def products(host: Any, model: nn.Module | None) -> Mapping[str, int]:
    """How layers that can multiply in two ways do so: "quantized" or "dequantized" → number, most first."""
    ways = (host.quantized_product(module) for module in (model.modules() if model is not None else ()))
    names = Counter("quantized" if way else "dequantized" for way in ways if way is not None)
    return dict(names.most_common())


def log_report(report: GenerationReport) -> None:
    """One line more than each file's own: how many, in which mode, at which cost."""
    if report.patcher == "WebUI" or not report.files:
        return
    memory = "".join(
        f", {mebibytes(nbytes)} of LoRA factors on the device {name}"
        for name, nbytes in (("predicted", report.planned_bytes), ("measured", report.measured_bytes))
        if nbytes is not None
    )
    if report.streamed_bytes:
        memory += f", {mebibytes(report.streamed_bytes)} streamed from RAM"
    if report.peak_bytes is not None:
        memory += f", {mebibytes(report.peak_bytes)} at most in use on the card, all included"
    step = ""
    if report.step_seconds is not None and report.overhead_seconds is not None:
        step = f", {duration(report.step_seconds)} per model pass, of them "
        step += part_of(report.overhead_seconds, report.step_seconds) + " for LoRAs"
    logger.info(
        "%d of %d LoRAs applied: compute mode %s, %s to attach%s%s",
        len(report.applied),
        len(report.files),
        report.compute,
        duration(report.attach_seconds),
        step,
        memory,
    )
    for file in report.applied:
        for strengths, where in ((file.unet_strengths, "model"), (file.text_strengths, "text encoder")):
            if strengths:
                logger.info(
                    "LoRA %s: layers of the %s have strengths of %g to %g, as another extension has set them",
                    file.name,
                    where,
                    strengths[0],
                    strengths[-1],
                )
