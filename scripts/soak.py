"""Many readers of real mounts for a long time: the bytes stay right, the daemons stay small.

Each reader takes a file of one of the mounts (the first checkpoint is mounted twice) and reads it
at random offsets in random sizes by pread or through mmap, or from end to end; all is compared with
what save_pretrained wrote. Memory and descriptors of the daemons are looked at all the while.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mcorefs.mount import mounted
from tests.checkpoints import Fixture, ensure

NAMES = ("qwen3_moe-tp2-pp2-ep2", "torch-qwen3-tp2", "zarr-qwen3_moe-tp2-pp2-ep2")
"""Rows and columns of several ranks, straight runs, and transposed chunks: tiles and no tiles."""
PROCESSES = 8
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Served:
    """A mount, and the directory with the right answers."""

    mnt: Path
    hf: Path
    pid: int
    """Of the daemon."""

    @property
    def rss(self) -> int:
        """Bytes of memory that are the daemon's own."""
        status = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextmanager
def serving(fixture: Fixture, mnt: Path, *options: str) -> Iterator[Served]:
    """The fixture at `mnt` by the command line, as long as somebody wants it."""
    mnt.mkdir()
    spec = fixture.spec
    command = ["mount", str(fixture.root), str(mnt), "--foreground"]
    command += ["--vocab-size", str(spec.vocab_size), *options]
    command += ["--shard-size", spec.hf_max_shard_size or "50GB"]
    with (mnt.parent / f"{mnt.name}.log").open("wb") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "mcorefs", *command], stdout=log, stderr=log
        )
    try:
        for _ in range(600):
            if mounted(mnt) is not None and any(mnt.iterdir()):
                break
            assert daemon.poll() is None, (mnt.parent / f"{mnt.name}.log").read_text()
            time.sleep(0.05)
        yield Served(mnt, fixture.hf, daemon.pid)
        assert daemon.poll() is None, "the daemon died"
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(30)
        finally:
            daemon.kill()
            subprocess.run(["umount", "-l", str(mnt)], check=False, capture_output=True)


class Reader:
    """Reads the files of some mounts, as random numbers will."""

    def __init__(self, places: Sequence[tuple[str, str]], seed: int) -> None:
        self._rng = random.Random(seed)
        self._files = [
            (Path(mnt) / file.name, file.read_bytes())
            for mnt, hf in places
            for file in sorted(Path(hf).glob("*.safetensors*"))
        ]

    def once(self) -> int:
        """Opens a file and reads of it; how many bytes. Raises AssertionError if one is wrong."""
        path, wanted = self._rng.choice(self._files)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            assert os.fstat(fd).st_size == len(wanted), path
            how = self._rng.randrange(4)
            if how == 0:
                return self._whole(path, fd, wanted)
            if how == 1:
                with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
                    return sum(self._part(path, mapped, wanted) for _ in range(20))
            if how == 2:  # what the page cache holds is forgotten: the daemon is asked again
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return sum(self._part(path, fd, wanted) for _ in range(20))
        finally:
            os.close(fd)

    def _whole(self, path: Path, fd: int, wanted: bytes) -> int:
        size = self._rng.choice((4096, 65536, 1 << 20))
        for at in range(0, len(wanted) + size, size):
            assert os.pread(fd, size, at) == wanted[at : at + size], (path, at, size)
        return len(wanted)

    def _part(self, path: Path, source: int | mmap.mmap, wanted: bytes) -> int:
        at = self._rng.randrange(len(wanted) + 1)
        size = int(2 ** self._rng.uniform(0, 20))
        end = at + size
        found = os.pread(source, size, at) if isinstance(source, int) else source[at:end]
        assert found == wanted[at : at + size], (path, at, size)
        return len(found)


def read_for(seconds: float, places: Sequence[tuple[str, str]], threads: int, seed: int) -> None:
    """One process of readers; it ends with status 1 if a byte was wrong or nothing was read."""
    end = time.monotonic() + seconds
    counts = [0] * threads
    wrong: list[str] = []

    def run(number: int) -> None:
        reader = Reader(places, seed + number)
        try:
            while time.monotonic() < end and not wrong:
                counts[number] += reader.once()
        except Exception as problem:
            wrong.append(f"{type(problem).__name__}: {problem!s:.500}")

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if wrong or 0 in counts:
        sys.exit("\n".join(wrong) or "a reader read nothing")


@dataclass
class Most:
    """The most that a daemon used in each third of the time."""

    rss: list[int]
    descriptors: list[int]


def soak(
    fixtures: Sequence[Fixture], directory: Path, seconds: float, readers: int, cache: str
) -> list[Most]:
    """Reads for so long, and returns what each daemon used. Raises AssertionError."""
    mounts = [*fixtures, fixtures[0]]  # one of them twice
    with ExitStack() as stack:
        served = [
            stack.enter_context(serving(fixture, directory / f"mnt{number}", "--cache-size", cache))
            for number, fixture in enumerate(mounts)
        ]
        places = [(str(each.mnt), str(each.hf)) for each in served]
        shares = [readers // PROCESSES + (i < readers % PROCESSES) for i in range(PROCESSES)]
        processes = [
            SPAWN.Process(target=read_for, args=(seconds, places, share, 1000 * number))
            for number, share in enumerate(shares)
            if share
        ]
        used = [Most([0, 0, 0], [0, 0, 0]) for _ in served]
        for process in processes:
            process.start()
        start = time.monotonic()
        while any(process.is_alive() for process in processes):
            third = min(int(3 * (time.monotonic() - start) / seconds), 2)
            for most, each in zip(used, served, strict=True):
                most.rss[third] = max(most.rss[third], each.rss)
                most.descriptors[third] = max(most.descriptors[third], each.descriptors)
            time.sleep(0.1)
            assert time.monotonic() - start < seconds + 120, "readers hang"
        assert [process.exitcode for process in processes] == [0] * len(processes)
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--readers", type=int, default=64)
    parser.add_argument("--cache-size", default="64MiB")
    given = parser.parse_args()
    fixtures = [*ensure(NAMES).values()]
    with tempfile.TemporaryDirectory(prefix="mcorefs-soak-") as directory:
        used = soak(fixtures, Path(directory), 60 * given.minutes, given.readers, given.cache_size)
    for most in used:
        rss = ", ".join(f"{count >> 20} MiB" for count in most.rss)
        print(f"memory {rss}; descriptors {most.descriptors} (in each third of the time)")


if __name__ == "__main__":
    main()
