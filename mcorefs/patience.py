"""Looking at storage that may fail for a moment, or never answer.

Reads of shards have a thread each that may hang (`deadline`). To open a checkpoint is thousands of
small looks instead, from libraries too, so there it is one thread for them all, and whoever waits
for it sees whether it still goes on: a thread that has used no processor time for as long as the
storage may take waits for a single answer.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import PurePath
from typing import Generic, TypeVar

from mcorefs.errors import CheckpointError, McorefsError

T = TypeVar("T")

READ_TIMEOUT = 30.0
"""Seconds that the storage may take to answer, if nothing else is said."""
PASSING = frozenset(
    (errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ESHUTDOWN)
)
"""Errors that may pass: a server that fails over (NFS, Lustre), a disk that is reset."""
PAUSES = (0.05, 0.25)
"""Seconds before such a call is made again, and once more."""
_TRIED = "_mcorefs_tried"
_LOOKS = 20
"""Looks in a row that must find a thread where it was: one alone says nothing, for this process
may have been stopped in between, or the whole machine."""


def again(call: Callable[[], T]) -> T:
    """What `call` returns, if need be once an error has passed."""
    pauses = iter(PAUSES)
    while True:
        try:
            return call()
        except (OSError, CheckpointError) as problem:
            if (cause := _that_may_pass(problem)) is None:
                raise
            if (pause := next(pauses, None)) is None:
                setattr(cause, _TRIED, True)
                raise
        time.sleep(pause)


def _that_may_pass(problem: BaseException | None) -> OSError | None:
    """The error of a local file that `problem` is, or was made of, if it may pass; none that was
    tried often enough already."""
    while problem is not None:
        if isinstance(problem, OSError):  # ReadFault: all that can be done was done
            tried = isinstance(problem, McorefsError) or hasattr(problem, _TRIED)
            return problem if problem.errno in PASSING and not tried else None
        problem = problem.__cause__ or problem.__context__
    return None


def patiently(look: Callable[[], T], seconds: float | None) -> T:
    """What `look`, which changes nothing, finds at storage that has `seconds` for each answer.

    Raises CheckpointError where an error does not pass, and one that names the file that is waited
    for; `look` is then left behind, in a thread that does not keep this process from ending as soon
    as the kernel lets go of it.
    """

    def work() -> T:
        try:
            return again(look)
        except OSError as problem:
            if isinstance(problem, McorefsError) or problem.errno not in PASSING:
                raise
            raise CheckpointError(
                f"{problem.filename or 'the storage'}: {problem.strerror}, again and again; look "
                "at the file system, its server and the kernel's log"
            ) from problem

    return attended(work, seconds)


def attended(work: Callable[[], T], seconds: float | None) -> T:
    """`patiently`, of what must not be done twice."""
    if seconds is None:
        return work()
    worker = _Worker(work)
    idle, before = 0, -1
    while not worker.done.wait(seconds / _LOOKS):
        used = worker.used()
        idle = idle + 1 if used == before else 0
        before = used
        if idle >= _LOOKS and "://" not in (name := worker.waits_for()):  # URLs have their own
            raise CheckpointError(
                f"{name}: its storage does not answer: nothing within {seconds:g} s; look at the "
                "file system and its server, or give it longer (--read-timeout)"
            )
    worker.thread.join()
    if worker.error is not None:
        raise worker.error
    (result,) = worker.results
    return result


class _Worker(Generic[T]):
    """A thread that does one thing."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.done = threading.Event()
        self.results: list[T] = []
        self.error: BaseException | None = None
        self._work, self._clock = work, 0
        self.thread = threading.Thread(target=self._run, name="mcorefs-opening", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
            self.results.append(self._work())
        except BaseException as problem:
            self.error = problem
        finally:
            self.done.set()

    def used(self) -> int:
        """Nanoseconds of the processor that it has used; also a large file that comes slowly is
        copied a page at a time."""
        try:
            return time.clock_gettime_ns(self._clock)
        except OSError:
            return -1  # it has ended

    def waits_for(self) -> str:
        """The file that it is at: the innermost that any of its calls was given."""
        frame = sys._current_frames().get(self.thread.ident or 0)
        while frame is not None:
            for value in frame.f_locals.values():
                if isinstance(value, PurePath) or (isinstance(value, str) and os.sep in value):
                    return str(value)
            frame = frame.f_back
        return "a file"
