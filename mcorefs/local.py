"""Files of this machine: handles, preads that never come short, and that a file is still the same.

Read with `pread` into the caller's buffer, never through a mapping: a file truncated under a
mapping is SIGBUS and would end the daemon, a short read is an error that can be reported.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from mcorefs.deadline import MAX_IDLE, Deadline, LateError
from mcorefs.errors import CheckpointError, ReadFault
from mcorefs.files import FileIdentity
from mcorefs.index import MAX_BYTES
from mcorefs.patience import PASSING, PAUSES, again
from mcorefs.tar import Member, member_at

T = TypeVar("T")

PIECE = 1 << 20
"""Most bytes that another thread reads at once."""
SMALL = 128 << 10
LOOKS = (0, 20e-6, 40e-6, 80e-6, 160e-6, 320e-6)
"""Seconds after which to look again for what does not lie in memory yet, before another thread
waits for it: having been asked, the kernel fetches no more than SMALL bytes at once (since Linux
5.10, mm/filemap.c filemap_get_pages), and most disks answer in less time than two threads take to
hand over and back."""
PATIENCE = 8
"""Times in a row that it was not there after all looks, after which a file gets but the first."""


_READABLE = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


class _Handle:
    """An open file, or the part of one that is a file in an archive."""

    __slots__ = (
        "end",
        "fd",
        "is_forgotten",
        "knows_nowait",
        "never_waits",
        "patience",
        "start",
        "users",
    )

    def __init__(self, fd: int, start: int, end: int) -> None:
        self.fd, self.start, self.end = fd, start, end
        self.users = 0
        self.is_forgotten = False
        self.knows_nowait = True
        """Whether its file system can say that a read would have to wait."""
        self.never_waits = False
        self.patience = PATIENCE


class LocalFiles:
    """Files opened as needed and at most `max_open` at a time.

    `identities` are the files as they were when the index was made: one that is no longer the same
    when it is opened is refused with a ReadFault, so that two versions are never mixed. A file
    deleted or replaced while it is open is read on as it was; one truncated in place is a
    ReadFault; one *rewritten* in place is noticed when it is next opened. Thread-safe.

    Errors that may pass are tried again (PAUSES). With a `deadline`, no call waits longer for the
    file system than that. What lies in memory, or does when it is looked at again (LOOKS), is still
    read by the calling thread, straight into its buffer: only a read that has to wait, as the
    kernel says (RWF_NOWAIT), is another thread's, through a buffer of its own, because the
    caller's is not its own once the caller has gone.
    """

    def __init__(
        self,
        identities: Mapping[str, FileIdentity],
        max_open: int,
        deadline: Deadline | None = None,
    ) -> None:
        self._identities = identities
        self._max_open = max_open
        self._deadline = deadline
        self._handles: OrderedDict[str, _Handle] = OrderedDict()
        self._buffers: list[bytearray] = []
        self._closed = False
        self._lock = threading.Lock()

    def read_into(self, path: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of `path` from `offset` on. Raises ReadFault if it cannot."""
        if offset < 0:  # preadv would take -1 for "where the last read ended"
            raise ReadFault(f"{path}: there is no byte {offset}")
        done, want = 0, len(out)
        pauses = iter(PAUSES)
        while True:
            handle = self._open(path)
            try:
                while done < want:
                    done += self._read(path, handle, offset, done, out)
                return
            except (OSError, OverflowError) as problem:
                if isinstance(problem, ReadFault):
                    raise
                number = getattr(problem, "errno", None)
                pause = next(pauses, None) if number in PASSING else None
                if pause is None:
                    raise ReadFault(
                        f"{path}: read of {want} bytes at {offset} failed: {problem}"
                    ) from None
                if number == errno.ESTALE:
                    self._forget(path, handle)  # and open it again, if it is still the same
            finally:
                self._release(handle)
            time.sleep(pause)

    def hold(self) -> None:
        """Open all files, as far as they may be open at once: what is then deleted can be read on.
        Those that cannot be opened are left for who reads them."""
        for path in islice(self._identities, self._max_open):
            with suppress(ReadFault):
                self._release(self._open(path))

    def let_go(self) -> None:
        """Close all files that nobody reads: a deleted one takes up its space until then."""
        with self._lock:
            for path, handle in list(self._handles.items()):
                if handle.users == 0:
                    os.close(self._handles.pop(path).fd)

    def _read(self, path: str, handle: _Handle, offset: int, done: int, out: memoryview) -> int:
        """Fill `out` from `done` on with some bytes, at least one; how many."""
        at = handle.start + offset + done
        part = out[done : done + max(handle.end - at, 0)]
        count = self._read_at(path, handle, at, part)
        if count == 0:
            raise ReadFault(
                f"{path}: wanted {len(out)} bytes at {offset} but the file ends after {done}: "
                "it was truncated after the checkpoint was opened"
            )
        return count

    def _read_at(self, path: str, handle: _Handle, at: int, out: memoryview) -> int:
        if self._deadline is None or handle.never_waits:
            return os.preadv(handle.fd, [out], at)
        if handle.knows_nowait:
            try:
                if count := _read_at_once(handle, out, at):
                    return count
            except OSError as problem:
                if problem.errno != errno.EOPNOTSUPP:
                    raise
                handle.knows_nowait = False
                handle.never_waits = _is_memory(os.fstat(handle.fd).st_dev)
        return self._read_in_time(path, handle, at, out)

    def _read_in_time(self, path: str, handle: _Handle, at: int, out: memoryview) -> int:
        want = min(len(out), PIECE)
        with self._lock:
            handle.users += 1  # for the thread that reads, should this one go first

        def work() -> tuple[bytearray, int]:
            buffer = self._buffers.pop() if self._buffers else bytearray(PIECE)
            return buffer, os.preadv(handle.fd, [memoryview(buffer)[:want]], at)

        def end(result: tuple[bytearray, int] | None) -> None:
            if result is not None and len(self._buffers) < MAX_IDLE:
                self._buffers.append(result[0])
            self._release(handle)

        buffer, count = self._in_time(path, work, end)
        out[:count] = memoryview(buffer)[:count]
        end((buffer, count))
        return count

    def _in_time(self, path: str, work: Callable[[], T], lost: Callable[[T | None], None]) -> T:
        assert self._deadline is not None
        try:
            return self._deadline.run(path, work, lost)
        except LateError as problem:
            raise ReadFault(f"{path}: its storage does not answer: {problem}") from None

    def _open(self, path: str) -> _Handle:
        """A handle of `path`, shared between threads, that stays open until it is released."""
        handle = self._taken(path, None)
        if handle is None:
            # Without the lock: a slow file system must not hold up reads of open files.
            handle = self._taken(path, self._open_in_time(path))
        assert handle is not None
        return handle

    def _open_in_time(self, path: str) -> _Handle:
        if self._deadline is None:
            return self._open_checked(path)

        def lost(handle: _Handle | None) -> None:
            if handle is not None:
                os.close(handle.fd)

        return self._in_time(path, lambda: self._open_checked(path), lost)

    def _forget(self, path: str, handle: _Handle) -> None:
        """Have the next read open `path` anew; the handle is closed when nobody reads from it."""
        with self._lock:
            if self._handles.get(path) is handle:
                del self._handles[path]
                handle.is_forgotten = True

    def _release(self, handle: _Handle) -> None:
        with self._lock:
            handle.users -= 1
            if handle.is_forgotten and handle.users == 0:
                os.close(handle.fd)
            self._close_idle()

    def _taken(self, path: str, new: _Handle | None) -> _Handle | None:
        """The handle of `path`, in use from now on; `new` if there is none yet."""
        with self._lock:
            handle = self._handles.get(path)
            if self._closed:
                if new is not None:
                    os.close(new.fd)
                raise ReadFault(f"{path}: the checkpoint has been closed")
            if handle is None:
                if new is None:
                    return None
                handle = self._handles[path] = new
            elif new is not None:
                os.close(new.fd)  # another thread was faster
            self._handles.move_to_end(path)
            handle.users += 1
            self._close_idle()
            return handle

    def _open_checked(self, path: str) -> _Handle:
        try:
            member = member_at(path)
            name = path if member is None else member.archive
            # O_NONBLOCK: a FIFO put in the place of a shard must not wait for a writer.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = again(lambda: os.open(name, flags))
        except (OSError, ValueError, CheckpointError) as problem:
            raise ReadFault(
                f"{path} cannot be opened: {problem}; it was there when the checkpoint was opened"
            ) from None
        status = os.fstat(fd)
        expected, found = self._identities.get(path), _identity(status, member)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise ReadFault(f"{path} is not a regular file any more")
        if expected is not None and found != expected:
            os.close(fd)
            raise ReadFault(
                f"{path} was replaced after the checkpoint was opened (size {expected.size} then, "
                f"{found.size} now); unmount and mount again to serve the new one"
            )
        return _Handle(fd, 0, MAX_BYTES) if member is None else _Handle(fd, *member.range)

    def _close_idle(self) -> None:
        """Close handles that are too many, those used longest ago first and none that is in use.
        Called with the lock held."""
        excess = len(self._handles) - (0 if self._closed else self._max_open)
        if excess <= 0:
            return
        idle = (path for path, handle in self._handles.items() if handle.users == 0)
        for path in list(islice(idle, excess)):
            os.close(self._handles.pop(path).fd)

    def close(self) -> None:
        """Close every file, those of reads in progress when they end; later reads are refused."""
        with self._lock:
            self._closed = True
            self._close_idle()

    def __del__(self) -> None:
        self.close()


def _read_at_once(handle: _Handle, out: memoryview, at: int) -> int:
    """Fill `out` as far as it lies in memory, or does very soon; 0 if it has to be waited for."""
    looks = LOOKS if len(out) <= SMALL and handle.patience else LOOKS[:1]
    for pause in looks:
        if pause:
            time.sleep(pause)
        try:
            count = os.preadv(handle.fd, [out], at, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        if pause:
            handle.patience = PATIENCE
        return count
    if len(looks) > 1:
        handle.patience = max(0, handle.patience - 1)
    return 0


def _is_memory(device: int) -> bool:
    """Whether the file system with this number has nothing to wait for (proc_pid_mountinfo(5))."""
    number = f"{os.major(device)}:{os.minor(device)}".encode()
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            lines = [line.split() for line in file if number in line]
    except OSError:
        return False
    types = [line[line.index(b"-") + 1] for line in lines if line[2] == number and b"-" in line]
    return any(kind in (b"tmpfs", b"ramfs") for kind in types)


def local_file(path: str) -> tuple[FileIdentity | None, str | None]:
    """Identity of the regular file at `path`, or why there is none: one of the two is None."""
    try:
        if (member := member_at(path)) is not None:
            return _identity(member.status, member), None
        status = again(lambda: os.lstat(path))
    except NotADirectoryError:  # what the system says of a name in an archive
        return None, os.strerror(errno.ENOENT)
    except (OSError, CheckpointError) as problem:
        return None, getattr(problem, "strerror", None) or str(problem)
    if stat.S_ISLNK(status.st_mode):
        return None, "is a symbolic link; pass the directory that holds the files themselves"
    if not stat.S_ISREG(status.st_mode):
        return None, "is not a regular file"
    if not _may_be_read(path, status.st_mode):
        return None, f"cannot be read: {os.strerror(errno.EACCES)}"
    return FileIdentity.of(status), None


def _may_be_read(path: str, mode: int) -> bool:
    """By this user; the file system is asked only where the mode leaves it open."""
    if mode & _READABLE == _READABLE or os.geteuid() == 0:
        return True
    return os.access(path, os.R_OK, effective_ids=True)


def _identity(status: os.stat_result, member: Member | None) -> FileIdentity:
    """That of a file with this status, or of the member of it: the archive's, but for its size."""
    whole = FileIdentity.of(status)
    return whole if member is None else replace(whole, size=member.nbytes)
