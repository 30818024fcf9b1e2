"""The command line: `python -m lib_precision_lora demo | inspect | plan`.

Exit codes: 0 fine, 1 findings, 2 bad input. Reports go to the standard output, errors to the standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lib_precision_lora import __version__
from lib_precision_lora.plain_text import plain, plain_json

FINE, FINDINGS, BAD_INPUT = 0, 1, 2
SMALLEST, LARGEST, STEP = 256, 4096, 256
LARGEST_COUNT = 4096


class BadInputError(ValueError):
    """What the user gave cannot be worked with; one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; argparse itself exits with 2 for unknown arguments."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except BadInputError as error:
        if options.json:
            write_json({"error": str(error)})
        sys.stderr.write(f"{plain(error)}\n")
        return BAD_INPUT
    return code


class Parser(argparse.ArgumentParser):
    """Its errors quote arguments, which a shell may have made of the names of files."""

    def error(self, message: str) -> NoReturn:
        super().error(plain(message))


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="python -m lib_precision_lora",
        description="LoRAs computed exactly beside an untouched low-bit base.",
        epilog="Exit codes: 0 fine, 1 findings, 2 bad input.",
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="measure a LoRA beside, and merged into, checkpoints of six stored weights",
        description="Writes a small random transformer to disk as NF4, FP8, Q8_0, Q4_0, Q4_K and bf16, and "
        "a LoRA for it; measures the LoRA beside each, and merged into each by a model of what stock Forge "
        "does. Needs no GPU and no Forge, but the packages gguf and bitsandbytes.",
    )
    demo.add_argument("--json", action="store_true", help="the result as one JSON object")
    demo.add_argument(
        "--size",
        type=int,
        default=512,
        metavar="WIDTH",
        help=f"hidden width, a multiple of {STEP} from {SMALLEST} to {LARGEST} (default: 512)",
    )
    demo.add_argument(
        "--compute", choices=("auto", "fp16", "fp32"), default="auto", help="compute mode (default: auto)"
    )
    demo.add_argument("--chart", type=Path, metavar="PATH", help="also draw the errors, as .png or .svg")
    demo.set_defaults(run=run_demo_command)

    inspect = commands.add_parser(
        "inspect",
        help="list what a LoRA file holds, and what is wrong with it",
        description="Lists layout, kinds, ranks, alphas, layers and keys that are not understood. Findings "
        "(NaN or inf, rank zero, half a LoRA, no LoRA at all) give exit code 1.",
    )
    inspect.add_argument("lora", type=Path, metavar="LORA", help="as .safetensors, .pt, .ckpt or .bin")
    inspect.add_argument("--json", action="store_true", help="the result as one JSON object")
    inspect.set_defaults(run=run_inspect_command)
    add_plan_parser(commands)
    return top


def add_plan_parser(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="say whether a checkpoint and LoRAs fit a card, from the files' headers alone",
        description="Reads no weights and needs no GPU: says what checkpoint, LoRAs and generation take of a "
        "card, and whether it runs with everything on the card, with LoRAs streamed, or with a part of the "
        "model in RAM. What does not run gives exit code 1. Amounts: 12GiB, 12GB, 12288MiB or bytes.",
    )
    plan.add_argument("model", type=Path, metavar="MODEL", help="a .safetensors or .gguf checkpoint")
    plan.add_argument("loras", type=Path, nargs="*", metavar="LORA", help="LoRAs, as .safetensors")
    plan.add_argument("--card", required=True, metavar="AMOUNT", help="memory of the card")
    plan.add_argument("--free", metavar="AMOUNT", help="what of it is free (default: all but 512MiB)")
    plan.add_argument("--size", default="1024x1024", metavar="WxH", help="of the image (default: 1024x1024)")
    plan.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (default: 1)")
    plan.add_argument(
        "--storage",
        choices=("as-is", "nf4", "fp4", "fp8", "fp16", "bf16"),
        default="as-is",
        help="'Diffusion in Low Bits' (default: as-is, the host's Automatic)",
    )
    plan.add_argument(
        "--compute", choices=("auto", "fp16", "fp32"), default="auto", help="compute mode (default: auto)"
    )
    plan.add_argument("--cfg", type=float, metavar="SCALE", help="guidance scale; 1 halves the tokens")
    plan.add_argument(
        "--text-tokens", type=int, metavar="N", help="of the prompt (default: as the host pads)"
    )
    plan.add_argument("--margin", default="0", metavar="AMOUNT", help="memory to leave unused (default: 0)")
    plan.add_argument("--inference", metavar="AMOUNT", help="for the generation itself (default: as Forge)")
    plan.add_argument("--json", action="store_true", help="the result as one JSON object")
    plan.set_defaults(run=run_plan_command)


def run_demo_command(options: argparse.Namespace) -> int:
    if not SMALLEST <= options.size <= LARGEST or options.size % STEP:
        raise BadInputError(
            f"--size {options.size}: the hidden width must be a multiple of {STEP} "
            f"from {SMALLEST} to {LARGEST}."
        )
    # These packages are the demo's own: without them, every other command works.
    try:
        from lib_precision_lora.report.demo import DemoShape, run_demo
    except ImportError as error:
        raise BadInputError(
            f"The demo needs the Python package {error.name}, which cannot be imported ({error}); "
            "install it with: pip install gguf bitsandbytes, or run: make demo."
        ) from error
    from lib_precision_lora.report.demo.chart import write_chart
    from lib_precision_lora.report.demo.table import demo_text

    if options.chart is not None:
        check_chart_path(options.chart)
    result = run_demo(DemoShape(hidden=options.size), options.compute)
    if options.chart is not None:
        write_chart(result, options.chart)
    if options.json:
        write_json(result.as_object())
    else:
        sys.stdout.write(demo_text(result))
    return FINDINGS if result.findings else FINE


def check_chart_path(path: Path) -> None:
    """Raises BadInputError before anything is measured, where the chart could not be written afterwards."""
    from lib_precision_lora.report.demo.chart import CHART_SUFFIXES, MissingMatplotlibError, figure_class

    if path.suffix.lower() not in CHART_SUFFIXES:
        raise BadInputError(f"--chart {path}: the ending must be one of {', '.join(CHART_SUFFIXES)}.")
    if not path.parent.is_dir():
        raise BadInputError(f"--chart {path}: there is no folder {path.parent}; make it first.")
    try:
        figure_class()
    except MissingMatplotlibError as error:
        raise BadInputError(str(error)) from error


def run_inspect_command(options: argparse.Namespace) -> int:
    from lib_precision_lora.report.inspect_file import UnreadableFileError, inspect_file
    from lib_precision_lora.report.inspect_text import inspection_text

    try:
        inspection = inspect_file(options.lora)
    except UnreadableFileError as error:
        raise BadInputError(str(error)) from error
    if options.json:
        write_json(inspection.as_object())
    else:
        sys.stdout.write(inspection_text(inspection))
    return FINDINGS if inspection.findings else FINE


def run_plan_command(options: argparse.Namespace) -> int:
    from lib_precision_lora.memory.headers import HeaderError
    from lib_precision_lora.memory.held import StorageChoiceError
    from lib_precision_lora.report.amounts import AmountError, parse_bytes, parse_size
    from lib_precision_lora.report.plan_report import Wish, make_plan
    from lib_precision_lora.report.plan_text import plan_text, shows_blocks

    for name, number in (("--batch", options.batch), ("--text-tokens", options.text_tokens)):
        if number is not None and not 1 <= number <= LARGEST_COUNT:
            raise BadInputError(f"{name} {number}: the number must be from 1 to {LARGEST_COUNT}.")
    if options.cfg is not None and not 0 <= options.cfg <= LARGEST_COUNT:
        raise BadInputError(f"--cfg {options.cfg:g}: the scale must be from 0 to {LARGEST_COUNT}.")
    try:
        width, height = parse_size(options.size, "--size")
        wish = Wish(
            model=options.model,
            loras=tuple(options.loras),
            card_bytes=parse_bytes(options.card, "--card", least=1),
            width=width,
            height=height,
            batch=options.batch,
            storage=options.storage,
            compute=options.compute,
            margin_bytes=parse_bytes(options.margin, "--margin"),
            free_bytes=None if options.free is None else parse_bytes(options.free, "--free"),
            inference_bytes=None
            if options.inference is None
            else parse_bytes(options.inference, "--inference"),
            text_tokens=options.text_tokens,
            cfg=options.cfg,
        )
        report = make_plan(wish)
    except StorageChoiceError as error:
        raise BadInputError(f"{options.model}: {error}.") from error
    except (AmountError, HeaderError) as error:
        raise BadInputError(str(error)) from error
    if options.json:
        write_json(report.as_object())
    else:
        sys.stdout.write(plan_text(report, shows_blocks(sys.stdout.encoding)))
    return FINE if report.fits else FINDINGS


def write_json(value: dict[str, Any]) -> None:
    sys.stdout.write(plain_json(value) + "\n")
