"""`plan`: exit codes and streams, from headers alone, in less than two seconds and without torch."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lib_precision_lora.cli import main
from tests.memory.checkpoints import (
    MODEL,
    Shapes,
    as_nf4,
    clip_l,
    flux,
    sdxl_unet,
    stored_as,
    write_gguf_hole,
    write_hole,
)

GIB = 2**30
FLUX_PARAMETERS = 11_901_408_320


def kohya(
    shapes: Shapes, rank: int, prefix: str = "lora_unet_", stored: str = "BF16"
) -> dict[str, tuple[str, tuple[int, ...]]]:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and name.endswith(".weight") and "embedding" not in name:
            layer = prefix + name.removesuffix(".weight").replace(".", "_")
            tensors[f"{layer}.lora_down.weight"] = (stored, (rank, shape[1]))
            tensors[f"{layer}.lora_up.weight"] = (stored, (shape[0], rank))
            tensors[f"{layer}.alpha"] = ("F32", ())
    return tensors


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    whole = stored_as("F8_E4M3", flux(), MODEL) | stored_as(
        "F16", clip_l(), "text_encoders.clip_l.transformer."
    )
    packed, states = as_nf4(flux())
    return {
        "flux": write_hole(folder / "flux.safetensors", whole),
        "gguf": write_gguf_hole(folder / "flux.gguf", flux()),
        "nf4": write_hole(folder / "nf4.safetensors", packed, states),
        "sdxl": write_hole(folder / "sdxl.safetensors", stored_as("F16", sdxl_unet(), MODEL)),
        "lora": write_hole(folder / "lora.safetensors", kohya(flux(), 16)),
        "sdxl lora": write_hole(
            folder / "sdxl-lora.safetensors", kohya(sdxl_unet(), 32) | kohya(clip_l(), 8, "lora_te1_")
        ),
        "large lora": write_hole(folder / "large.safetensors", kohya(flux(), 1024)),
    }


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main(["plan", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    return code, json.loads(out)


@pytest.mark.parametrize("model", ["flux", "gguf"])
def test_twelve_gigabytes_are_planned_in_two_seconds_and_without_torch(
    files: dict[str, Path], model: str
) -> None:
    assert files[model].stat().st_size > 12 * 10**9
    code = (
        "import sys\n"
        "from lib_precision_lora.cli import main\n"
        f"code = main(['plan', {str(files[model])!r}, {str(files['lora'])!r}, '--card', '24GiB'])\n"
        "assert not {'torch', 'numpy', 'gguf', 'safetensors'} & sys.modules.keys(), 'imported'\n"
        "sys.exit(code)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Fits: the LoRAs stay on the card" in done.stdout
    # Time of the processor, which a busy machine does not stretch.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_json_is_one_object_with_every_number_of_the_budget(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = plan(capsys, files["flux"], files["lora"], "--card", "24GiB", "--margin", "128MiB")
    assert code == 0
    assert report.keys() == {"fits", "verdict", "model", "loras", "request", "budget", "plan", "notes"}
    assert report["fits"] is True
    assert report["model"]["architecture"] == "Flux dev"
    components = {row["name"]: row for row in report["model"]["components"]}
    assert components["diffusion model"]["parameters"] == FLUX_PARAMETERS
    assert components["CLIP-L"]["held_bytes"] is None
    low_rank = 2 * 16 * sum(sum(shape) for shape in flux().values() if len(shape) == 2)
    layers = sum(len(shape) == 2 for shape in flux().values())
    assert report["budget"] == {
        "base_bytes": FLUX_PARAMETERS,
        "factor_bytes": low_rank + layers * (4 * 16 + 4),
        "workspace_bytes": report["budget"]["workspace_bytes"],
        "inference_bytes": int(1.28 * 2 * 128 * 128 * 2 * 16384),
        "margin_bytes": 128 * 2**20,
        "free_bytes": 24 * GIB - GIB // 2,
        "total_bytes": 24 * GIB,
        "inference_is_the_hosts_estimate": True,
    }
    assert 2**20 < report["budget"]["workspace_bytes"] <= 48 * 2**20
    assert {"placement", "peak_bytes", "reserve_bytes", "advice"} <= report["plan"].keys()
    assert report["plan"]["placement"] == "resident"
    (row,) = report["loras"]
    assert (row["layers"], row["kinds"], row["ranks"]) == (layers, {"lora": layers}, {"16": layers})
    assert report["notes"] == []


@pytest.mark.parametrize(
    ("model", "lora", "arguments", "code", "verdict"),
    [
        ("flux", "lora", ["--card", "24GiB"], 0, "Fits: "),
        ("flux", "lora", ["--card", "12GiB"], 0, "Runs, slower: "),
        ("nf4", "lora", ["--card", "12GiB"], 0, "Fits: "),
        ("nf4", "large lora", ["--card", "8GiB"], 0, "Runs, slower: "),
        ("sdxl", "sdxl lora", ["--card", "8GB"], 0, "Fits: "),
        ("sdxl", "sdxl lora", ["--card", "8GB", "--batch", "8"], 1, "Does not fit: "),
        ("nf4", "lora", ["--card", "2GiB", "--free", "1GiB"], 1, "Does not fit: "),
        ("nf4", "lora", ["--card", "2GiB", "--free", "1GiB", "--inference", "256MiB"], 0, "Runs, slower: "),
        ("nf4", None, ["--card", "1GiB", "--inference", "2GiB"], 1, ""),
        ("gguf", "lora", ["--card", "16GiB"], 0, "Fits: "),
        ("nf4", None, ["--card", "24GiB"], 0, "Fits: there are no LoRAs"),
    ],
)
def test_the_exit_code_says_whether_it_runs(
    files: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    model: str,
    lora: str | None,
    arguments: list[str],
    code: int,
    verdict: str,
) -> None:
    loras = [] if lora is None else [files[lora]]
    found, report = plan(capsys, files[model], *loras, *arguments)
    assert (found, report["fits"]) == (code, code == 0)
    assert report["verdict"].startswith(verdict)
    assert main(["plan", str(files[model]), *map(str, loras), *arguments]) == code
    out = capsys.readouterr().out
    assert report["verdict"] in out
    assert all(advice in out for advice in report["plan"]["advice"])


@pytest.mark.parametrize(
    ("amount", "size"), [("12GiB", 12 * GIB), ("12gb", 12 * 10**9), ("12288MiB", 12 * GIB)]
)
def test_amounts_are_read_in_every_unit(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], amount: str, size: int
) -> None:
    for text in (amount, str(size), f"{size / 1024}KiB"):
        assert plan(capsys, files["nf4"], "--card", text)[1]["budget"]["total_bytes"] == size


def test_storage_guidance_and_text_change_what_is_planned(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def report(*arguments: str) -> dict[str, Any]:
        return plan(capsys, files["flux"], files["lora"], "--card", "24GiB", *arguments)[1]

    assert report("--storage", "fp16")["budget"]["base_bytes"] == 2 * FLUX_PARAMETERS
    assert report("--storage", "nf4")["budget"]["base_bytes"] < 0.6 * FLUX_PARAMETERS
    assert [report("--cfg", scale)["request"]["images"] for scale in ("1", "3.5")] == [1, 2]
    assert report("--batch", "3", "--cfg", "2")["request"]["images"] == 6
    assert report("--text-tokens", "512")["request"]["text_tokens"] == 512
    wide, narrow = (report("--compute", compute)["budget"]["factor_bytes"] for compute in ("auto", "fp16"))
    layers = sum(len(shape) == 2 for shape in flux().values())
    assert narrow - wide == layers * (4 * 16 - 4)  # a bf16 file takes two bytes either way


def test_what_files_of_two_types_take_more_together_is_told_apart(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_hole(files["lora"].with_name("fp16.safetensors"), kohya(flux(), 16, stored="F16"))
    widened = "of it because LoRAs that share layers take the widest type"
    for compute, beside, more in (
        ("auto", other, True),
        ("auto", files["lora"], False),
        ("fp16", other, False),
    ):
        arguments = [files["nf4"], files["lora"], beside, "--card", "24GiB", "--compute", compute]
        _, report = plan(capsys, *arguments)
        alone = sum(row["card_bytes"] for row in report["loras"])
        shapes = [shape for shape in flux().values() if len(shape) == 2]
        together = report["budget"]["factor_bytes"] - alone
        assert together == (2 * 16 * sum(map(sum, shapes)) if more else 0) - 4 * len(shapes) * (
            compute == "auto"
        )
        assert main(["plan", *map(str, arguments)]) == 0
        assert (widened in capsys.readouterr().out) == more


def test_a_lora_of_another_model_is_noted(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, report = plan(capsys, files["flux"], files["sdxl lora"], "--card", "24GiB")
    (note,) = report["notes"]
    assert "none of its" in note
    assert "known by name in Flux dev" in note
    wrong = files["lora"].with_name("wrong.safetensors")
    write_hole(wrong, kohya({"double_blocks.0.img_attn.qkv.weight": (640, 320)}, 4))
    _, report = plan(capsys, files["flux"], wrong, "--card", "24GiB")
    (note,) = report["notes"]
    assert "1 layers have another shape than Flux dev's" in note


@pytest.mark.parametrize("amount", ["0", "-1GiB", "twelve", "12Gi", "", "1e9", "99999999999GiB", "٣GiB"])
def test_a_bad_amount_exits_with_2_and_one_sentence(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], amount: str
) -> None:
    code = main(["plan", str(files["nf4"]), f"--card={amount}"])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"--card {amount}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "1024"], "--size 1024: give width and height"),
        (["--size", "0x512"], "each side must be from 8"),
        (["--size", "1024x99999999"], "each side must be from 8"),
        (["--batch", "0"], "--batch 0: the number must be from 1"),
        (["--text-tokens", "0"], "--text-tokens 0"),
        (["--cfg", "nan"], "--cfg nan"),
        (["--margin", "much"], "--margin much"),
        (["--free", "much"], "--free much"),
        (["--inference", "much"], "--inference much"),
        (["--storage", "fp8"], "stored as NF4, which the host does not convert to fp8"),
    ],
)
def test_a_bad_option_exits_with_2_and_one_sentence(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", str(files["nf4"]), "--card", "12GiB", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize("place", ["model", "lora"])
@pytest.mark.parametrize(
    "content", [None, b"", b"garbage, not a header" * 9, b"GGUF\x09" + bytes(30), "cut", "folder"]
)
def test_a_bad_file_exits_with_2_and_one_sentence_that_names_it(
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
    content: bytes | str | None,
) -> None:
    bad = tmp_path / "bad.safetensors"
    if content == "folder":
        bad.mkdir()
    elif content == "cut":
        bad.write_bytes(files["lora"].read_bytes()[:100_000])
    elif isinstance(content, bytes):
        bad.write_bytes(content)
    paths = [bad, files["lora"]] if place == "model" else [files["nf4"], bad]
    arguments = ["plan", *map(str, paths), "--card", "12GiB"]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"{bad}: ")
    assert main([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {"error": err.strip()}


def test_a_lora_is_no_checkpoint_and_a_checkpoint_no_lora(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(files["lora"]), "--card", "12GiB"]) == 2
    assert "or a LoRA?" in capsys.readouterr().err
    assert main(["plan", str(files["nf4"]), str(files["sdxl"]), "--card", "12GiB"]) == 2
    assert "has a name of a LoRA; is it a checkpoint?" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_the_bar_is_drawn_in_what_the_console_shows(files: dict[str, Path], encoding: str) -> None:
    code = (
        "import sys\n"
        "sys.argv[1:] = ['plan', sys.argv[1], sys.argv[2], '--card', '12GiB']\n"
        "import runpy; runpy.run_module('lib_precision_lora', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, str(files["nf4"]), str(files["lora"])]
    done = subprocess.run(
        command, capture_output=True, env={"PYTHONIOENCODING": encoding, "PATH": "", "PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode(encoding).splitlines()
    mark, end = ("█", "│") if encoding == "utf-8" else ("M", "|")
    (bar,) = [line for line in lines if line.startswith(end)]
    assert len(bar) == 66
    # 6389 MiB of 12288 are the model's.
    assert bar.count(mark) == round(64 * 6389 / 12288)
