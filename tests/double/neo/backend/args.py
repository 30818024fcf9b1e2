"""What the command line and the loading options say while the host runs."""

from __future__ import annotations

from typing import Any


class _Values(type):
    """Attributes of a class, which may be asked for as items, too."""

    def get(cls, key: str, default: Any = None) -> Any:
        return getattr(cls, key, default)

    def __getitem__(cls, key: str) -> Any:
        return getattr(cls, key, None)

    def __setitem__(cls, key: str, value: Any) -> None:
        setattr(cls, key, value)

    def __contains__(cls, key: str) -> bool:
        return hasattr(cls, key)


class dynamic_args(metaclass=_Values):  # noqa: N801  the host's name
    """nunchaku: the model merges LoRAs by itself."""

    forge_unet_storage_dtype: Any = None
    online_lora = False
    nunchaku = False
