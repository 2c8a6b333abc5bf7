"""Reading through a mount, and in this process, against real files."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from scripts.benchmarks.bench import Bench
from scripts.benchmarks.places import (
    ROOT,
    Mount,
    Place,
    child,
    drop_caches,
    forget,
    in_turns,
    mounted,
    passed_through,
    read_ranges,
    warm,
)

TOUCH = ROOT / "scripts" / "benchmarks" / "touch.py"
NOBODY = 65534
KINDS = {
    "contiguous": ("down_proj", "embed_tokens", "lm_head"),
    "QKV-merged": ("q_proj", "k_proj", "v_proj"),
    "gate/up": ("gate_proj", "up_proj"),
    "row-parallel": ("o_proj",),
}


def sequential(bench: Bench) -> None:
    moe = bench.moe
    warm(moe.weights, *moe.shards)
    nbytes = {kind: sum(end - start for start, end in moe.ranges(*KINDS[kind])) for kind in KINDS}
    with mounted(moe) as mount, passed_through(moe.real, bench.directory) as (through, name):

        def read(kind: str, file: Path) -> Callable[[], float]:
            def seconds() -> float:
                forget(file)
                warm(moe.weights)  # the file behind the passthrough may have been dropped with it
                return read_ranges(file, moe.ranges(*KINDS[kind]))

            return seconds

        ours, theirs = mount.path / moe.weights.name, through / moe.weights.name
        speeds = {}
        for kind in KINDS:
            seconds, reference = in_turns(bench.rounds, read(kind, ours), read(kind, theirs))
            speeds[kind] = nbytes[kind] / 1e9 / seconds
            bar = 1.0 if kind == "contiguous" else None
            bench.row(
                f"read(2), {kind}", speeds[kind], "GB/s", name, nbytes[kind] / 1e9 / reference,
                at_least=bar,
            )  # fmt: skip
        for kind in list(KINDS)[1:]:
            bench.row(
                f"read(2), {kind}", speeds[kind], "GB/s", "contiguous, same mount",
                speeds["contiguous"], at_least=0.7,
            )  # fmt: skip
        forget(ours)
        before, cpu = mount.bytes_read, mount.cpu_seconds
        read_ranges(ours, [(0, moe.nbytes)])
        excess = (mount.bytes_read - before) / moe.nbytes
        bench.row("bytes read from shards", excess, "per byte read(2)", at_most=1.1)
        bench.row("daemon CPU", (mount.cpu_seconds - cpu) / moe.nbytes * 1e9, "s/GB")
        bench.row("daemon, peak resident memory", mount.peak_mib, "MiB", at_most=812)
    real = moe.weights
    seconds = statistics.median(read_ranges(real, moe.ranges("")) for _ in range(bench.rounds))
    bench.report.floors["pread of the real file"] = moe.nbytes / 1e9 / seconds
    bench.report.floors["memcpy"] = _memcpy()


def _memcpy() -> float:
    source, target = bytearray(b"x" * (256 << 20)), bytearray(256 << 20)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        memoryview(target)[:] = source
        best = min(best, time.perf_counter() - started)
    return len(source) / 1e9 / best


def transposed(bench: Bench) -> None:
    """Experts of gpt-oss: no bar of their own but that each byte is read once."""
    place = bench.transposed
    ranges = place.ranges("gate_up_proj", "experts.down_proj")
    nbytes = sum(end - start for start, end in ranges)
    warm(*place.shards)
    excess, cpu = 0.0, 0.0

    def ours() -> float:
        nonlocal excess, cpu
        with mounted(place) as mount:
            before, used = mount.bytes_read, mount.cpu_seconds
            seconds = read_ranges(mount.path / place.weights.name, ranges)
            excess = (mount.bytes_read - before) / nbytes
            cpu = (mount.cpu_seconds - used) / nbytes * 1e9
            return seconds

    def real() -> float:
        return read_ranges(place.weights, ranges)

    warm(place.weights)
    seconds, reference = in_turns(bench.rounds, ours, real)
    bench.row(
        "read(2), transposed experts", nbytes / 1e9 / seconds, "GB/s", "read of the real file",
        nbytes / 1e9 / reference,
    )  # fmt: skip
    bench.row("transposed experts: bytes read", excess, "per byte read(2)", at_most=1.2)
    bench.row("transposed experts: daemon CPU", cpu, "s/GB")


def faults(bench: Bench) -> None:
    moe = bench.moe
    users: dict[str, list[str]] = {"root" if os.geteuid() == 0 else "this user": []}
    if os.geteuid() == 0:
        users["an ordinary user"] = ["--user", str(NOBODY)]
    for user, options in users.items():

        def ours(options: list[str] = options) -> float:
            drop_caches(moe)
            with mounted(moe) as mount:
                return _touch(mount.path / moe.weights.name, *options)[0]

        def real(options: list[str] = options) -> float:
            drop_caches(moe)
            return _touch(moe.weights, *options, *(["--open-first"] if options else []))[0]

        seconds, reference = in_turns(bench.rounds, ours, real)
        bench.time(f"page faults, cold, {user}", seconds, "real directory, cold", reference, 1.3)


def again(bench: Bench) -> None:
    """What the kernel takes to map pages that it has; a load does more than that, and it is
    `from_pretrained` that has the bar."""
    moe = bench.moe
    with mounted(moe) as mount:
        ours = mount.path / moe.weights.name
        warm(ours, moe.weights)
        seconds, reference = in_turns(
            bench.rounds,
            lambda: _touch(ours, "--times", "2")[1],
            lambda: _touch(moe.weights, "--times", "2")[1],
        )
    bench.time("page faults alone, warm", seconds, "real directory, warm", reference, None)


def _touch(file: Path, *options: str) -> list[float]:
    return [float(word) for word in child(sys.executable, TOUCH, file, *options).said.split()]


def random_reads(bench: Bench) -> None:
    """Everything cold, for the bar; and with the shards cached, where what is left is FUSE."""
    for place in (bench.moe, bench.transposed):
        moe = place is bench.moe
        for size in (4 << 10, 64 << 10):
            what = f"{size >> 10} KiB at random, 8 threads{'' if moe else ', transposed'}"
            excess: list[float] = []

            def ours(
                cold: bool, place: Place = place, size: int = size, excess: list[float] = excess
            ) -> float:
                _prepare(place, cold)
                with mounted(place) as mount:
                    before = mount.bytes_read
                    seconds, nbytes = _at_random(mount.path / place.weights.name, size)
                    excess.append((mount.bytes_read - before) / nbytes)
                    return seconds

            def real(place: Place = place, size: int = size) -> float:
                _prepare(place, True)
                return _at_random(place.weights, size)[0]

            def through(place: Place = place, size: int = size) -> float:
                _prepare(place, False)
                with passed_through(place.real, bench.directory) as (path, _):
                    return _at_random(path / place.weights.name, size)[0]

            seconds, reference = in_turns(bench.rounds, partial(ours, True), real)
            bench.time(f"{what}, cold", seconds, "real file, cold", reference, 5.0 if moe else None)
            bar = 4.0 if moe else None
            bench.row(f"{what}: bytes read", max(excess), "per byte asked", at_most=bar)
            if moe:
                seconds, reference = in_turns(bench.rounds, partial(ours, False), through)
                bench.time(f"{what}, cached", seconds, "passthrough_ll", reference, None)


def _prepare(place: Place, cold: bool) -> None:
    if cold:
        drop_caches(place)
    else:
        warm(place.weights, *place.shards)


def _at_random(file: Path, size: int) -> tuple[float, int]:
    """(seconds, bytes) of reads by 8 threads, without the kernel's read-ahead."""
    threads, count = 8, 250
    fd = os.open(file, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    last = (os.fstat(fd).st_size - size) // 4096

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(count):
            os.pread(fd, size, chosen.randint(0, last) * 4096)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - started
    os.close(fd)
    return seconds, threads * count * size


def many_threads(bench: Bench) -> None:
    """A deadlock would be a child that does not end in time."""
    moe = bench.moe
    warm(*moe.shards)
    # So large that there are four files, or a few more: a tensor is never cut.
    with mounted(moe, "--shard-size", f"{moe.nbytes // 4_000_000 + 1}MB") as mount:
        files = sorted(mount.path.glob("*.safetensors"))[:4]
        nbytes = sum(file.stat().st_size for file in files)

        def touched(threads: int, *names: Path) -> float:
            many = ("--threads", str(threads))
            return float(child(sys.executable, TOUCH, *names, *many, timeout=120).said)

        def by(threads: int) -> Callable[[], float]:
            def seconds() -> float:
                forget(*files)
                return touched(threads, *files)

            return seconds

        many, one = in_turns(bench.rounds, by(64), by(1))
    bench.row(
        f"page faults, 64 threads, {len(files)} files", nbytes / 1e9 / many, "GB/s", "one thread",
        nbytes / 1e9 / one, at_least=1.0,
    )  # fmt: skip
    # What so many threads cost whoever reads, with nothing in between.
    warm(moe.weights)
    real = [partial(touched, threads, moe.weights) for threads in (64, 1)]
    many, one = in_turns(bench.rounds, *real)
    bench.row(
        "page faults, 64 threads, the real file, warm", moe.nbytes / 1e9 / many, "GB/s",
        "one thread", moe.nbytes / 1e9 / one,
    )  # fmt: skip


_OURS = """
import sys, time, torch, mcorefs
with mcorefs.open(sys.argv[1], tokenizer=sys.argv[2]) as checkpoint:
    started = time.perf_counter()
    for name in checkpoint.keys():
        checkpoint.get_tensor(name)
    print(time.perf_counter() - started)
"""
_REAL = """
import sys, time, torch
from safetensors import safe_open
with safe_open(sys.argv[1], framework="pt") as file:
    started = time.perf_counter()
    for name in file.keys():
        file.get_tensor(name).clone()
    print(time.perf_counter() - started)
"""


def api(bench: Bench) -> None:
    moe = bench.moe
    warm(moe.weights, *moe.shards)
    seconds, reference = in_turns(
        bench.rounds,
        lambda: float(
            child(sys.executable, "-c", _OURS, moe.checkpoint, moe.real).said.split()[-1]
        ),
        lambda: float(child(sys.executable, "-c", _REAL, moe.weights).said),
    )
    what = "safe_open (mmap), each tensor copied to memory as ours are"
    bench.time("mcorefs.open, all tensors", seconds, what, reference, 1.5)


def idle(bench: Bench) -> None:
    with mounted(bench.moe) as mount:
        read_ranges(mount.path / bench.moe.weights.name, [(0, 1 << 20)])
        found = _idle(mount)
    bench.row("daemon CPU, idle for 5 s", found, "s", at_most=0)


def _idle(mount: Mount) -> float:
    time.sleep(0.5)
    before = mount.cpu_seconds
    time.sleep(5)
    return mount.cpu_seconds - before


_LOAD = """
import sys, time, torch
from transformers import AutoModelForCausalLM
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
for tensor in model.state_dict().values():  # one byte of each page
    tensor.view(-1).view(torch.uint8)[::4096].sum()
print(time.perf_counter() - started)
"""


def from_pretrained(bench: Bench) -> None:
    moe = bench.moe

    def load(path: Path) -> float:
        command = [sys.executable, "-c", _LOAD, str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(done.stdout.split()[-1])

    def cold_mount() -> float:
        drop_caches(moe)
        with mounted(moe) as mount:
            return load(mount.path)

    def cold_real() -> float:
        drop_caches(moe)
        return load(moe.real)

    seconds, reference = in_turns(bench.rounds, cold_mount, cold_real)
    bench.time("from_pretrained, cold", seconds, "real directory, cold", reference, 1.3)
    with mounted(moe) as mount:
        load(mount.path)
        load(moe.real)
        seconds, reference = in_turns(
            bench.rounds, lambda: load(mount.path), lambda: load(moe.real)
        )
    bench.time("from_pretrained, warm", seconds, "real directory, warm", reference, 1.05)
