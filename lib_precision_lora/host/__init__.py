"""The binding to the WebUI; the only folder that imports it."""

from lib_precision_lora.host.installation import install, uninstall

__all__ = ["install", "uninstall"]
