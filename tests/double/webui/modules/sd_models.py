"""The checkpoint that is loaded."""

from __future__ import annotations

from typing import Any


class SdModelData:
    """Holds one checkpoint."""

    def __init__(self) -> None:
        self.sd_model: Any = None
        self.forge_loading_parameters: dict[str, Any] = {}
        self.forge_hash = ""

    def get_sd_model(self) -> Any:
        return self.sd_model

    def set_sd_model(self, v: Any) -> None:
        self.sd_model = v


model_data = SdModelData()
