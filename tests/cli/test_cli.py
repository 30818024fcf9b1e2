"""Exit codes and streams: 0 fine, 1 findings, 2 bad input."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_precision_lora.cli import main
from lib_precision_lora.report import demo
from lib_precision_lora.report.demo import DemoResult, Ours, Row, Stock
from lib_precision_lora.report.demo.weights import DemoShape, base_weights, lora_weights

SMALL = DemoShape(hidden=256, blocks=1)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "lora.safetensors"
    save_file(lora_weights(base_weights(SMALL)), path)
    return path


def test_inspect_of_a_good_file_exits_with_0(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(lora)]) == 0
    out, err = capsys.readouterr()
    assert ("No findings." in out, err) == (True, "")
    assert "lora_unet_single_blocks_0_linear1" in out


def test_inspect_json_is_one_object(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(lora), "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert (parsed["ranks"], parsed["alphas"], len(parsed["layers"])) == ({"16": 3}, {"8.0": 3}, 3)


def test_inspect_of_a_damaged_file_exits_with_1(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = lora_weights(base_weights(SMALL))
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, lora)
    assert main(["inspect", str(lora)]) == 1
    assert "FINDING" in capsys.readouterr().out
    assert main(["inspect", str(lora), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"]


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_inspect_of_a_truncated_file_exits_with_2_and_one_sentence(
    lora: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    lora.write_bytes(lora.read_bytes()[:-100])
    assert main(["inspect", str(lora), *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "truncated" in err
    assert json.loads(out)["error"] == err.strip() if arguments else out == ""


def test_demo_prints_one_row_for_each_stored_weight_draws_and_leaves_torch_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pip install matplotlib, or make test, runs it")
    chart, random_state = tmp_path / "chart.png", torch.get_rng_state()
    assert main(["demo", "--size", "256", "--chart", str(chart)]) == 0
    first_words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert [word for word in first_words if word in ("NF4", "FP8", "Q8_0", "Q4_0", "Q4_K", "bf16")] == [
        "NF4",
        "FP8",
        "Q8_0",
        "Q4_0",
        "Q4_K",
        "bf16",
    ]
    assert chart.stat().st_size > 10_000
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("limit", "code", "count"), [(1e-6, 0, 0), (1e-12, 1, 1)])
def test_demo_exits_with_1_where_an_error_is_above_the_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: float, code: int, count: int
) -> None:
    row = Row("Q8_0", 1, Ours(1e-7, 0.1, 0.1, 0.1, 1, True), Stock(30.0, 0.1, 1), None)
    result = DemoResult(256, 1, 32, 1, 16, 0.01, "auto", limit, 1.0, (row,))
    monkeypatch.setattr(demo, "run_demo", lambda shape, compute: result)
    assert main(["demo", "--json"]) == code
    parsed = json.loads(capsys.readouterr().out)
    assert (len(parsed["findings"]), parsed["rows"][0]["stock"]["error"]) == (count, 30.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "300"], "multiple of 256"),
        (["--size", "0"], "multiple of 256"),
        (["--size", "8192"], "multiple of 256"),
        (["--chart", "chart.gif"], "must be one of .png, .svg"),
        (["--chart", "/no/such/folder/chart.png"], "there is no folder"),
    ],
)
def test_demo_refuses_bad_input_before_it_measures(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["demo", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (message in err, out, err.count("\n")) == (True, "", 1)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["demo", "--size", "wide"], ["inspect"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_names_the_commands_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    commands = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert caught.value.code == 0
    assert [word for word in commands if word in ("demo", "inspect", "plan", "check")] == [
        "demo",
        "inspect",
        "plan",
    ]


@pytest.mark.parametrize("package", ["gguf", "bitsandbytes"])
def test_without_the_demos_packages_inspect_works_and_demo_says_what_is_missing(
    lora: Path, package: str
) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from lib_precision_lora.cli import main\n"
        f"assert main(['inspect', {str(lora)!r}]) == 0\n"
        "sys.exit(main(['demo']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"needs the Python package {package}" in done.stderr
    assert done.stderr.count("\n") == 1


NOISY = """
import logging, sys, warnings
print("noise on the standard output")
sys.stderr.write("noise on the standard error")
warnings.warn("noise as a warning")
logging.getLogger("bitsandbytes.cextension").warning("noise in the log")
if "torch" in sys.modules:
    __path__.append({real!r})
    exec(compile(open({real!r} + "/__init__.py").read(), "bitsandbytes", "exec"))
"""
"""bitsandbytes behind a package that makes every noise; alone without torch."""


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_demo_shows_nothing_of_what_bitsandbytes_says(tmp_path: Path, arguments: list[str]) -> None:
    found = importlib.util.find_spec("bitsandbytes")
    assert found is not None
    assert found.submodule_search_locations is not None
    (tmp_path / "bitsandbytes").mkdir()
    real = NOISY.format(real=found.submodule_search_locations[0])
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(real)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    bare = subprocess.run(
        [sys.executable, "-c", "import bitsandbytes"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    noises = ("standard output" in bare.stdout, *(f"noise {n}" in bare.stderr for n in ("on", "as", "in")))
    assert noises == (True,) * 4
    done = subprocess.run(
        [sys.executable, "-m", "lib_precision_lora", "demo", "--size", "256", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "noise" not in done.stdout
    if arguments:
        assert len(json.loads(done.stdout)["rows"]) == 6


def test_an_error_of_bitsandbytes_is_not_silenced(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("raise ImportError('no CUDA here', name='lib')")
    done = subprocess.run(
        [sys.executable, "-m", "lib_precision_lora", "demo"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])},
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no CUDA here" in done.stderr


def test_the_module_runs_and_passes_the_exit_code_on(tmp_path: Path) -> None:
    absent = tmp_path / "absent.safetensors"
    command = [sys.executable, "-m", "lib_precision_lora", "inspect", str(absent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{absent}: there is no such file; check the path.\n"


def test_a_console_of_an_old_code_page_does_not_fail(tmp_path: Path, lora: Path) -> None:
    odd = tmp_path / "Δ.safetensors"
    odd.write_bytes(lora.read_bytes())
    command = [sys.executable, "-X", "utf8=0", "-m", "lib_precision_lora", "inspect", str(odd)]
    done = subprocess.run(command, capture_output=True, env={"PYTHONIOENCODING": "cp1252", "PATH": ""})
    assert done.returncode == 0, done.stderr
