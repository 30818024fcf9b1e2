"""Names of files and keys in the command line's output: text alone, and JSON that is still the names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_precision_lora.cli import main
from tests.hostile_text import HALF, HTML, NAMES, acting
from tests.memory.checkpoints import MODEL, sdxl_unet, stored_as, write_hole

KEYS = [name for name in NAMES if name != HALF]
FILES = [name for name in NAMES if "\x00" not in name]
CARD = ["--card", "12GiB"]


def output(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert acting(out) == acting(err) == set()
    return out + err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = stored_as("F16", sdxl_unet(), MODEL)
    return write_hole(tmp_path_factory.mktemp("model") / "sdxl.safetensors", shapes)


def lora(folder: Path, layer: str, name: str = "lora") -> Path:
    path = folder / f"{name}.safetensors"
    up, down = torch.ones(8, 2), torch.ones(2, 8)
    keys = {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down, f"{layer} alone": up.clone()}
    save_file(keys, folder / "written.safetensors")
    (folder / "written.safetensors").rename(path)
    return path


@pytest.mark.parametrize("key", KEYS)
def test_a_layers_name_is_one_word_of_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    path = lora(tmp_path, key)
    main(["inspect", str(lora(tmp_path, "cats"))])
    usual = output(capsys).count("\n")
    assert main(["inspect", str(lora(tmp_path, key))]) == 0
    assert output(capsys).count("\n") == usual
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(output(capsys))
    assert [layer["name"] for layer in found["layers"]] == [key]
    assert found["unmatched"] == [f"{key} alone"]


@pytest.mark.parametrize("key", KEYS)
def test_a_damaged_layers_name_is_one_word_of_its_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    path = tmp_path / "nan.safetensors"
    save_file({f"{key}.lora_up.weight": torch.full((8, 2), torch.nan)}, path)
    assert main(["inspect", str(path)]) == 1
    lines = [line for line in output(capsys).split("\n") if line.startswith("FINDING")]
    assert len(lines) == 2


@pytest.mark.parametrize("key", KEYS)
def test_a_plan_shows_the_names_of_unknown_layers_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path, key: str
) -> None:
    main(["plan", str(model), str(lora(tmp_path, "cats")), *CARD])
    usual = output(capsys).count("\n")
    main(["plan", str(model), str(lora(tmp_path, key)), *CARD])
    assert output(capsys).count("\n") == usual
    main(["plan", str(model), str(lora(tmp_path, key)), *CARD, "--json"])
    assert json.loads(output(capsys))["loras"][0]["unmatched"] == [key]


@pytest.mark.parametrize("name", FILES)
def test_the_name_of_a_file_is_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path, name: str
) -> None:
    path = lora(tmp_path, "cats", name)
    main(["inspect", str(path)])
    main(["plan", str(model), str(path), *CARD])
    assert "cats" in output(capsys) or name == HTML
    path.write_bytes(b"no such file")
    assert main(["inspect", str(path)]) == 2
    assert main(["plan", str(model), str(path), *CARD]) == 2
    assert main(["plan", str(path), *CARD]) == 2
    assert main(["inspect", str(path), "--json"]) == 2
    assert output(capsys)


@pytest.mark.parametrize("name", FILES)
def test_an_argument_that_nobody_knows_is_quoted_as_text(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A shell makes arguments of the names of files."""
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "a.safetensors", name])
    assert ended.value.code == 2
    assert "unrecognized arguments" in output(capsys)
