"""`<lora:name:te:unet>` in prompts."""

from __future__ import annotations

from typing import Any

import networks
from lora_folder import strengths_in, write_hashes
from modules import extra_networks


class ExtraNetworkLora(extra_networks.ExtraNetwork):
    """All that a prompt names are loaded at once."""

    def __init__(self) -> None:
        super().__init__("lora")

    def activate(self, p: Any, params_list: Any) -> None:
        names, te_multipliers, unet_multipliers = strengths_in(params_list)
        networks.load_networks(names, te_multipliers, unet_multipliers)
        write_hashes(p, networks.loaded_networks)
