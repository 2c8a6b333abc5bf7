"""Reading spans: file handles, preads that never come short, and where a chunk's elements lie.

Files are read with `pread` into the caller's buffer, never through a mapping: a file truncated
under a mapping is SIGBUS and would end the daemon, a short read is an error that can be reported.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from mcorefs.boxes import Shape, row_major_strides
from mcorefs.dtypes import DType
from mcorefs.errors import CheckpointError, ReadFault
from mcorefs.index import Chunk, Span
from mcorefs.torchzip import Locator, Record, data_start


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What must stay the same about a file for its bytes to be the same."""

    size: int
    mtime_ns: int
    inode: int

    @staticmethod
    def of(status: os.stat_result) -> FileIdentity:
        return FileIdentity(status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a chunk's elements lie in its file; strides in elements."""

    path: str
    offset: int
    strides: Shape


class _Handle:
    __slots__ = ("fd", "users")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0


class Storage:
    """The shard files of one checkpoint, opened as needed and at most `max_open` at a time.

    `identities` are the files as they were when the index was made: a file that is no longer the
    same when it is opened is refused with a ReadFault, so that two versions are never mixed. A
    file deleted or replaced while it is open is read on as it was; one truncated in place is a
    ReadFault; one *rewritten* in place is noticed when it is next opened. Thread-safe.
    """

    def __init__(self, identities: Mapping[str, FileIdentity], max_open: int = 512) -> None:
        self._identities = identities
        self._max_open = max_open
        self._handles: OrderedDict[str, _Handle] = OrderedDict()
        self._locator = Locator()
        self._placed: dict[Span, Placed] = {}
        self._record_starts: dict[tuple[str, int], int] = {}
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
                count = os.preadv(handle.fd, [out[done:]], offset + done)
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

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        """The bytes [offset, offset + nbytes) of `path`. Raises ReadFault if it cannot."""
        out = bytearray(nbytes)
        self.read_into(path, offset, memoryview(out))
        return bytes(out)

    def place(self, chunk: Chunk, dtype: DType) -> Placed:
        """Where the elements of `chunk` lie, found on first use and kept.

        Raises ReadFault when the entry contradicts the index or cannot be read.
        """
        span = chunk.span
        placed = self._placed.get(span)
        if placed is None:
            placed = self._placed[span] = self._find(chunk, dtype)
        return placed

    def _find(self, chunk: Chunk, dtype: DType) -> Placed:
        span, shape = chunk.span, chunk.box.sizes
        strides = row_major_strides(shape) if span.strides is None else span.strides
        if span.kind == "raw":
            return Placed(span.path, span.offset + span.skip, strides)
        if span.kind == "zip_record":
            return Placed(span.path, self._record_start(span) + span.skip, strides)
        what = f"{span.path} (entry at byte {span.offset})"
        try:
            start, tensor = self._locator.locate(
                lambda offset, count: self.read(span.path, span.offset + offset, count),
                span.nbytes,
                what,
            )
            if tensor.size != shape or tensor.dtype != dtype:
                raise CheckpointError(
                    f"{what}: .metadata says {dtype.torch} {list(shape)} but the entry holds "
                    f"{tensor.dtype.torch} {list(tensor.size)}"
                )
        except ReadFault:
            raise
        except CheckpointError as problem:
            raise ReadFault(str(problem)) from None
        offset = span.offset + start + tensor.offset * dtype.itemsize
        return Placed(span.path, offset, tensor.stride)

    def _record_start(self, span: Span) -> int:
        """Offset of a zip record's data; many chunks may lie in one record, so it is kept."""
        key = span.path, span.offset
        start = self._record_starts.get(key)
        if start is None:
            record = Record(f"at byte {span.offset}", span.offset, span.nbytes)

            def pread(offset: int, nbytes: int) -> bytes:
                return self.read(span.path, offset, nbytes)

            try:
                start = data_start(pread, record, self._identities[span.path].size, span.path)
            except ReadFault:
                raise
            except CheckpointError as problem:
                raise ReadFault(str(problem)) from None
            self._record_starts[key] = start
        return start

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

    def _taken(self, path: str, fd: int | None) -> _Handle | None:
        """The handle of `path`, in use from now on; made of `fd` if there is none yet."""
        with self._lock:
            handle = self._handles.get(path)
            if self._closed:
                if fd is not None:
                    os.close(fd)
                raise ReadFault(f"{path}: the checkpoint has been closed")
            if handle is None:
                if fd is None:
                    return None
                handle = self._handles[path] = _Handle(fd)
            elif fd is not None:
                os.close(fd)  # another thread was faster
            self._handles.move_to_end(path)
            handle.users += 1
            self._close_idle()
            return handle

    def _open_checked(self, path: str) -> int:
        try:
            # O_NONBLOCK: a FIFO put in the place of a shard must not wait for a writer.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (OSError, ValueError) as problem:
            raise ReadFault(
                f"{path} cannot be opened: {problem}; it was there when the checkpoint was opened"
            ) from None
        status = os.fstat(fd)
        expected, found = self._identities.get(path), FileIdentity.of(status)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise ReadFault(f"{path} is not a regular file any more")
        if expected is not None and found != expected:
            os.close(fd)
            raise ReadFault(
                f"{path} was replaced after the checkpoint was opened (size {expected.size} then, "
                f"{found.size} now); unmount and mount again to serve the new one"
            )
        return fd

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


def regular_file(path: str) -> tuple[FileIdentity | None, str | None]:
    """Identity of the regular file at `path`, or why there is none: one of the two is None."""
    try:
        status = os.lstat(path)
    except OSError as problem:
        return None, problem.strerror or "cannot be opened"
    if stat.S_ISLNK(status.st_mode):
        return None, "is a symbolic link; pass the directory that holds the files themselves"
    if not stat.S_ISREG(status.st_mode):
        return None, "is not a regular file"
    return FileIdentity.of(status), None


def is_file_name(name: str) -> bool:
    """Whether `name` is that of a file in a directory: no path, and one the system can take."""
    if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
