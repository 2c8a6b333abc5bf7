"""OUT: who may write there, what is there already, and when it is complete.

While it is written, OUT holds a directory `.mcorefs-partial` with the plan's fingerprint, the files
that are being written and how far each is safely on disk. Any number of processes, on any machines
that share the directory, may write different files of one plan; each is locked by who writes it.
A file of weights gets its place and name in OUT when it is complete and synced. Whoever finds them
all there adds the small files, config.json last, so nothing loads from an unfinished OUT.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mcorefs.errors import McorefsError, OutputError
from mcorefs.files import BytesFile, VirtualFile, read_all
from mcorefs.reader import SafetensorsFile
from mcorefs.remote.ahead import AheadFile
from mcorefs.tree import VirtualTree

PARTIAL = ".mcorefs-partial"
PLAN = "plan.json"
_SPARE = 16 << 20
"""Disk space left free, for the file system's own needs."""
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems answer that have no locks (Lustre without -o flock)."""


def large(tree: VirtualTree) -> dict[str, VirtualFile]:
    """The files that are written piece by piece, by name: the weights."""
    return {name: file for name, file in tree.files.items() if not isinstance(file, BytesFile)}


@contextmanager
def claimed(tree: VirtualTree, out: Path) -> Iterator[Path]:
    """The working directory in `out`, which is ours and that of others with the same plan.

    Raises OutputError if `out` holds anything else, and for whatever cannot be written.
    """
    partial = out / PARTIAL
    plan = {"fingerprint": fingerprint(tree), "files": len(tree.files)}
    try:
        _refuse_unrelated(tree, out, partial, plan)
        partial.mkdir(parents=True, exist_ok=True)
        if not (partial / PLAN).exists():
            write_synced(partial / PLAN, json.dumps(plan).encode())
        yield partial
    except OSError as problem:
        if isinstance(problem, McorefsError):
            raise
        raise OutputError(
            f"{problem.filename or out} cannot be written: {problem.strerror}. Run the same "
            "command again to go on where this stopped"
        ) from None


def _refuse_unrelated(tree: VirtualTree, out: Path, partial: Path, plan: object) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is not a directory: name one that is empty or does not exist")
    inside = sorted(entry.name for entry in out.iterdir())
    if not inside:
        return
    planned = partial / PLAN
    if inside != [PARTIAL] and not planned.exists():
        whole = all(is_there(out, name, file) for name, file in tree.files.items())
        found = "all files of this model already" if whole else repr(inside[-1])
        raise OutputError(
            f"{out} is not empty (it has {found}): name a directory that is empty or does not exist"
        )
    with suppress(FileNotFoundError):
        if planned.read_bytes() != json.dumps(plan).encode():
            raise OutputError(
                f"{out} holds an unfinished materialization of another checkpoint, or of this one "
                "with other options: remove it, or name another directory"
            )


def fingerprint(tree: VirtualTree) -> str:
    """What decides every byte of the tree: small files, headers, and the shards' identity."""
    digest = hashlib.sha256(tree.source.encode(errors="surrogateescape"))
    for name, file in sorted(tree.files.items()):
        digest.update(f"\0{name}\0{file.size}\0".encode(errors="surrogateescape"))
        if isinstance(file, BytesFile):
            digest.update(file.data)
            continue
        made = file.file if isinstance(file, AheadFile) else file
        if isinstance(made, SafetensorsFile):
            digest.update(made.layout.header)
    return digest.hexdigest()


def is_there(out: Path, name: str, file: VirtualFile) -> bool:
    """Whether a file is complete: one of weights has its name only then."""
    try:
        return (out / name).stat().st_size == file.size
    except (FileNotFoundError, NotADirectoryError):
        return False


def finish(tree: VirtualTree, out: Path) -> tuple[str, ...]:
    """Add the small files, if all weights are there, and take the working directory away; else the
    names of those that are wanting. Safe to call by many at once, and again."""
    missing = tuple(name for name, file in large(tree).items() if not is_there(out, name, file))
    if missing:
        return missing
    partial = out / PARTIAL
    try:
        with (partial / "finish.lock").open("w") as lock:
            _lock(lock, wait=True)
            if not (partial / PLAN).exists():
                # Another process was faster; what this one has put there since is nobody's.
                shutil.rmtree(partial, ignore_errors=True)
                return ()
            for name, file in _config_last(tree):
                _write_small(out, partial, name, file)
            sync_directory(out)
            _remove(partial)
    except FileNotFoundError:
        if partial.exists():
            raise
    return ()


def _config_last(tree: VirtualTree) -> Iterator[tuple[str, BytesFile]]:
    for last in (False, True):
        for name, file in tree.files.items():
            if isinstance(file, BytesFile) and (name == "config.json") == last:
                yield name, file


def _write_small(out: Path, partial: Path, name: str, file: VirtualFile) -> None:
    target, part = out / name, partial / f"{name}.part"
    for path in (target, part):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_synced(part, read_all(file))
    os.replace(part, target)


def _remove(partial: Path) -> None:
    """Remove the working directory, the plan last: while it is there the next run goes on."""
    for entry in partial.iterdir():
        if entry.name != PLAN:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (partial / PLAN).unlink()
    with suppress(OSError):
        # Another process that came to finish may just have made its lock again.
        partial.rmdir()
    if partial.exists():
        shutil.rmtree(partial, ignore_errors=True)
    sync_directory(partial.parent)


def check_space(out: Path, needed: int) -> None:
    """Raise OutputError where `needed` bytes do not fit."""
    free = shutil.disk_usage(out).free
    if needed + _SPARE > free:
        raise OutputError(
            f"{out} is on a disk with {free / 1e9:,.1f} GB free, but {needed / 1e9:,.1f} GB are "
            "still to be written; free some space or name a directory on another disk"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The lock of one output file. Raises OutputError where another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            _lock(file, wait=False)
        except BlockingIOError:
            raise OutputError(
                f"{path.with_suffix('').name} is being written by another mcorefs right now"
            ) from None
        yield


def _lock(file: IO[str], *, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as problem:
        if problem.errno not in _NO_LOCKS:
            raise


def write_synced(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that after a crash it holds the old content or the new."""
    fresh = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def sync_directory(path: Path) -> None:
    """Make the names in `path` safe."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
