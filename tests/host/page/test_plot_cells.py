"""The cells of a plot are copies of one processing object, which share what they hold."""

from __future__ import annotations

from copy import copy
from typing import Any

from lib_precision_lora import __version__
from lib_precision_lora.host.generation.infotext import LOW_BITS, MARK, MODE, MODES, VERSION
from lib_precision_lora.host.generation.notices import INFOTEXT_SKIPPED
from lib_precision_lora.host.generation.override import Override, low_bits_choices
from lib_precision_lora.host.page import script, xyz
from lib_precision_lora.ui.choices import AS_SET
from tests.host.jobs import FP8, BeforeProcess, Jobs
from tests.host.lora_files import make_lora


class Accordion(BeforeProcess):
    """Our script with a closed accordion."""

    def __init__(self) -> None:
        super().__init__(Override())

    def before_process(self, p: Any) -> None:
        script.request_override(p, (False, AS_SET, AS_SET))


def write(p: Any) -> None:
    """As our script does while a generation is sampled."""
    script.show_notices(p)
    script.write_parameters(p)


def cells(jobs: Jobs, *choices: tuple[str, str, str]) -> list[Any]:
    """A cell for each prompt, mode and storage, made one after the other."""
    whole = jobs.new(during=write)
    whole.scripts = Accordion()
    whole.extra_generation_params["Another extension"] = "its value"
    done = []
    for prompt, mode, low_bits in choices:
        cell = copy(whole)
        cell.prompt = prompt
        xyz.choose("mode")(cell, mode, list(MODES))
        xyz.choose("low_bits")(cell, low_bits, low_bits_choices())
        jobs.host.processing.process_images(cell)
        done.append(cell)
    return done


def test_no_cell_has_parameters_of_another(jobs: Jobs) -> None:
    make_lora("cats").write(jobs.host)
    text, low = "<lora:cats:1>", "float8-e4m3fn"
    made = cells(
        jobs,
        (text, "fp16", low),
        (text, "Automatic", low),
        ("<lora:nobody:1>", "fp32", AS_SET),
        (text, "Automatic", AS_SET),
    )
    names = (MARK, MODE, LOW_BITS, INFOTEXT_SKIPPED, "Another extension")
    assert [[cell.extra_generation_params.get(name) for name in names] for cell in made[1:]] == [
        [__version__, None, low, None, "its value"],
        [None, None, None, "nobody", "its value"],
        [__version__, None, None, None, "its value"],
    ]
    assert not any(VERSION in cell.extra_generation_params for cell in made)
    assert made[0].extra_generation_params[MODE] == "fp16", "a later cell has changed it"


def test_each_storage_type_is_loaded_once_where_it_is_the_outer_axis(jobs: Jobs) -> None:
    low = ("float8-e4m3fn", "float8-e4m3fn (fp16 LoRA)", "Automatic", "float8-e5m2")
    cells(jobs, *(("a cat", mode, low_bits) for low_bits in low for mode in ("Automatic", "fp32")))
    assert [str(storage) for _, storage in jobs.loads] == [str(FP8), "None", "torch.float8_e5m2"]
    jobs.run()
    assert [storage for _, storage in jobs.loads[3:]] == [None]
