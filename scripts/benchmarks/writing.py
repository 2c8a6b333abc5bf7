"""Materializing, opening, and what else turns such checkpoints into Hugging Face's files."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from scripts.benchmarks.bench import Bench
from scripts.benchmarks.places import MCOREFS, child, in_turns, mounted, warm

_PEER = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
checkpoint, out = sys.argv[1], Path(sys.argv[2])
out.mkdir()
dcp_to_torch_save(checkpoint, str(out / "whole.pt"))
whole = torch.load(out / "whole.pt", weights_only=False, mmap=False)
def flat(value, name=""):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from flat(one, f"{name}.{key}" if name else str(key))
tensors = {f"model.{name}": tensor.contiguous() for name, tensor in flat(whole)}
save_file(tensors, str(out / "model.safetensors"), {"format": "pt"})
(out / "whole.pt").unlink()
"""
"""torch's own way to one file, then names changed and saved: less than a converter has to do, since
nothing is split or put in order."""


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
        seconds, peak, _ = child(*command, "--tokenizer", moe.real)
        peaks.append(peak)
        return seconds

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


def peers(bench: Bench) -> None:
    moe, scratch = bench.moe, bench.directory / "scratch"
    (iteration,) = moe.checkpoint.glob("iter_*")
    peaks: dict[str, float] = {}
    commands: dict[str, tuple[str | Path, ...]] = {
        "mcorefs": (
            *MCOREFS, "materialize", moe.checkpoint, scratch, "--tokenizer", moe.real
        ),
        "torch": (sys.executable, "-c", _PEER, iteration, scratch),
    }  # fmt: skip
    warm(*moe.shards)

    def by(name: str) -> float:
        shutil.rmtree(scratch, ignore_errors=True)
        os.sync()
        seconds, peak, _ = child(*commands[name])
        started = time.perf_counter()
        os.sync()
        peaks[name] = max(peak, peaks.get(name, 0))
        return seconds + time.perf_counter() - started

    try:
        seconds, reference = in_turns(
            min(bench.rounds, 3), lambda: by("mcorefs"), lambda: by("torch")
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    what = "dcp_to_torch_save, load, save_file"
    bench.time("materialize, end to end", seconds, what, reference, 1 / 5)
    memory = "materialize, peak resident memory"
    bench.row(memory, peaks["mcorefs"], "MiB", what, peaks["torch"], at_most=1 / 10)
