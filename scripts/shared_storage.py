"""File systems that stand for storage that machines share: all of them together so fast.

`Storage(DIR, BYTES_PER_SECOND).mount(MNT)` once for each machine: each has a page cache of its own,
as clients of NFS or Lustre have, and what they read and write takes turns at one bucket.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcorefs.mount.binding import load_binding

FORK = multiprocessing.get_context("fork")


class Storage:
    """The directory `root`, of which `bytes_per_second` can be moved, and `moved` have been."""

    def __init__(self, root: Path, bytes_per_second: float) -> None:
        self.root, self.rate = root.resolve(), bytes_per_second
        self._moved, self._free_at = FORK.Value("q", 0), FORK.Value("d", 0.0)

    @property
    def moved(self) -> int:
        return int(self._moved.value)

    def take(self, size: int) -> None:
        """Wait for the turn of `size` bytes."""
        with self._moved.get_lock():
            self._moved.value += size
            self._free_at.value = max(self._free_at.value, time.monotonic()) + size / self.rate
            wait = self._free_at.value - time.monotonic()
        if wait > 0:
            time.sleep(wait)

    @contextmanager
    def mount(self, mountpoint: Path) -> Iterator[None]:
        """As one machine sees it, until the body ends."""
        mountpoint.mkdir()
        process = FORK.Process(target=_serve, args=(self, mountpoint))
        process.start()
        try:
            while not mountpoint.is_mount():
                time.sleep(0.02)
            yield
        finally:
            subprocess.run(["umount", "-l", str(mountpoint)], check=True)
            process.join()


def _serve(storage: Storage, mountpoint: Path) -> None:
    os.set_blocking(1, True)
    load_binding().fuse_class(
        _Operations(storage), str(mountpoint), foreground=True, fsname="shared-storage"
    )


class _Operations:
    """What reading, and writing as materialize does, needs of a file system."""

    use_ns = True

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def __call__(self, operation: str, *args: Any) -> Any:
        if not hasattr(self, operation):
            raise OSError(errno.ENOSYS, operation)
        return getattr(self, operation)(*args)

    def _at(self, path: str) -> str:
        return f"{self.storage.root}{path}"

    def init(self, path: str) -> None:
        pass

    def destroy(self, path: str) -> None:
        pass

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        found = os.lstat(self._at(path))
        names = ("mode", "nlink", "size", "uid", "gid")
        times = {f"st_{name}": getattr(found, f"st_{name}_ns") for name in ("mtime", "ctime")}
        return {f"st_{name}": getattr(found, f"st_{name}") for name in names} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._at(path))]

    def open(self, path: str, flags: int) -> int:
        return os.open(self._at(path), flags)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        data = os.pread(fh, size, offset)
        self.storage.take(len(data))
        return data

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self.storage.take(len(data))
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._at(path), length)

    def release(self, path: str, fh: int) -> None:
        os.close(fh)

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._at(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))

    def unlink(self, path: str) -> None:
        os.unlink(self._at(path))

    def rename(self, old: str, new: str, *flags: int) -> None:
        os.rename(self._at(old), self._at(new))

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._at(path), mode)

    def utimens(self, path: str, times: tuple[int, int]) -> None:
        os.utime(self._at(path), ns=times)

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._at(path))
        names = ("f_bsize", "f_frsize", "f_blocks", "f_bavail", "f_bfree", "f_namemax")
        return {name: getattr(found, name) for name in names}
