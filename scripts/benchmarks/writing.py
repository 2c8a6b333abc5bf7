"""Opening, and materializing."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time

from scripts.benchmarks.bench import Bench
from scripts.benchmarks.places import MCOREFS, child, in_turns, mounted, warm


def ready(bench: Bench) -> None:
    seconds = []
    for _ in range(bench.rounds):
        started = time.perf_counter()
        with mounted(bench.moe):
            seconds.append(time.perf_counter() - started)
    bench.row("mount to ready, from the shell", statistics.median(seconds), "s", at_most=1)


def materialize(bench: Bench) -> None:
    moe, scratch = bench.moe, bench.directory / "scratch"
    peaks: list[float] = []
    warm(moe.weights, *moe.shards)

    def clean() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        os.sync()

    def ours() -> float:
        clean()
        command = [*MCOREFS, "materialize", str(moe.checkpoint), str(scratch)]
        ended = child(*command, "--tokenizer", moe.real)
        peaks.append(ended.peak_mib)
        return ended.seconds

    def copying() -> float:
        clean()
        started = time.perf_counter()
        subprocess.run(["cp", "-r", str(moe.real), str(scratch)], check=True)
        os.sync()
        return time.perf_counter() - started

    try:
        seconds, reference = in_turns(bench.rounds, ours, copying)
    finally:
        clean()
    bench.time("materialize (synced)", seconds, "cp -r, then sync", reference, 1.15)
    bench.row("materialize, peak resident memory", max(peaks), "MiB", at_most=477)
