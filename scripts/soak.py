"""Many readers of real mounts for a long time: the bytes stay right, the daemons stay small.

Each reader takes a file of one of the mounts (the first checkpoint is mounted twice) and reads it
at random offsets in random sizes by pread, past the page cache or through mmap, or a stretch of it
from end to end; all is compared with what save_pretrained wrote. Memory and descriptors of the
daemons are looked at all the while, and must not grow from one third of the time to the next.
"""

from __future__ import annotations

import argparse
import json
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
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from mcorefs.mount import mounted
from mcorefs.mount.status import PATH as STATUS
from scripts.benchmarks.places import place

if TYPE_CHECKING:
    from tests.checkpoints import Fixture

NAMES = ("qwen3_moe-tp2-pp2-ep2", "torch-qwen3-tp2", "zarr-qwen3_moe-tp2-pp2-ep2")
"""Rows and columns of several ranks, straight runs, and transposed chunks: tiles and no tiles."""
LARGE = "transposed-small"
"""One of `scripts/bench` whose tiles no cache of 64 MiB holds."""
PROCESSES = 8
STRETCH = 16 << 20
MIB = 1 << 20
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Model:
    """A checkpoint, how it is mounted, and the directory with the right answers."""

    root: Path
    hf: Path
    options: tuple[str, ...] = ()

    @classmethod
    def of(cls, fixture: Fixture) -> Model:
        spec = fixture.spec
        cut = ("--vocab-size", str(spec.vocab_size))
        return cls(
            fixture.root, fixture.hf, (*cut, "--shard-size", spec.hf_max_shard_size or "50GB")
        )

    @classmethod
    def large(cls, directory: Path) -> Model:
        made = place(directory, LARGE)
        return cls(made.checkpoint, made.real, ("--tokenizer", str(made.real)))


@dataclass(frozen=True)
class Sample:
    """What a daemon had at one moment."""

    seconds: float
    rss: int
    """Bytes of memory that are its own."""
    descriptors: int


@dataclass(frozen=True)
class Served:
    """A mount, and what its daemon used all the while."""

    mnt: Path
    hf: Path
    pid: int
    """Of the daemon."""
    samples: list[Sample] = field(default_factory=list)

    def sample(self, seconds: float) -> None:
        status = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        rss = sum(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))
        self.samples.append(Sample(seconds, rss, len(os.listdir(f"/proc/{self.pid}/fd"))))

    def most(self, parts: int) -> list[tuple[int, int]]:
        """The most memory and the most descriptors in each of so many parts of the time."""
        whole = self.samples[-1].seconds
        found = [(0, 0)] * parts
        for one in self.samples:
            at = min(int(parts * one.seconds / whole), parts - 1)
            rss, descriptors = found[at]
            found[at] = max(rss, one.rss), max(descriptors, one.descriptors)
        return found

    def asked(self) -> dict[str, int]:
        """What the daemon counted."""
        return dict(json.loads((self.mnt / STATUS).read_text()))


@contextmanager
def serving(model: Model, mnt: Path, *options: str) -> Iterator[Served]:
    """The model at `mnt` by the command line, as long as somebody wants it."""
    mnt.mkdir()
    command = ["mount", str(model.root), str(mnt), "--foreground", *model.options, *options]
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
        yield Served(mnt, model.hf, daemon.pid)
        assert daemon.poll() is None, "the daemon died"
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(30)
        finally:
            daemon.kill()
            subprocess.run(["umount", "-l", str(mnt)], check=False, capture_output=True)


Files = Sequence[tuple[Path, mmap.mmap]]


def files_of(places: Sequence[tuple[str, str]]) -> Files:
    """The files of some mounts, each with what is in it."""
    found = []
    for mnt, hf in places:
        for file in sorted(Path(hf).glob("*.safetensors*")):
            with file.open("rb") as opened:
                wanted = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            found.append((Path(mnt) / file.name, wanted))
    return found


class Reader:
    """Reads files, as random numbers will."""

    def __init__(self, files: Files, seed: int) -> None:
        self._rng = random.Random(seed)
        self._files = files

    def once(self) -> int:
        """Opens a file and reads of it; how many times. Raises AssertionError of a wrong byte."""
        path, wanted = self._rng.choice(self._files)
        how = self._rng.randrange(5)
        past_the_cache = os.O_DIRECT if how == 3 else 0
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | past_the_cache)
        try:
            assert os.fstat(fd).st_size == len(wanted), path
            if how == 0:
                return self._stretch(path, fd, wanted)
            if how == 1:
                with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
                    return sum(self._part(path, mapped, wanted) for _ in range(20))
            if how == 2:  # what the page cache holds is forgotten: the daemon is asked again
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return sum(self._part(path, fd, wanted) for _ in range(20))
        finally:
            os.close(fd)

    def _stretch(self, path: Path, fd: int, wanted: mmap.mmap) -> int:
        size = self._rng.choice((4096, 65536, 1 << 20))
        start = self._rng.randrange(max(len(wanted) - STRETCH, 1))
        end = min(len(wanted), start + STRETCH)
        for at in range(start, end + size, size):
            assert os.pread(fd, size, at) == wanted[at : at + size], (path, at, size)
        return len(range(start, end + size, size))

    def _part(self, path: Path, source: int | mmap.mmap, wanted: mmap.mmap) -> int:
        at = self._rng.randrange(len(wanted) + 1)
        size = int(2 ** self._rng.uniform(0, 20))
        end = at + size
        found = os.pread(source, size, at) if isinstance(source, int) else source[at:end]
        assert found == wanted[at : at + size], (path, at, size)
        return 1


def read_for(
    seconds: float,
    reads: int,
    places: Sequence[tuple[str, str]],
    counts: MutableSequence[int],
    numbers: range,
) -> None:
    """One process of readers, which go on so long and until each has read so often; it ends with
    status 1 if a byte was wrong. `counts` tells how often each of `numbers` has read."""
    end = time.monotonic() + seconds
    files = files_of(places)
    wrong: list[str] = []

    def run(number: int) -> None:
        reader = Reader(files, 1000 * number)
        try:
            while (time.monotonic() < end or counts[number] < max(reads, 1)) and not wrong:
                counts[number] += reader.once()
        except Exception as problem:
            wrong.append(f"{type(problem).__name__}: {problem!s:.500}")

    running = [threading.Thread(target=run, args=(number,)) for number in numbers]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if wrong:
        sys.exit("\n".join(wrong))


@dataclass(frozen=True)
class Soaked:
    """What came of it."""

    seconds: float
    reads: int
    served: Sequence[Served]
    asked: Sequence[dict[str, int]]
    """What each daemon counted."""

    def growth(self) -> list[str]:
        """What a daemon used more of in the last third of the time than before."""
        found = []
        for each in self.served:
            (_, _), (before, open_before), (after, open_after) = each.most(3)
            if after > before + before // 10 + 4 * MIB:
                found.append(f"{each.mnt.name}: from {before >> 20} to {after >> 20} MiB")
            if open_after > open_before + 64:  # those of shards are closed in turn
                found.append(f"{each.mnt.name}: from {open_before} to {open_after} descriptors")
        return found


def soak(
    models: Sequence[Model],
    directory: Path,
    seconds: float,
    readers: int,
    cache: str,
    reads: int = 0,
) -> Soaked:
    """Reads for so long, and at least so often. Raises AssertionError."""
    with ExitStack() as stack:
        served = [
            stack.enter_context(serving(model, directory / f"mnt{number}", "--cache-size", cache))
            for number, model in enumerate([*models, models[0]])  # one of them twice
        ]
        places = [(str(each.mnt), str(each.hf)) for each in served]
        counts = SPAWN.RawArray("Q", readers)
        edges = [readers * i // PROCESSES for i in range(PROCESSES + 1)]
        each_reads = -(-reads // readers)
        processes = [
            SPAWN.Process(target=read_for, args=(seconds, each_reads, places, counts, range(a, b)))
            for a, b in pairwise(edges)
            if b > a
        ]
        for process in processes:
            process.start()
        start, last, quiet = time.monotonic(), 0, time.monotonic()
        while any(process.is_alive() for process in processes):
            now = time.monotonic()
            for each in served:
                each.sample(now - start)
            if sum(counts) > last:
                last, quiet = sum(counts), now
            assert now - quiet < 120, "readers hang"
            time.sleep(0.1)
        assert [process.exitcode for process in processes] == [0] * len(processes)
        took = time.monotonic() - start
        return Soaked(took, sum(counts), served, [each.asked() for each in served])


def main() -> None:
    from tests.checkpoints import ensure  # torch: readers do without

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--reads", type=int, default=0, help="go on until there were so many")
    parser.add_argument("--readers", type=int, default=64)
    parser.add_argument("--cache-size", default="64MiB")
    parser.add_argument("--dir", type=Path, default=Path.home() / ".cache" / "mcorefs-bench",
                        help="where scripts/bench keeps its checkpoints")  # fmt: skip
    given = parser.parse_args()
    models = [Model.large(given.dir), *map(Model.of, ensure(NAMES).values())]
    with tempfile.TemporaryDirectory(prefix="mcorefs-soak-") as directory:
        came = soak(
            models,
            Path(directory),
            60 * given.minutes,
            given.readers,
            given.cache_size,
            given.reads,
        )
    print(f"{came.reads} reads in {came.seconds:.0f} s, {came.reads / came.seconds:.0f} a second")
    for each, asked in zip(came.served, came.asked, strict=True):
        most = each.most(10)
        print(
            f"{each.mnt.name}: memory {' '.join(str(rss >> 20) for rss, _ in most)} MiB; "
            f"descriptors {' '.join(str(count) for _, count in most)} (in each tenth of the time); "
            f"{asked['served_bytes'] / 1e9:.1f} GB asked for, {asked['tile_hits']} tiles found, "
            f"{asked['tile_misses']} made, {asked['read_errors']} errors"
        )
    if growth := came.growth():
        sys.exit("it grows: " + "; ".join(growth))


if __name__ == "__main__":
    main()
