"""What libfuse asks of us, translated to a VirtualTree: paths, errnos and buffers, nothing else."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NoReturn, Protocol, cast

from mcorefs.errors import McorefsError
from mcorefs.mount.nodes import BLOCK, Node, Nodes
from mcorefs.mount.status import HANDLES, Status

log = logging.getLogger("mcorefs.mount")

REQUEST_BYTES = 1 << 20
"""Largest read request asked of the kernel (libfuse 3); its own limit is 256 pages as well."""

BACKGROUND_REQUESTS = 64
"""Requests in flight for which no process waits yet: read-ahead. Those of storage that does not
answer must leave room for others."""
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
_PYBUF_WRITE = 0x200
_memory_at = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_at.restype = ctypes.py_object
_memory_at.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
NAME_MAX = 255
"""Bytes of a name, as on other file systems; the kernel's own limit for FUSE is 1024."""


class ConnectionInfo(Protocol):
    """libfuse 3's struct fuse_conn_info, as far as we set it."""

    max_write: int
    max_read: int
    max_background: int
    congestion_threshold: int


class FileInfo(Protocol):
    fh: int
    direct_io: int

    @property
    def flags(self) -> int: ...


class FileInfoPointer(Protocol):
    @property
    def contents(self) -> FileInfo: ...


class BufferPointer(Protocol):
    @property
    def contents(self) -> ctypes.c_byte: ...


class FaultLog:
    """Logs each distinct failure at most once per `interval` seconds: engines retry in loops."""

    def __init__(self, interval: float = 60.0, remembered: int = 1024) -> None:
        self._interval = interval
        self._remembered = remembered
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._suppressed = 0

    def report(self, message: str, error: BaseException | None = None, path: str = "") -> None:
        """Log `message`, with the traceback of `error` if given; `path` is what it is about."""
        now = time.monotonic()
        with self._lock:
            if now - self._last.get(message, -self._interval) < self._interval:
                self._suppressed += 1
                return
            if len(self._last) >= self._remembered:
                self._last.clear()
            self._last[message] = now
            suppressed, self._suppressed = self._suppressed, 0
        if suppressed:
            message += f" ({suppressed} repeated messages not shown)"
        log.error("%s", message, exc_info=error, extra={"path": path})


class WorkerThreads:
    """Keeps the Python state of libfuse's threads from one request to the next.

    Python makes a new state for a foreign thread at every callback and throws it away after it,
    which costs a third of the time of a 4 KiB read and empties `threading.local`. Only for
    threads that live as long as the session: the state of one that ends is never freed.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: set[int] = set()

    def keep_this(self) -> None:
        """Call from within a callback."""
        thread = threading.get_ident()
        if thread not in self._kept and len(self._kept) < self._limit:
            self._kept.add(thread)
            # Never released, so the callback's own release does not reach zero.
            ctypes.pythonapi.PyGILState_Ensure()


class Turns:
    """How many reads are computed at once. Those beyond wait for their turn, which is cheaper than
    taking turns at the interpreter lock; one that has lasted for SLOW seconds waits for storage,
    not for a processor, and its turn goes to the next. Thread-safe."""

    SLOW = 0.1

    def __init__(self, limit: int) -> None:
        # A queue, not a semaphore: that is Python code around a lock, and three times as slow.
        self._free: SimpleQueue[None] = SimpleQueue()
        for _ in range(limit):
            self._free.put(None)
        self._since: dict[int, float] = {}
        """When each thread got its turn."""

    def __enter__(self) -> None:
        while True:
            try:
                self._free.get(timeout=self.SLOW)
                break
            except Empty:
                then = time.monotonic() - self.SLOW
                for thread, since in list(self._since.items()):
                    if since < then:
                        self._end(thread)
        self._since[threading.get_ident()] = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._end(threading.get_ident())

    def _end(self, thread: int) -> None:
        if self._since.pop(thread, None) is not None:
            self._free.put(None)


class Operations:
    """The callbacks that libfuse gets, as both bindings call them.

    What is left out is left to libfuse and the kernel on purpose: with no `getxattr`,
    `listxattr`, `flush`, `release`, `access` and so on the kernel learns once that there is
    nothing to ask, and asks no more. File handles are inode numbers, so opening keeps no state.
    """

    use_ns = True
    # libfuse need not build paths where there is a file handle.
    flag_nullpath_ok = 1
    flag_nopath = 1

    def __init__(
        self,
        nodes: Nodes,
        workers: WorkerThreads,
        turns: Turns,
        status: Status,
        on_live: Callable[[], None],
    ) -> None:
        """`on_live` is called once when the kernel has the mount; it must not touch the mount."""
        self.nodes = nodes
        self.workers = workers
        self.turns = turns
        self.status = status
        self.faults = FaultLog()
        self._on_live = on_live

    def init(self, path: str) -> None:
        """Start of service, libfuse 2."""
        self._on_live()

    def init_with_config(self, connection: ConnectionInfo | None, config: object) -> None:
        """Start of service, libfuse 3: read requests may be as large as write requests."""
        if connection is not None:
            connection.max_write = connection.max_read = REQUEST_BYTES
            connection.max_background = BACKGROUND_REQUESTS
            connection.congestion_threshold = BACKGROUND_REQUESTS * 3 // 4
        self._on_live()

    def getattr(self, path: str | None, fh: int | None = None) -> Mapping[str, int]:
        return self._node(path, fh).attributes

    def readdir(self, path: str | None, fh: int) -> Iterator[tuple[str, Mapping[str, int], int]]:
        directory = self._node(path, fh)
        if directory.file is not None:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        is_status = directory.inode >= HANDLES
        inside = directory.children if is_status else self.nodes.inside(directory)
        for name, node in ((".", directory), ("..", directory), *inside.items()):
            yield name, node.attributes, 0

    def opendir(self, path: str) -> int:
        return self._node(path, None).inode

    def open(self, path: str, flags: int) -> int:
        if flags & _WRITE_FLAGS:
            self._refuse()
        return self._node(path, None).inode

    def read(self, path: str | None, size: int, offset: int, fh: int) -> NoReturn:
        """Never called: `InPlaceReads.read` takes its place; here so that libfuse gets a read."""
        raise NotImplementedError

    def statfs(self, path: str | None) -> dict[str, int]:
        return {
            "f_bsize": BLOCK,
            "f_frsize": BLOCK,
            "f_blocks": -(-self.nodes.total_bytes // BLOCK),
            "f_files": self.nodes.count,
            "f_namemax": NAME_MAX,
        }

    def _refuse(self, *arguments: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    # The kernel's ro flag answers these first; they matter if root remounts rw.
    chmod = chown = create = fallocate = link = mkdir = mknod = removexattr = rename = _refuse
    rmdir = setxattr = symlink = truncate = unlink = utimens = write = _refuse

    def _node(self, path: str | None, fh: int | None) -> Node:
        if path is None and fh:
            node = self.nodes.of(fh) if fh < HANDLES else self.status.of(fh)
        else:
            node = self.nodes.at(path or "") or self.status.at(path or "")
        if node is None:
            is_long = len(os.fsencode((path or "").rpartition("/")[2])) > NAME_MAX
            number = errno.ENAMETOOLONG if is_long else errno.ENOENT
            raise OSError(number, os.strerror(number))
        return node


class Pins(Protocol):
    """Nodes that want to know which of them are in use."""

    def pin(self, handle: int) -> None: ...

    def unpin(self, handle: int) -> None: ...


class LivingOperations(Operations):
    """The same where there are links, and where files come and go: what is open is kept."""

    def readlink(self, path: str) -> str:
        target = self._node(path, None).target
        if not target:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return target

    def open(self, path: str, flags: int) -> int:
        handle = super().open(path, flags)
        if handle < HANDLES:
            cast(Pins, self.nodes).pin(handle)
        return handle

    def release(self, path: str | None, fh: int) -> None:
        if fh < HANDLES:
            cast(Pins, self.nodes).unpin(fh)


class CallableOperations(Operations):
    """The same for fusepy, which calls the operations object with the name of the operation."""

    def __call__(self, name: str, *arguments: object) -> object:
        return cast(Callable[..., object], getattr(self, name))(*arguments)


class CallableLivingOperations(LivingOperations, CallableOperations):
    """Both."""


class InPlaceReads:
    """Put in front of a binding's FUSE class: reads fill libfuse's own buffer, and no exception
    whatever reaches libfuse."""

    operations: Operations

    def open(self, path: bytes, info: FileInfoPointer) -> int:
        file = info.contents
        file.fh = self.operations.open(os.fsdecode(path), file.flags)
        if file.fh >= HANDLES:
            file.direct_io = 1  # what it says changes
        return 0

    def read(
        self,
        path: bytes | None,
        buffer: BufferPointer,
        size: int,
        offset: int,
        info: FileInfoPointer,
    ) -> int:
        self.operations.workers.keep_this()
        handle = info.contents.fh
        if handle >= HANDLES:
            return self._read_status(buffer, size, offset)
        node = self.operations.nodes.of(handle)
        if node is None or node.file is None:
            return -errno.EISDIR
        size = min(size, node.file.size - offset)
        if size <= 0:
            return 0
        out = cast(memoryview, _memory_at(ctypes.addressof(buffer.contents), size, _PYBUF_WRITE))
        try:
            with self.operations.turns:
                node.file.read_into(offset, out)
        except Exception as error:
            self._report(node, error)
            return -errno.EIO
        finally:
            # libfuse frees the buffer after this call: nobody may write to it any more.
            with suppress(BufferError):
                out.release()
        self.operations.status.served_bytes.add(size)
        return size

    def _read_status(self, buffer: BufferPointer, size: int, offset: int) -> int:
        data = self.operations.status.read(offset, size)
        ctypes.memmove(ctypes.addressof(buffer.contents), data, len(data))
        return len(data)

    def _report(self, node: Node, error: Exception) -> None:
        expected = isinstance(error, (McorefsError, OSError))
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        self.operations.status.failed(f"{node.path}: {reason}")
        self.operations.faults.report(
            f"reading {node.path} failed, the reader gets EIO: {reason}",
            None if expected else error,
            node.path,
        )

    def _wrapper(self, function: Callable[..., int | None], *arguments: object) -> int:
        """Call one of the binding's methods for libfuse; replaces the binding's own wrapper,
        which ends the file system on some exceptions."""
        try:
            return function(*arguments) or 0
        except OSError as error:
            return -(error.errno or errno.EIO)
        except UnicodeDecodeError:
            return -errno.ENOENT  # a name that is not UTF-8 is not one of ours
        except BaseException as error:
            # An exception that left this method would be taken for success with 0 bytes.
            with suppress(BaseException):
                name = getattr(function, "__name__", "?")
                self.operations.faults.report(f"FUSE {name} failed: {error!r}", error)
            return -errno.EIO
