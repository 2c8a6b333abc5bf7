"""What a mount says of itself: `.mcorefs/status.json`, which no directory lists.

So nothing that copies or globs the mount ever meets it. It costs nothing while nobody reads it:
what it says is gathered when its first byte is read. Its size is 0, as that of files in /proc.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mcorefs.activity import Activity, Counter
from mcorefs.mount.nodes import Node, attributes

DIRECTORY, NAME = ".mcorefs", "status.json"
PATH = f"{DIRECTORY}/{NAME}"
HANDLES = 1 << 62
"""Inode numbers from here on are of this, not of what is served."""
_VERSION = 1

Value = str | int | float | None | Sequence["Value"] | Mapping[str, "Value"]


@dataclass(frozen=True)
class Status:
    """The status of one mount. Thread-safe."""

    about: Callable[[], Mapping[str, Value]]
    """What is served."""
    activity: Activity
    served_bytes: Counter = field(default_factory=Counter)
    errors: Counter = field(default_factory=Counter)
    """Reads that ended with EIO."""
    _last_errors: list[str] = field(default_factory=list)
    """The last one, if there was any."""
    _said: list[bytes] = field(default_factory=list)
    """What was said last, for who reads it piece by piece."""
    since: float = field(default_factory=time.monotonic)

    def at(self, path: str) -> Node | None:
        """The node at an absolute path, None unless it is one of ours."""
        if path == f"/{DIRECTORY}":
            return self._directory
        return self._file if path == f"/{PATH}" else None

    def of(self, handle: int) -> Node:
        return self._directory if handle == HANDLES else self._file

    def failed(self, what: str) -> None:
        self.errors.add(1)
        self._last_errors[:] = [what]

    def read(self, offset: int, size: int) -> bytes:
        if not (offset and self._said):
            self._said[:] = [(json.dumps(self.to_json(), indent=1) + "\n").encode()]
        return self._said[0][offset : offset + size]

    def to_json(self) -> dict[str, Value]:
        activity = self.activity
        hits, misses = activity.tile_hits.total, activity.tile_misses.total
        return {
            "version": _VERSION,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self.since, 1),
            "resident_bytes": _resident_bytes(),
            **self.about(),
            "served_bytes": self.served_bytes.total,
            "shard_bytes": activity.shard_bytes.total,
            "tile_hits": hits,
            "tile_misses": misses,
            "tile_hit_ratio": round(hits / (hits + misses), 4) if hits + misses else None,
            "read_errors": self.errors.total,
            "last_error": next(iter(self._last_errors), None),
        }

    @cached_property
    def _file(self) -> Node:
        about = attributes(HANDLES + 1, stat.S_IFREG | 0o444, 1, 0, time.time_ns())
        return Node(HANDLES + 1, f"/{PATH}", about)

    @cached_property
    def _directory(self) -> Node:
        about = attributes(HANDLES, stat.S_IFDIR | 0o555, 2, 0, time.time_ns())
        return Node(HANDLES, f"/{DIRECTORY}", about, None, {NAME: self._file})


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
