"""A file system that passes a directory on and fails as it is told: `python -m tests.faulty_fs`.

What it is told are files in a directory of orders, looked at for every call:

    stall-NAME          reads (and opening, with `stall-open-NAME`) of NAME wait while it exists
    stall-stat-NAME     so does looking at NAME (then the kernel holds up its directory, too)
    stall-below-NAME    so does looking at what is in NAME
    errno-NAME          "NUMBER COUNT": so many reads of NAME fail with that errno, or so many
                        times opening it with `errno-open-NAME`, or looking at it with
                        `errno-stat-NAME`
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcorefs.mount import mounted

WAITS = 60.0


class Passthrough:
    """The operations, as mfusepy calls them."""

    use_ns = True

    def __init__(self, source: Path, orders: Path) -> None:
        self._source, self._orders = source, orders
        self._lock = threading.Lock()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        for above in Path(path).parents:
            self._stall(f"stall-below-{above.name}")
        self._stall(f"stall-stat-{Path(path).name}")
        self._fail(f"errno-stat-{Path(path).name}")
        status = os.lstat(self._real(path))
        names = ("st_mode", "st_size", "st_nlink", "st_uid", "st_gid", "st_ino")
        return {
            **{name: getattr(status, name) for name in names},
            "st_mtime": status.st_mtime_ns,
            "st_atime": status.st_mtime_ns,
            "st_ctime": status.st_mtime_ns,
        }

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._real(path))]

    def open(self, path: str, flags: int) -> int:
        self._stall(f"stall-open-{Path(path).name}")
        self._fail(f"errno-open-{Path(path).name}")
        return os.open(self._real(path), os.O_RDONLY)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        name = Path(path).name
        self._stall(f"stall-{name}")
        self._fail(f"errno-{name}")
        return os.pread(fh, size, offset)

    def release(self, path: str, fh: int) -> None:
        os.close(fh)

    def _real(self, path: str) -> Path:
        return self._source / path.lstrip("/")

    def _fail(self, name: str) -> None:
        with self._lock:
            order = self._orders / name
            number, count = map(int, order.read_text().split()) if order.exists() else (0, 0)
            if count > 0:
                order.write_text(f"{number} {count - 1}")
                raise OSError(number, os.strerror(number))

    def _stall(self, order: str) -> None:
        deadline = time.monotonic() + WAITS
        while (self._orders / order).exists():
            if time.monotonic() > deadline:
                raise OSError(errno.EIO, "stalled too long for a test")
            time.sleep(0.01)


def lift(orders: Path) -> None:
    """From now on nothing fails."""
    for order in orders.iterdir():
        order.unlink()


@contextmanager
def faulty(source: Path, place: Path) -> Iterator[tuple[Path, Path]]:
    """(`source` as this file system shows it, the directory of orders), both in `place`."""
    shown, orders = place / "shown", place / "orders"
    shown.mkdir()
    orders.mkdir()
    command = [sys.executable, "-m", "tests.faulty_fs", str(source), str(shown), str(orders)]
    server = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    try:
        deadline = time.monotonic() + 20
        while mounted(shown) is None:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield shown, orders
    finally:
        lift(orders)
        server.kill()
        server.wait()
        subprocess.run(["umount", "-l", str(shown)], check=False)


if __name__ == "__main__":
    from mcorefs.mount.binding import LIBFUSE3, _load

    _, _source, _shown, _orders = sys.argv
    # direct_io: every read comes here, none from the page cache.
    _load(LIBFUSE3).fuse_class(
        Passthrough(Path(_source), Path(_orders)), _shown, foreground=True, direct_io=True, ro=True
    )
