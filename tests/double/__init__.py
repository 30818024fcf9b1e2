"""A small double of Forge: our own modules that behave like the host's where the binding meets it.

`webui/` mirrors the paths of the host's modules. `load_double` imports them under the host's names without
leaving them, or the names, behind. What is kept true to the host: names and signatures; `refresh`, which
merges into the weights, keeps a backup and skips an unchanged list of identifiers; `load_models_gpu`, which
skips a patcher that is loaded already; the format of patches; `current_lora_hash`; the cache of text
conditioning; exceptions swallowed while extra networks are activated; when a checkpoint is loaded anew, and
what is set and restored around a generation. The same tests run on the real host.
Its folders have no `__init__.py`, as the host's: `inspect` takes a change in that, under one name, amiss.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

WEBUI = Path(__file__).parent / "webui"
TOP_LEVEL = frozenset({"backend", "modules", "modules_forge", "networks", "network", "extra_networks_lora"})
"""The host's top-level names."""


def host_modules() -> dict[str, ModuleType]:
    """What stands in `sys.modules` under the host's names now."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in TOP_LEVEL}


def put_host_modules(modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """Let these stand under the host's names, and nothing else; returns what stood there."""
    before = host_modules()
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    return before


@cache
def load_double() -> dict[str, ModuleType]:
    """The double's modules by name; imported once, then found."""
    before = put_host_modules({})
    sys.path.insert(0, str(WEBUI))
    try:
        for file in sorted(WEBUI.rglob("*.py")):
            import_module(".".join(file.relative_to(WEBUI).with_suffix("").parts))
        return host_modules()
    finally:
        sys.path.remove(str(WEBUI))
        put_host_modules(before)
