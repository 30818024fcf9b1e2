"""Runs at every start of the WebUI, as a script of its own: installs what is missing, and nothing else.

    safetensors    reads LoRA files; the WebUI brings it already
    gguf           decodes GGUF weights; Forge and Forge Neo bring a copy, which then is the one that is used

`--no-deps`: torch, numpy and gradio stay as they are, whatever a package asks for. bitsandbytes is not in
the list: NF4 and FP4 weights are decoded without it, and Forge installs the version that it wants itself.
A start without a network goes on, with one line that says what is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUNDLED: Mapping[str, tuple[str, ...]] = {
    "safetensors": (),
    "gguf": ("packages_3rdparty/gguf", "modules_forge/packages/gguf"),
}
"""Package → where a WebUI that brings its own copy has it: Forge, Forge Neo."""


def missing_packages(launch: Any) -> list[str]:
    """Those that are neither installed nor bundled with the WebUI. launch: the WebUI's own module."""
    webui = Path(launch.__file__).parent
    return [
        package
        for package, bundled in BUNDLED.items()
        if not launch.is_installed(package) and not any((webui / place).is_dir() for place in bundled)
    ]


def install() -> str | None:
    """Installs what is missing by one call of pip; returns a line for the log where that did not succeed."""
    try:
        import launch  # type: ignore[import-not-found]
    except ImportError as error:
        return f"the WebUI's module launch cannot be imported ({error}), nothing was installed."
    missing: list[str] = []
    try:
        missing = missing_packages(launch)
        if missing:
            names = " ".join(missing)
            launch.run_pip(f"install --no-deps {names}", f"{names} for Precision LoRA")
    except (RuntimeError, OSError, ValueError):
        names = " ".join(missing) or "its packages"
        return (
            f"{names} could not be installed, perhaps there is no network; the WebUI starts without. "
            f"To install by hand: {sys.executable} -m pip install --no-deps {names}"
        )
    return None


if __name__ == "__main__":
    problem = install()
    if problem is not None:
        sys.stdout.write(f"Precision LoRA: {problem}\n")
