"""`touch.py FILE... [--user UID] [--threads N] [--times N]`: fault every page of files in by mmap.

Prints the seconds of each time. --user becomes that user before the files are opened; with
--open-first after it, for files in directories that it cannot see into.
"""

from __future__ import annotations

import argparse
import mmap
import os
import threading
import time

import numpy as np

PIECE = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--user", type=int)
    parser.add_argument("--open-first", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--times", type=int, default=1)
    options = parser.parse_args()
    if options.user and not options.open_first:
        os.setuid(options.user)
    fds = [os.open(name, os.O_RDONLY) for name in options.files]
    if options.user and options.open_first:
        os.setuid(options.user)
    for _ in range(options.times):
        print(_touch(fds, options.threads))


def _touch(fds: list[int], threads: int) -> float:
    """Seconds; each thread takes the next piece, of the files in turns."""
    maps = [np.frombuffer(mmap.mmap(fd, 0, prot=mmap.PROT_READ), np.uint8) for fd in fds]
    most = max(map(len, maps))
    pieces = (one[at : at + PIECE : 4096] for at in range(0, most, PIECE) for one in maps)
    turn = threading.Lock()

    def work() -> None:
        while True:
            with turn:
                piece = next(pieces, None)
            if piece is None:
                return
            piece.sum()  # without the interpreter's lock

    workers = [threading.Thread(target=work) for _ in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
