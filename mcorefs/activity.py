"""Counting what a mount does, for who asks (`mcorefs status`): exact, without a lock."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field


class Counter:
    """A number that many threads add to. Each has a number of its own, so nothing is lost."""

    def __init__(self) -> None:
        self._by_thread: dict[int, int] = {}

    def add(self, count: int) -> None:
        mine = threading.get_ident()
        self._by_thread[mine] = self._by_thread.get(mine, 0) + count

    @property
    def total(self) -> int:
        return sum(list(self._by_thread.values()))


@dataclass(frozen=True)
class Activity:
    """What was done to answer reads since the process began."""

    shard_bytes: Counter = field(default_factory=Counter)
    """Read of shard files, or fetched of them."""
    tile_hits: Counter = field(default_factory=Counter)
    """Times that a tile was wanted and lay in the cache, or was being made."""
    tile_misses: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class About:
    """What a tree is of."""

    checkpoint: str
    iteration: int | None
    format: str
    architecture: str
    family: str | None
    """Hugging Face's `model_type`."""

    def to_json(self) -> Mapping[str, str | int | None]:
        return {
            "checkpoint": self.checkpoint,
            "iteration": self.iteration,
            "format": self.format,
            "architecture": self.architecture,
            "family": self.family,
        }
