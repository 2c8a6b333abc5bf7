"""Reading a mount once, so that its weights lie in the kernel's page cache when an engine asks.

Engines fault pages in one at a time and in any order; read from front to back they come at the
speed of the storage.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PIECE = 8 << 20
THREADS = 4


def prefetch(mnt: Path, sizes: Mapping[str, int], advance: Callable[[int], None]) -> None:
    """Read the files of the mount at `mnt` that `sizes` names, each of so many bytes.

    `advance` is called from any thread with a number of bytes. Raises the first OSError.
    """
    pieces = _pieces(mnt, sizes)
    turn, failures = threading.Lock(), list[OSError]()

    def work() -> None:
        try:
            while not failures:
                with turn:
                    path, start, count = next(pieces, (mnt, 0, 0))
                if not count:
                    return
                _read(path, start, count)
                advance(count)
        except OSError as problem:
            failures.append(problem)

    workers = [threading.Thread(target=work, name=f"prefetch-{i}") for i in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


def _pieces(mnt: Path, sizes: Mapping[str, int]) -> Iterator[tuple[Path, int, int]]:
    for name, size in sizes.items():
        for start in range(0, size, PIECE):
            yield mnt / name, start, min(PIECE, size - start)


def _read(path: Path, start: int, count: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        buffer = bytearray(1 << 20)
        end = start + count
        while start < end:
            start += os.preadv(fd, [memoryview(buffer)[: end - start]], start) or count
    finally:
        os.close(fd)
