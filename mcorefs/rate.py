"""A limit on how fast shards are read, so that training on the same storage is not disturbed."""

from __future__ import annotations

import threading
import time

BURST = 0.1
"""Seconds' worth that may be read at once after a pause."""


class Rate:
    """At most `bytes_per_s`, over all threads of this process; None: no limit. Thread-safe."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        """When all that was granted will have been read at that rate."""
        self._lock = threading.Lock()

    def wait(self, nbytes: int) -> None:
        """Return when `nbytes` may be read: threads wait their turns, and none holds a lock."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            now = time.monotonic()
            mine = max(self._free_at, now - BURST) + nbytes / self._bytes_per_s
            self._free_at = mine
        if mine > now:
            time.sleep(mine - now)


NO_LIMIT = Rate(None)
