"""A generation with its report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lib_precision_lora.host.generation.generations import Generations
from lib_precision_lora.host.generation.report import GenerationReport
from tests.host.images import Image, generate
from tests.host.webui import Host


def reported(host: Host, prompt: str, **options: Any) -> tuple[GenerationReport, Image]:
    """The image, and what is reported of it."""
    generations, p = Generations(), SimpleNamespace()
    generations.begin(p)
    image = generate(host, prompt, **options)
    report = generations.end(p, "Automatic")
    assert report is not None
    return report, image


def report_of(host: Host, prompt: str, **options: Any) -> GenerationReport:
    return reported(host, prompt, **options)[0]
