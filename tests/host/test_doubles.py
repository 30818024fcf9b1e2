"""The doubles have drifted where a real host no longer has a name, or takes other arguments."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.double import host_modules, load_double, put_host_modules
from tests.host.webui import load_real, missing

OWN = {
    *("lora_families", "lora_folder", "modules.conditioning_key", "backend.diffusion_engine.whole"),
    "backend.patcher.merging",
}
"""Modules of the doubles under names that no host has."""

HELPERS = {
    *("modules.processing.learned_conditioning", "modules.processing.empty_cache"),
    *("backend.patcher.base.Leaf", "backend.patcher.base.OnTheFly", "backend.patcher.base.wipe"),
    "backend.patcher.lora.WeightAdapter",
    *("modules.shared.Options", "modules.shared.walk_files"),
}
"""What a double needs for itself, or has elsewhere than the host."""


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions and methods that a module of a double has, by their path in it."""
    for name, value in vars(module).items():
        source = getattr(value, "__module__", "")
        if name.startswith("_") or source in ("typing", "types", "torch", "dataclasses", "collections.abc"):
            continue
        if inspect.isfunction(value) and source not in OWN:
            yield name, value
        elif inspect.isclass(value) and source == module.__name__:
            yield name, value
            for method, function in vars(value).items():
                if inspect.isfunction(function) and (method == "__init__" or not method.startswith("_")):
                    yield f"{name}.{method}", function


def difference(double: Any, real: Any) -> str | None:
    """What a caller of the double may write and a caller of the real one may not."""
    if not inspect.isroutine(double) or not inspect.isroutine(real):
        return None
    ours, theirs = inspect.signature(double).parameters, inspect.signature(real).parameters
    for name, parameter in ours.items():
        if parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
            parameter.POSITIONAL_ONLY,
        ):
            continue
        if name not in theirs:
            return f"no parameter {name}"
        if (parameter.default is parameter.empty) is not (theirs[name].default is parameter.empty):
            return f"{name} is optional in one of them"
    order = [name for name in theirs if name in ours]
    if order != [name for name in ours if name in theirs]:
        return f"the order is {order}"
    free = {name for name, each in ours.items() if each.kind is each.POSITIONAL_ONLY}
    if free:
        return None if len(ours) == len(theirs) else "another number of parameters"
    needed = [
        each.name
        for each in theirs.values()
        if each.default is each.empty and each.kind < each.VAR_POSITIONAL
    ]
    return next((f"{name} must be given" for name in needed if name not in ours), None)


@pytest.mark.parametrize("name", ["forge", "neo"])
def test_a_real_host_has_what_its_double_has(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    reason = missing(name)
    if reason is not None:
        pytest.skip(reason)
    root = Path(os.environ[f"{name.upper()}_ROOT"]).resolve()
    before = host_modules()
    real = load_real(name, root, tmp_path_factory.getbasetemp() / "host-data")
    try:
        put_host_modules(real)
        found, checked = {}, 0
        for module, double in load_double(name).items():
            if module in OWN or not hasattr(double, "__file__") or double.__file__ is None:
                continue
            import_module(module)
            for path, value in public(double):
                if f"{module}.{path.partition('.')[0]}" in HELPERS:
                    continue
                owner: Any = sys.modules[module]
                for part in path.split("."):
                    owner = getattr(owner, part, None)
                checked += 1
                wrong = "it is missing" if owner is None else difference(value, owner)
                if wrong is not None:
                    found[f"{module}.{path}"] = wrong
    finally:
        put_host_modules(before)
    assert found == {}
    assert checked > 80
