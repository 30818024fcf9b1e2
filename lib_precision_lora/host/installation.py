"""Installing ourselves in the running host, and leaving it."""

from __future__ import annotations

import logging
import threading

from lib_precision_lora.host import forge, neo
from lib_precision_lora.host.binding import Binding
from lib_precision_lora.host.contract import failures

logger = logging.getLogger("lib_precision_lora")

HOSTS = ((forge.REQUIREMENTS, forge.ForgeHost), (neo.REQUIREMENTS, neo.NeoHost))
"""What each WebUI must have, and what makes a `Host` of it."""

_active: Binding | None = None
_leaving = False
_off: str | None = None
_lock = threading.RLock()


def install() -> bool:
    """Swap the running host's LoRA patcher for ours; True if ours is in place afterwards.

    Checks first that the host has every name that we rely on. If one is missing, nothing is touched, and
    one line in the log says which. Calling it again changes nothing.
    """
    global _active, _leaving, _off
    with _lock:
        _leaving, _off = False, None
        if _active is not None:
            return True
        missing: list[list[str]] = []
        for requirements, host in HOSTS:
            failed = failures(requirements)
            if not failed:
                _active = Binding(host())
                return True
            missing.append(failed)
        lacks = "; ".join(min(missing, key=len))
        _off = (
            "Precision LoRA is off, LoRAs are left to this WebUI: it is neither the Forge nor the Forge Neo "
            f"that the extension knows ({lacks}). Look for an update of the extension."
        )
        logger.warning("%s", _off)
        return False


def uninstall() -> None:
    """Take everything off every model and put the host's own functions back. Calling it again is fine.

    An image that is being made is made to its end as it began: we leave after it, unless `install` is called
    before that, as where the page is reloaded.
    """
    global _leaving
    with _lock:
        if _active is not None:
            _leaving = True
            _active.overrides.when_idle(_leave)


def _leave() -> None:
    global _active, _leaving
    with _lock:
        if _leaving and _active is not None:
            _leaving, leaving, _active = False, _active, None
            leaving.uninstall()


def active() -> Binding | None:
    """The binding in place, if there is one."""
    return _active


def why_off() -> str | None:
    """Why the last `install` has left this WebUI alone; None where it has not."""
    return _off
