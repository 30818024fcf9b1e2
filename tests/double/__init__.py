"""Small doubles of Forge and of Forge Neo: our own modules that behave like a host's where we meet it.

`forge/` and `neo/` mirror the paths of one host's modules, `shared/` those that are the same in both.
`load_double` imports them under the host's names without leaving them, or the names, behind. What is kept
true to the hosts: names and signatures; the format of patches; `current_lora_hash`; the cache of text
conditioning; exceptions swallowed while extra networks are activated; when a checkpoint is loaded anew, and
what is set and restored around a generation. Of Forge: `refresh`, which merges into the weights, keeps a
backup and skips an unchanged list of identifiers; `load_models_gpu`, which skips a patcher that is loaded
already. Of Neo: patchers that are held weakly, and place and merge layer by layer where their `patches_uuid`
is not the model's; models that give way in part. The same tests run on the real hosts.
Their folders have no `__init__.py`, as the hosts': `inspect` takes a change in that, under one name, amiss.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent
TOP_LEVEL = frozenset(
    {
        *("backend", "modules", "modules_forge", "networks", "network", "extra_networks_lora"),
        *("lora_families", "lora_folder"),
    }
)
"""The hosts' top-level names, and those of what the doubles share."""


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
def load_double(host: str) -> dict[str, ModuleType]:
    """The modules of one host's double (`forge` or `neo`) by name; imported once, then found."""
    folders = FOLDER / host, FOLDER / "shared"
    before, path = put_host_modules({}), list(sys.path)
    sys.path[:0] = [str(folder) for folder in folders]
    try:
        for folder in folders:
            for file in sorted(folder.rglob("*.py")):
                import_module(".".join(file.relative_to(folder).with_suffix("").parts))
        return host_modules()
    finally:
        sys.path[:] = path
        put_host_modules(before)
