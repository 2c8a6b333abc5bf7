"""Writing the tree as real files: in parallel, resumable, and never looking complete before it is.

While it goes on, OUT holds a directory `.mcorefs-partial` with the plan's fingerprint, the files
that are being written and how far each is safely on disk. A file gets its place and name in OUT
when it is complete and synced; config.json comes last, so nothing loads from an unfinished OUT.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mcorefs.errors import McorefsError, OutputError
from mcorefs.files import BytesFile, VirtualFile, read_all
from mcorefs.reader import SafetensorsFile
from mcorefs.remote.ahead import AheadFile
from mcorefs.tree import VirtualTree

PARTIAL = ".mcorefs-partial"
PIECE = 1 << 20
"""Bytes that one thread copies at a time: what is in memory is this times the threads."""
_WRITE = 64 << 10
"""Bytes given to the kernel at once. Measured on ext4, Linux 6.18, in a virtual machine: larger
writes take from one to five times the processor time, as memory happens to be (the page cache then
wants large folios), these do not vary."""
SYNC_EVERY = 256 << 20
"""Bytes after which a file's progress is put on disk, while other threads go on: keeps the disk
busy from the start, and is the most that an interruption costs."""
_SPARE = 16 << 20
"""Disk space left free, for the file system's own needs."""

OnProgress = Callable[[int], None]
"""Called from any thread with a number of bytes that were written, or found written already."""


@dataclass(frozen=True)
class Written:
    """What `materialize` did."""

    files: int
    total_bytes: int
    resumed_bytes: int
    """Bytes that an earlier, interrupted run had written."""


def materialize(
    tree: VirtualTree,
    out: Path,
    threads: int | None = None,
    on_progress: OnProgress = lambda count: None,
) -> Written:
    """Write every file of `tree` below `out`, or go on with what an interrupted run left there.

    Raises OutputError if `out` holds anything else, if the disk is too small or if writing fails,
    and ReadFault if a shard cannot be read; the same call then goes on later.
    """
    with _claim(tree, out) as partial:
        parts = [
            _Part(name, file, out, partial)
            for name, file in tree.files.items()
            if not isinstance(file, BytesFile)
        ]
        resumed = sum(part.done for part in parts)
        on_progress(resumed)
        total = sum(file.size for file in tree.files.values())
        _check_space(out, total - resumed)
        _write_parts(parts, threads or _threads(), on_progress)
        for name, file in _config_last(tree):
            _write_small(out, partial, name, file)
            on_progress(file.size)
    return Written(len(tree.files), total, resumed)


def _threads() -> int:
    return max(2, min(8, len(os.sched_getaffinity(0))))


def _config_last(tree: VirtualTree) -> Iterator[tuple[str, BytesFile]]:
    for last in (False, True):
        for name, file in tree.files.items():
            if isinstance(file, BytesFile) and (name == "config.json") == last:
                yield name, file


# -- OUT -----------------------------------------------------------------------------------------


@contextmanager
def _claim(tree: VirtualTree, out: Path) -> Iterator[Path]:
    """The working directory in `out`, ours alone while the block runs, gone if it ends well."""
    partial = out / PARTIAL
    plan = {"fingerprint": fingerprint(tree), "files": len(tree.files)}
    try:
        _refuse_unrelated(out, partial, plan)
        partial.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            lock = stack.enter_context((partial / "lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"{out} is being written by another mcorefs right now") from None
            _write_synced(partial / "plan.json", json.dumps(plan).encode())
            yield partial
        _sync_directory(out)
        _remove(partial)
    except OSError as problem:
        if isinstance(problem, McorefsError):
            raise
        raise OutputError(
            f"{problem.filename or out} cannot be written: {problem.strerror}. Run the same "
            "command again to go on where this stopped"
        ) from None


def _refuse_unrelated(out: Path, partial: Path, plan: object) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is not a directory: name one that is empty or does not exist")
    inside = sorted(entry.name for entry in out.iterdir())
    if not inside:
        return
    planned = partial / "plan.json"
    if inside != [PARTIAL] and not planned.exists():
        raise OutputError(
            f"{out} is not empty (it has {inside[-1]!r}): name a directory that is empty or does "
            "not exist"
        )
    with suppress(FileNotFoundError):
        if planned.read_bytes() != json.dumps(plan).encode():
            raise OutputError(
                f"{out} holds an unfinished materialization of another checkpoint, or of this one "
                "with other options: remove it, or name another directory"
            )


def fingerprint(tree: VirtualTree) -> str:
    """What decides every byte of the tree: small files, headers, and the shards' identity."""
    digest = hashlib.sha256(tree.source.encode())
    for name, file in sorted(tree.files.items()):
        digest.update(f"\0{name}\0{file.size}\0".encode())
        if isinstance(file, BytesFile):
            digest.update(file.data)
            continue
        made = file.file if isinstance(file, AheadFile) else file
        if isinstance(made, SafetensorsFile):
            digest.update(made.layout.header)
    return digest.hexdigest()


def _remove(partial: Path) -> None:
    """Remove the working directory, the plan last: while it is there the next run goes on."""
    for entry in partial.iterdir():
        if entry.name != "plan.json":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (partial / "plan.json").unlink()
    partial.rmdir()
    _sync_directory(partial.parent)


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed + _SPARE > free:
        raise OutputError(
            f"{out} is on a disk with {free / 1e9:,.1f} GB free, but {needed / 1e9:,.1f} GB are "
            "still to be written; free some space or name a directory on another disk"
        )


# -- files ---------------------------------------------------------------------------------------


class _Part:
    """A tensor file on its way to disk. Thread-safe."""

    def __init__(self, name: str, file: VirtualFile, out: Path, partial: Path) -> None:
        self.file = file
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
        if self._final.is_file() and self._final.stat().st_size == self.file.size:
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
                _write_synced(self._note, str(done).encode())

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

    def __init__(self, parts: list[_Part], on_progress: OnProgress) -> None:
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

    def _next(self) -> tuple[_Part, int, int] | None:
        with self._turn:
            return None if self._stopped.is_set() else next(self._pieces, None)

    def stop(self) -> None:
        self._stopped.set()


def _write_parts(parts: list[_Part], threads: int, on_progress: OnProgress) -> None:
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


def _write_small(out: Path, partial: Path, name: str, file: VirtualFile) -> None:
    target, part = out / name, partial / f"{name}.part"
    for path in (target, part):
        path.parent.mkdir(parents=True, exist_ok=True)
    _write_synced(part, read_all(file))
    os.replace(part, target)


def _write_synced(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that after a crash it holds the old content or the new."""
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
