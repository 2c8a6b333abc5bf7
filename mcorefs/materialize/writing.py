"""Writing files of weights: in parallel, each piece of memory but a moment, and resumable."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from mcorefs.files import VirtualFile
from mcorefs.materialize.output import is_there, write_synced

PIECE = 1 << 20
"""Bytes that one thread copies at a time: what is in memory is this times the threads."""
_WRITE = 64 << 10
"""Bytes given to the kernel at once. Measured on ext4, Linux 6.18, in a virtual machine: larger
writes take from one to five times the processor time, as memory happens to be (the page cache then
wants large folios), these do not vary."""
SYNC_EVERY = 256 << 20
"""Bytes after which a file's progress is put on disk, while other threads go on: keeps the disk
busy from the start, and is the most that an interruption costs."""

OnProgress = Callable[[int], None]
"""Called from any thread with a number of bytes that were written, or found written already."""


class Part:
    """A tensor file on its way to disk. Thread-safe."""

    def __init__(self, name: str, file: VirtualFile, out: Path, partial: Path) -> None:
        self.file, self._name, self._out = file, name, out
        self._final, self._part = out / name, partial / f"{name}.part"
        self._note = partial / f"{name}.done"
        self._lock, self._syncing = threading.Lock(), threading.Lock()
        self._fd: int | None = None
        self._ahead: set[int] = set()
        """Pieces on disk beyond `done`, by their start."""
        self.done = self._found()
        """Bytes from the start that are written."""
        self._synced = self.done

    def _found(self) -> int:
        """Bytes that an earlier run left."""
        if is_there(self._out, self._name, self.file):
            return self.file.size
        try:
            noted = int(self._note.read_text())
            return noted if 0 <= noted <= self._part.stat().st_size else 0
        except (OSError, ValueError):
            return 0

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(start, bytes) of each piece that is still to be written."""
        if self.done == self.file.size and self._final.exists():
            return
        with self._lock:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            self._fd = os.open(self._part, flags, 0o644)
        for start in range(self.done, self.file.size, PIECE):
            yield start, min(PIECE, self.file.size - start)

    def copy(self, start: int, count: int, buffer: memoryview) -> None:
        """Put a piece in its place; the last one completes the file."""
        assert self._fd is not None
        self.file.read_into(start, buffer[:count])
        at = 0
        while at < count:
            at += os.pwrite(self._fd, buffer[at : min(at + _WRITE, count)], start + at)
        with self._lock:
            self._ahead.add(start)
            while self.done in self._ahead:
                self._ahead.remove(self.done)
                self.done = min(self.done + PIECE, self.file.size)
            complete = self.done == self.file.size
            due = complete or self.done - self._synced >= SYNC_EVERY
            done, self._synced = self.done, self.done if due else self._synced
        if complete:
            self._complete()
        elif due:
            self._note_progress(done)

    def stop(self) -> None:
        """Keep what there is for a later run."""
        if self._fd is not None:
            with suppress(OSError):  # the disk may be what failed
                self._note_progress(self.done)
            os.close(self._fd)
            self._fd = None

    def _note_progress(self, done: int) -> None:
        """Make the first `done` bytes safe, and say so; later notes may come to say less."""
        with self._syncing:
            if self._fd is not None:  # else it is complete by now
                os.fdatasync(self._fd)
                write_synced(self._note, str(done).encode())

    def _complete(self) -> None:
        assert self._fd is not None
        with self._syncing:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = None
        self._final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self._part, self._final)
        self._note.unlink(missing_ok=True)


class _Work:
    """The pieces of all parts, handed out to threads; the first failure stops them all."""

    def __init__(self, parts: list[Part], on_progress: OnProgress) -> None:
        self._pieces = ((part, start, count) for part in parts for start, count in part.pieces())
        self._on_progress = on_progress
        self._turn = threading.Lock()
        self._stopped = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Read and write pieces until there are no more."""
        buffer = memoryview(bytearray(PIECE))
        try:
            while (piece := self._next()) is not None:
                part, start, count = piece
                part.copy(start, count, buffer)
                self._on_progress(count)
        except BaseException as failure:
            self.failure = self.failure or failure
            self.stop()

    def _next(self) -> tuple[Part, int, int] | None:
        with self._turn:
            return None if self._stopped.is_set() else next(self._pieces, None)

    def stop(self) -> None:
        self._stopped.set()


def write_parts(parts: list[Part], threads: int, on_progress: OnProgress) -> None:
    """Every piece of every part, by `threads` threads."""
    work = _Work(parts, on_progress)
    workers = [threading.Thread(target=work.run, name=f"write-{i}") for i in range(threads)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    finally:  # also when interrupted
        work.stop()
        for worker in workers:
            worker.join()
        for part in parts:
            part.stop()
    if work.failure is not None:
        raise work.failure
