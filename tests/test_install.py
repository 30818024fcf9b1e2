"""install.py as the WebUI runs it: a script, with the WebUI's folder on PYTHONPATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = Path(__file__).parent.parent / "install.py"
LAUNCH = """
import json, pathlib
state = pathlib.Path(__file__).with_name("state.json")
def is_installed(package):
    return package in json.loads(state.read_text())["installed"]
def run_pip(command, desc=None, live=False):
    known = json.loads(state.read_text())
    known["calls"].append(command)
    if not known["network"]:
        state.write_text(json.dumps(known))
        raise RuntimeError("Couldn't install.\\nCommand: pip\\nstderr: no network\\nmore lines")
    known["installed"] += [word for word in command.split()[1:] if not word.startswith("-")]
    state.write_text(json.dumps(known))
"""


class WebUI:
    """A folder with a `launch` module that records what it is asked for."""

    def __init__(self, folder: Path, installed: list[str], network: bool = True) -> None:
        self.folder = folder
        (folder / "launch.py").write_text(LAUNCH)
        state = {"installed": installed, "calls": [], "network": network}
        (folder / "state.json").write_text(json.dumps(state))

    def start(self) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        return subprocess.run([sys.executable, INSTALL], env=environment, capture_output=True, text=True)

    @property
    def calls(self) -> list[str]:
        return json.loads((self.folder / "state.json").read_text())["calls"]


def test_nothing_missing_makes_no_call_and_says_nothing(tmp_path: Path) -> None:
    webui = WebUI(tmp_path, ["safetensors", "gguf"])
    done = webui.start()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert webui.calls == []


@pytest.mark.parametrize("installed", [[], ["safetensors"], ["gguf"]])
def test_what_is_missing_is_installed_by_one_call_and_only_once(tmp_path: Path, installed: list[str]) -> None:
    webui = WebUI(tmp_path, installed)
    done = [webui.start(), webui.start()]
    assert [run.returncode for run in done] == [0, 0]
    assert len(webui.calls) == 1
    words = webui.calls[0].split()
    assert words[:2] == ["install", "--no-deps"]
    assert set(words[2:]) == {"safetensors", "gguf"} - set(installed)


@pytest.mark.parametrize("place", ["packages_3rdparty/gguf", "modules_forge/packages/gguf"])
def test_a_bundled_gguf_is_not_installed_again(tmp_path: Path, place: str) -> None:
    webui = WebUI(tmp_path, ["safetensors"])
    (tmp_path / place).mkdir(parents=True)
    assert webui.start().returncode == 0
    assert webui.calls == []


def test_without_a_network_one_line_is_said_and_the_start_goes_on(tmp_path: Path) -> None:
    webui = WebUI(tmp_path, ["gguf"], network=False)
    done = webui.start()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert "safetensors could not be installed" in done.stdout
    assert len(webui.calls) == 1


def test_outside_of_a_webui_one_line_is_said(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, INSTALL], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("package", ["torch", "numpy", "gradio"])
def test_the_webuis_own_packages_are_never_asked_for(tmp_path: Path, package: str) -> None:
    webui = WebUI(tmp_path, [])
    webui.start()
    assert package not in webui.calls[0].split()
    assert not {"-U", "--upgrade", "--force-reinstall", "-I"} & set(webui.calls[0].split())
