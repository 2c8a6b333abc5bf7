"""One range of bytes read by several threads, each of which takes a share of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

LEAST_SHARE = 1 << 20
"""Bytes that are worth waking a thread for."""
PAGE = 4 << 10
MOST = 4
"""Threads that the memory of a machine keeps up with."""


class Crew:
    """The threads, as many as there are processors for. They start when they are first needed, and
    anew in a process that was forked, which has none of them. Thread-safe."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def shares(self, nbytes: int) -> int:
        """In how many shares it is worth to read so much."""
        return max(1, min(nbytes // LEAST_SHARE, MOST, len(os.sched_getaffinity(0))))

    def read(self, nbytes: int, read: Callable[[int, int], None]) -> None:
        """Call read(start, end) for ranges that together are [0, nbytes), the first of them in this
        thread; all have ended when this returns or raises what one of them raised."""
        count = self.shares(nbytes)
        bounds = [*(nbytes * i // count // PAGE * PAGE for i in range(count)), nbytes]
        pool = self._started()
        others = [pool.submit(read, *bounds[i : i + 2]) for i in range(1, count)]
        try:
            read(*bounds[:2])
        finally:
            wait(others)
        for other in others:
            other.result()

    def close(self) -> None:
        """Let the threads end."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown(wait=False)

    def _started(self) -> ThreadPoolExecutor:
        pool = self._pool
        if pool is None or self._process != os.getpid():
            self._process = os.getpid()
            pool = self._pool = ThreadPoolExecutor(MOST - 1, "mcorefs-read")
        return pool
