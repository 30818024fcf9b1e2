"""The queue in which whatever uses the models waits."""

from __future__ import annotations

import threading

queue_lock = threading.Lock()
