"""What a generation asks for: arguments, axes of a plot, and parameters that are pasted."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import lib_precision_lora.host.generation as generation_package
from lib_precision_lora import __version__
from lib_precision_lora.host import installation
from lib_precision_lora.host.generation import infotext
from lib_precision_lora.host.generation.infotext import (
    LOW_BITS,
    MARK,
    MODE,
    MODES,
    VERSION,
    Pasted,
    read_parameters,
)
from lib_precision_lora.host.page import script, xyz
from lib_precision_lora.host.page.arguments import problems, wanted
from lib_precision_lora.ui.choices import AS_SET, COMPUTE_CHOICES, OURS, PATCHERS, STOCK_MERGE

CHOICES = (AS_SET, "Automatic", "bnb-nf4", "float8-e4m3fn")


@pytest.fixture
def _low_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A WebUI that the binding knows, with these choices."""
    monkeypatch.setattr(installation, "active", object)
    override = SimpleNamespace(low_bits_choices=lambda: list(CHOICES))
    monkeypatch.setattr(generation_package, "override", override, raising=False)


def test_every_choice_of_the_page_is_an_argument() -> None:
    for low_bits in CHOICES:
        for compute in COMPUTE_CHOICES:
            assert problems([True, low_bits, compute], CHOICES) == []
            for patcher in PATCHERS:
                assert problems([False, low_bits, compute, patcher], CHOICES) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [True],
        [True, AS_SET],
        [True, AS_SET, AS_SET, OURS, None],
        [1, AS_SET, AS_SET],
        ["true", AS_SET, AS_SET],
        [None, AS_SET, AS_SET],
        [True, ["bnb-nf4"], AS_SET],
        [True, AS_SET, 16.0],
        [True, AS_SET, {}],
        [True, AS_SET, AS_SET, None],
    ],
)
def test_anything_else_is_a_sentence_and_then_counts_for_nothing(arguments: list[Any]) -> None:
    (sentence,) = problems(arguments, CHOICES)
    assert sentence.startswith("Precision LoRA")
    assert len(sentence) < 250
    assert wanted(arguments, {}, CHOICES) == ({}, [sentence])


@pytest.mark.parametrize(
    ("low_bits", "compute", "patcher"),
    [
        ("nf4", AS_SET, OURS),
        (AS_SET, "FP16", OURS),
        (AS_SET, "fp16", "Precision"),
        ("x" * 10_000, "fp16", OURS),
    ],
)
def test_a_choice_that_is_not_there_is_refused_in_a_request_and_left_out_alone_where_a_page_sends_it(
    low_bits: str, compute: str, patcher: str
) -> None:
    """A page that is open since before an update; who leaves it out, and says so, is `override.offered`."""
    (sentence,) = problems([True, low_bits, compute, patcher], CHOICES)
    assert sentence.startswith("Precision LoRA")
    assert len(sentence) < 250
    passed_on = {"low_bits": low_bits, "compute": compute, "patcher": patcher}
    assert wanted([True, low_bits, compute, patcher], {}, CHOICES) == (passed_on, [])
    assert wanted([False, low_bits, compute, patcher], {}, CHOICES) == ({}, []), "a closed accordion"


def test_every_wrong_argument_is_named() -> None:
    assert len(problems(["yes", "nf5", "fp64", "nobody"], CHOICES)) == 4


def test_what_is_wanted_is_what_the_open_accordion_says_and_a_plot_before_it() -> None:
    chosen = {"low_bits": "bnb-nf4", "compute": "fp16", "patcher": OURS}
    assert wanted([True, "bnb-nf4", "fp16"], {}, CHOICES) == (chosen, [])
    assert wanted([True, "bnb-nf4", "fp16", OURS], {"compute": "fp32"}, CHOICES) == (
        {**chosen, "compute": "fp32"},
        [],
    )
    assert wanted([False, "bnb-nf4", "fp16", STOCK_MERGE], {}, CHOICES) == ({}, [])
    assert wanted([False, "bnb-nf4", "fp16"], {"compute": "fp32"}, CHOICES) == ({"compute": "fp32"}, [])
    assert wanted([], {}, CHOICES) == ({}, []), "another extension's generation has none"


def test_only_our_mark_and_what_is_not_the_default_is_written() -> None:
    assert infotext.parameters("Automatic", AS_SET, False) == {}
    assert infotext.parameters("Automatic", AS_SET, True) == {"Precision LoRA": __version__}
    assert infotext.parameters("fp16", AS_SET, True) == {MARK: __version__, MODE: "fp16"}
    assert infotext.parameters("Automatic", "bnb-nf4", False) == {LOW_BITS: "bnb-nf4", VERSION: __version__}
    assert infotext.parameters(STOCK_MERGE, AS_SET, False) == {MODE: STOCK_MERGE, VERSION: __version__}


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("low_bits", CHOICES)
def test_what_is_written_is_read_as_the_choices_that_make_it_again(
    mode: str, low_bits: str, ours: bool
) -> None:
    written = infotext.parameters(mode, low_bits, ours)
    assert list(written.values()).count(__version__) == (1 if written else 0)
    read = read_parameters(written, CHOICES)
    assert read.problems == ()
    assert read.enabled == bool(written.keys() - {MARK})
    fields, wrong = wanted([read.enabled, read.low_bits, read.compute, read.patcher], {}, CHOICES)
    assert wrong == []
    assert fields.get("low_bits", AS_SET) == low_bits
    again = fields.get("patcher", OURS)
    if again == OURS:
        again = fields.get("compute", AS_SET)
    assert again == mode or (mode == "Automatic" and again == AS_SET)


@pytest.mark.parametrize(
    ("values", "expected", "named"),
    [
        ({}, Pasted(), []),
        ({"Steps": "20", "Precision LoRA skipped": "cats"}, Pasted(), []),
        ({MODE: "fp99", LOW_BITS: "bnb-nf4"}, Pasted(True, "bnb-nf4"), ["fp99"]),
        ({MODE: "fp32", LOW_BITS: "bnb-nf2"}, Pasted(True, compute="fp32"), ["bnb-nf2"]),
        ({MODE: "", LOW_BITS: ""}, Pasted(), [MODE, LOW_BITS]),
        ({MODE: None, LOW_BITS: 7}, Pasted(), ["None", "7"]),
        ({"Precision LoRA skipped-1": "512", "Precision LoRA skipped-2": "768"}, Pasted(), []),
        ({VERSION: "99.0"}, Pasted(), []),
        ({MARK: __version__}, Pasted(), []),
        ({MARK: "99.0"}, Pasted(), []),
        ({MARK: ""}, Pasted(), []),
        ({MARK: "8.8", "Precision LoRA colour": "blue"}, Pasted(), ["8.8"]),
        (
            {MODE: "fp16", VERSION: "9.9", "Precision LoRA colour": "blue"},
            Pasted(True, compute="fp16"),
            ["9.9"],
        ),
        ({"Precision LoRA colour": "blue"}, Pasted(), ["version unknown"]),
    ],
)
def test_the_valid_part_is_read_and_a_sentence_names_the_rest(
    values: dict[str, Any], expected: Pasted, named: list[str]
) -> None:
    read = read_parameters(values, CHOICES)
    assert (read.enabled, read.low_bits, read.compute, read.patcher) == (
        expected.enabled,
        expected.low_bits,
        expected.compute,
        expected.patcher,
    )
    assert len(read.problems) == len(named)
    assert all(name in problem for name, problem in zip(named, read.problems, strict=True))


@pytest.mark.usefixtures("_low_bits")
def test_each_control_is_pasted_its_own_value() -> None:
    values = {MODE: STOCK_MERGE, LOW_BITS: "bnb-nf4"}
    assert [field(values) for field in infotext.FIELDS] == [True, "bnb-nf4", AS_SET, STOCK_MERGE]
    assert [field({}) for field in infotext.FIELDS] == [False, AS_SET, AS_SET, OURS]


@pytest.mark.usefixtures("_low_bits")
def test_a_paste_warns_once_of_each_part_that_was_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    gradio = ModuleType("gradio")
    gradio.Warning = said.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    infotext.warn_of_what_is_not_pasted("", {MODE: "fp99", LOW_BITS: "bnb-nf4"})
    assert len(said) == 1
    assert "fp99" in said[0]
    infotext.warn_of_what_is_not_pasted("", {MODE: "fp16"})
    assert len(said) == 1


class AxisOption:
    """As the host's plot has it."""

    def __init__(self, label: str, kind: Any, apply: Any, **options: Any) -> None:
        self.label, self.kind, self.apply = label, kind, apply
        self.options = options


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch, _low_bits: None) -> list[AxisOption]:
    """The plot's list of axes, with ours in it."""
    plot = SimpleNamespace(AxisOption=AxisOption, axis_options=[AxisOption("Seed", int, None)])
    others = SimpleNamespace(axis_options=None)
    scripts = ModuleType("modules.scripts")
    scripts.scripts_data = [  # type: ignore[attr-defined]
        SimpleNamespace(module=others),
        SimpleNamespace(module=plot),
    ]
    modules = ModuleType("modules")
    modules.scripts = scripts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "modules.scripts", scripts)
    for _ in range(2):  # the page is built anew on "Reload UI"
        xyz.add_axes()
    return plot.axis_options


def test_in_a_webui_that_the_binding_does_not_know_nothing_is_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is anything of it imported, which may be missing."""
    monkeypatch.setattr(installation, "active", lambda: None)
    monkeypatch.setitem(sys.modules, "modules", None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    p = SimpleNamespace(extra_generation_params={})
    xyz.add_axes()
    infotext.warn_of_what_is_not_pasted("", {MODE: "fp99"})
    assert script.make_ui(SimpleNamespace(is_img2img=False)) is None
    script.request_override(p, (True, "bnb-nf4", "fp16"))
    script.write_parameters(p)
    script.report(p)
    assert vars(p) == {"extra_generation_params": {}}


def test_the_plot_has_our_axes_once(axes: list[AxisOption]) -> None:
    assert [axis.label for axis in axes] == ["Seed", "[Precision LoRA] mode", "[Precision LoRA] low bits"]
    assert axes[1].options["choices"]() == list(MODES)
    assert axes[2].options["choices"]() == list(CHOICES)
    assert 1.0 > axes[2].options["cost"] > axes[1].options["cost"] > 0, "reloads must be the outer loop"


def test_a_cell_of_a_plot_asks_for_its_values_and_leaves_the_others_alone(axes: list[AxisOption]) -> None:
    whole = SimpleNamespace()
    cells = []
    for mode in MODES:
        cell = SimpleNamespace(**vars(whole))
        axes[1].apply(cell, mode, list(MODES))
        axes[2].apply(cell, "bnb-nf4", ["bnb-nf4"])
        cells.append(wanted([], getattr(cell, xyz.AXES), CHOICES)[0])
    assert vars(whole) == {}
    assert {cell["low_bits"] for cell in cells} == {"bnb-nf4"}
    modes = [cell["compute"] if cell["patcher"] == OURS else cell["patcher"] for cell in cells]
    assert tuple(modes) == MODES


def test_a_plot_with_an_unknown_value_is_refused_before_its_first_image(axes: list[AxisOption]) -> None:
    axes[1].options["confirm"](None, ["fp16", STOCK_MERGE])
    with pytest.raises(RuntimeError, match="fp99 is none of"):
        axes[1].options["confirm"](None, ["fp16", "fp99"])
