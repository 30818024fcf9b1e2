"""Options, command line, and the current checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

cmd_opts = SimpleNamespace(lora_dir="")
config_filename = "config.json"


class OptionInfo:
    """One setting of the settings page."""

    def __init__(
        self, default: Any = None, label: str = "", component: Any = None, component_args: Any = None
    ) -> None:
        self.default, self.label = default, label
        self.component, self.component_args = component, component_args
        self.section: Any = None
        self.comment_after = ""

    def info(self, info: str) -> OptionInfo:
        self.comment_after += f"<span class='info'>({info})</span>"
        return self


class Options:
    """Values by key; a key without a value has its setting's default."""

    def __init__(self, data_labels: dict[str, OptionInfo]) -> None:
        self.__dict__.update(data_labels=data_labels, data={})

    def __getattr__(self, item: str) -> Any:
        if item in self.data:
            return self.data[item]
        if item in self.data_labels:
            return self.data_labels[item].default
        raise AttributeError(item)

    def __setattr__(self, key: str, value: Any) -> None:
        self.data[key] = value

    def set(self, key: str, value: Any, is_api: bool = False, run_callbacks: bool = True) -> bool:
        if self.data.get(key) == value:
            return False
        setattr(self, key, value)
        return True

    def save(self, filename: str) -> None:
        with open(filename, "w", encoding="utf8") as file:
            json.dump(self.data, file)

    def get_default(self, key: str) -> Any:
        return self.data_labels[key].default if key in self.data_labels else None

    def add_option(self, key: str, info: OptionInfo) -> None:
        self.data_labels[key] = info
        if key not in self.data:
            self.data[key] = info.default


opts = Options(
    {
        "CLIP_stop_at_last_layers": OptionInfo(1),
        "sd_model_checkpoint": OptionInfo(None),
        "forge_additional_modules": OptionInfo([]),
        "forge_unet_storage_dtype": OptionInfo("Automatic"),
    }
)
state = SimpleNamespace(
    interrupted=False, skipped=False, stopping_generation=False, job_count=0, textinfo=None
)


def walk_files(path: str, allowed_extensions: Any = None) -> Iterator[str]:
    for root, _, files in os.walk(path, followlinks=True):
        for filename in sorted(files):
            if allowed_extensions is None or os.path.splitext(filename)[1].lower() in allowed_extensions:
                yield os.path.join(root, filename)


def __getattr__(name: str) -> Any:
    if name != "sd_model":
        raise AttributeError(name)
    from modules import sd_models

    return sd_models.model_data.get_sd_model()
