"""Waiting for storage no longer than agreed: work that may hang, with a deadline.

A thread that waits in the kernel for a file system cannot be interrupted. Whoever must not wait for
ever has another thread do it, and goes on without it when the time is up. Threads that hang are
counted until their file system answers, and there are never more than MAX_HANGING.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_HANGING = 64
"""Threads that hang, from which on whatever would need another one fails at once."""
MAX_IDLE = 32


class LateError(Exception):
    """It was not done in time, or is not begun because too much hangs already."""


class Deadline:
    """Runs work in threads of its own, for at most `seconds` each time. Thread-safe.

    Threads are started as needed and kept for later work; after a fork the child starts its own.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._idle: list[_Worker] = []
        self._hanging: Counter[str] = Counter()
        self._pid = os.getpid()
        self._lock = threading.Lock()

    @staticmethod
    def of(seconds: float | None) -> Deadline | None:
        """One of so many seconds, if there is to be one."""
        return None if seconds is None else Deadline(seconds)

    @property
    def hanging(self) -> int:
        """Threads at work for which nobody waits any more."""
        return self._hanging.total()

    def run(self, what: str, work: Callable[[], T], lost: Callable[[T | None], None]) -> T:
        """What `work` returns or raises; LateError if it is not done in time.

        It then goes on, and until it ends other work on `what` (a file) is refused at once: what
        waits for storage that is gone needs no company. Where a result is not returned, `lost` is
        called with it as soon as there is one, or with None where there will be none.
        """
        job = _Job(what, work, lost)
        try:
            self._worker(what).begin(lambda: self._perform(job))
        except LateError:
            lost(None)
            raise
        if not job.done.acquire(timeout=self.seconds):
            with self._lock:
                if not job.ended:
                    job.abandoned = True
                    self._hanging[what] += 1
                    raise LateError(f"nothing within {self.seconds:g} s")
        if job.error is not None:
            lost(None)
            raise job.error
        (result,) = job.results
        return result

    def _worker(self, what: str) -> _Worker:
        with self._lock:
            if self._pid != os.getpid():
                self._idle, self._pid = [], os.getpid()
                self._hanging.clear()
            if self._hanging[what]:
                raise LateError(f"what was asked {self.seconds:g} s ago and more still hangs")
            if self.hanging >= MAX_HANGING:
                raise LateError(f"{self.hanging} requests to this storage hang")
            if self._idle:
                return self._idle.pop()
        return _Worker(self._rest)

    def _rest(self, worker: _Worker) -> bool:
        """Keep `worker` for later; False if there are enough."""
        with self._lock:
            if len(self._idle) >= MAX_IDLE:
                return False
            self._idle.append(worker)
            return True

    def _perform(self, job: _Job[T]) -> None:
        try:
            job.results.append(job.work())
        except BaseException as problem:
            job.error = problem
        with self._lock:
            job.ended = True
            if job.abandoned:
                self._hanging -= Counter({job.what: 1})
        if job.abandoned:
            job.lost(job.results[0] if job.results else None)
        job.done.release()


class _Job(Generic[T]):
    __slots__ = ("abandoned", "done", "ended", "error", "lost", "results", "what", "work")

    def __init__(self, what: str, work: Callable[[], T], lost: Callable[[T | None], None]) -> None:
        self.what, self.work, self.lost = what, work, lost
        self.results: list[T] = []
        self.error: BaseException | None = None
        self.ended = self.abandoned = False
        self.done = threading.Lock()
        self.done.acquire()


class _Worker:
    """A thread that does one thing after the other, and rests in between."""

    def __init__(self, rest: Callable[[_Worker], bool]) -> None:
        self._rest = rest
        self._task: Callable[[], None] | None = None
        self._wake = threading.Lock()
        self._wake.acquire()
        # A daemon: one that hangs must not keep the process from ending.
        threading.Thread(target=self._live, name="mcorefs-storage", daemon=True).start()

    def begin(self, task: Callable[[], None]) -> None:
        self._task = task
        self._wake.release()

    def _live(self) -> None:
        while True:
            self._wake.acquire()
            assert self._task is not None
            self._task()
            self._task = None
            if not self._rest(self):
                return
