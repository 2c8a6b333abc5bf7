"""Files of this machine: handles, preads that never come short, and that a file is still the same.

Read with `pread` into the caller's buffer, never through a mapping: a file truncated under a
mapping is SIGBUS and would end the daemon, a short read is an error that can be reported.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice

from mcorefs.errors import CheckpointError, ReadFault
from mcorefs.files import FileIdentity
from mcorefs.index import MAX_BYTES
from mcorefs.tar import Member, member_at


class _Handle:
    """An open file, or the part of one that is a file in an archive."""

    __slots__ = ("end", "fd", "start", "users")

    def __init__(self, fd: int, start: int, end: int) -> None:
        self.fd, self.start, self.end = fd, start, end
        self.users = 0


class LocalFiles:
    """Files opened as needed and at most `max_open` at a time.

    `identities` are the files as they were when the index was made: one that is no longer the same
    when it is opened is refused with a ReadFault, so that two versions are never mixed. A file
    deleted or replaced while it is open is read on as it was; one truncated in place is a
    ReadFault; one *rewritten* in place is noticed when it is next opened. Thread-safe.
    """

    def __init__(self, identities: Mapping[str, FileIdentity], max_open: int) -> None:
        self._identities = identities
        self._max_open = max_open
        self._handles: OrderedDict[str, _Handle] = OrderedDict()
        self._closed = False
        self._lock = threading.Lock()

    def read_into(self, path: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of `path` from `offset` on. Raises ReadFault if it cannot."""
        if offset < 0:  # preadv would take -1 for "where the last read ended"
            raise ReadFault(f"{path}: there is no byte {offset}")
        done, want = 0, len(out)
        handle = self._open(path)
        try:
            while done < want:
                at = handle.start + offset + done
                count = os.preadv(handle.fd, [out[done : done + max(handle.end - at, 0)]], at)
                if count == 0:
                    raise ReadFault(
                        f"{path}: wanted {want} bytes at {offset} but the file ends after {done}: "
                        "it was truncated after the checkpoint was opened"
                    )
                done += count
        except ReadFault:
            raise
        except (OSError, OverflowError) as problem:
            raise ReadFault(f"{path}: read of {want} bytes at {offset} failed: {problem}") from None
        finally:
            self._release(handle)

    def _open(self, path: str) -> _Handle:
        """A handle of `path`, shared between threads, that stays open until it is released."""
        handle = self._taken(path, None)
        if handle is None:
            # Without the lock: a slow file system must not hold up reads of open files.
            handle = self._taken(path, self._open_checked(path))
        assert handle is not None
        return handle

    def _release(self, handle: _Handle) -> None:
        with self._lock:
            handle.users -= 1
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
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
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


def local_file(path: str) -> tuple[FileIdentity | None, str | None]:
    """Identity of the regular file at `path`, or why there is none: one of the two is None."""
    try:
        if (member := member_at(path)) is not None:
            return _identity(member.status, member), None
        status = os.lstat(path)
    except NotADirectoryError:  # what the system says of a name in an archive
        return None, os.strerror(errno.ENOENT)
    except (OSError, CheckpointError) as problem:
        return None, getattr(problem, "strerror", None) or str(problem)
    if stat.S_ISLNK(status.st_mode):
        return None, "is a symbolic link; pass the directory that holds the files themselves"
    if not stat.S_ISREG(status.st_mode):
        return None, "is not a regular file"
    return FileIdentity.of(status), None


def _identity(status: os.stat_result, member: Member | None) -> FileIdentity:
    """That of a file with this status, or of the member of it: the archive's, but for its size."""
    whole = FileIdentity.of(status)
    return whole if member is None else replace(whole, size=member.nbytes)
