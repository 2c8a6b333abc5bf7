"""Ratios that matter to a person who loads a model, measured in one run on one machine.

Makes a checkpoint of some gigabytes (real megatron-core, kept in --dir), then compares what goes
through mcorefs with the same bytes as real files: medians of several rounds, the two sides taking
turns. Dropping the page cache, for the cold figures, needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MCOREFS = [sys.executable, "-m", "mcorefs"]
SPEC = {
    "layers": 8,
    "hidden": 2048,
    "heads": 32,
    "kv_heads": 4,
    "head_dim": 128,
    "experts": 32,
    "topk": 8,
    "moe_ffn": 768,
    "ffn": 6144,
    "vocab_size": 32_000,
    "vocab_size_in_args": True,
    "hf_max_shard_size": None,
}
"""A Qwen3-30B-A3B with fewer layers and experts: 1.5 billion parameters, 3.0 GB."""

SHAPES = (
    ("qwen3-30b-a3b", ["qwen3-30b-a3b"], 1, 1500),
    ("qwen3-30b-a3b-etp4", ["qwen3-30b-a3b", "--etp", "4"], 2, 1500),
    ("deepseek-v3", ["deepseek-v3"], 5, 1500),
    ("deepseek-v3-buckets", ["deepseek-v3", "--optimizer", "dp_reshardable"], 5, 1500),
)
"""(name, what big_metadata.py makes, seconds, MiB) of checkpoints that are metadata and holes."""
NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
"""What is installed has been compiled: so is what is measured."""
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

LOAD = """
import sys, time, torch
from transformers import AutoModelForCausalLM
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
for tensor in model.state_dict().values():  # one byte of each page
    tensor.view(-1).view(torch.uint8)[::4096].sum()
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path.home() / ".cache" / "mcorefs-bench")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--only", nargs="*", default=[], help=f"of: {', '.join(MEASUREMENTS)}")
    options = parser.parse_args()
    bench = Bench(options.dir, options.rounds)
    print(
        f"{machine()}\n{bench.bytes / 1e9:.2f} GB of tensors, median of {options.rounds} rounds\n"
    )
    for name in options.only or MEASUREMENTS:
        MEASUREMENTS[name](bench)
    if options.json:
        options.json.write_text(json.dumps(bench.figures, indent=2) + "\n")


def machine() -> str:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{os.cpu_count()} x {model}, {memory:.0f} GiB, Linux {platform.release()}"


class Bench:
    """The checkpoint, its real model directory, and the figures so far."""

    def __init__(self, directory: Path, rounds: int) -> None:
        self.rounds = rounds
        self.figures: dict[str, float] = {}
        made = directory / "moe"
        if not made.exists():
            print("making the checkpoint (a minute)", file=sys.stderr)
            directory.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "tests.checkpoints", "qwen3_moe-tp2-pp2-ep2"]
            command += ["--out", str(made), "--spec", json.dumps(SPEC)]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        self.checkpoint, self.real = made / "root", made / "hf"
        self.directory = directory
        self.mnt, self.scratch = directory / "mnt", directory / "scratch"
        self.mnt.mkdir(exist_ok=True)
        for file in made.joinpath("tokenizer").iterdir():
            shutil.copy(file, self.real)
        (self.weights,) = self.real.glob("*.safetensors")
        self.bytes = self.weights.stat().st_size

    @contextmanager
    def mounted(self) -> Iterator[float]:
        """A fresh mount; yields the seconds until it was ready, from the shell."""
        started = time.perf_counter()
        command = [*MCOREFS, "mount", str(self.checkpoint), str(self.mnt)]
        command += ["--tokenizer", str(self.real)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            yield time.perf_counter() - started
        finally:
            self.note_memory()
            subprocess.run([*MCOREFS, "umount", str(self.mnt)], check=True, cwd=ROOT)

    def note_memory(self) -> None:
        """Peak resident memory of the daemon, over all mounts of this run."""
        status = (daemon_of(self.mnt) / "status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
        self.figures["peak_rss_mib"] = max(peak, self.figures.get("peak_rss_mib", 0))

    def compare(
        self,
        name: str,
        ours: Callable[[], float],
        real: Callable[[], float],
        against: str,
        bar: float,
        gigabytes: bool = True,
    ) -> None:
        """Run both in turns; print medians in seconds, and ours as a multiple of the real one."""
        pairs = []
        for number in range(self.rounds):
            # Who goes first changes: what one frees, the next one is given, and in a virtual
            # machine memory that the host has to find again is several times slower to fill.
            if number % 2 == 0:
                mine = ours()
                pairs.append((mine, real()))
            else:
                theirs = real()
                pairs.append((ours(), theirs))
        mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        self.figures[name], self.figures[f"{name}: {against}"] = mine, theirs

        def speed(seconds: float) -> str:
            return f" ({self.bytes / 1e9 / seconds:.2f} GB/s)" if gigabytes else ""

        verdict = "ok" if mine / theirs <= bar else "MISSED"
        print(
            f"{name:34} {mine:6.2f} s{speed(mine)}   {against:28} {theirs:6.2f} s{speed(theirs)}"
            f"   x {mine / theirs:.2f} (bar {bar}: {verdict})",
            flush=True,
        )


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def daemon_of(mnt: Path) -> Path:
    """The /proc directory of the process that serves `mnt`."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes().split(b"\0")
            if b"mount" in command and os.fsencode(mnt) in command:
                return process
    raise RuntimeError(f"nothing serves {mnt}")


def read_through(path: Path) -> None:
    buffer = memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def ready(bench: Bench) -> None:
    seconds = []
    for _ in range(bench.rounds):
        with bench.mounted() as took:
            seconds.append(took)
    bench.figures["mount to ready"] = found = statistics.median(seconds)
    verdict = "ok" if found < 1 else "MISSED"
    print(f"{'mount to ready, from the shell':34} {found:6.2f} s   (bar 1 s: {verdict})")


def sequential(bench: Bench) -> None:
    copy = Path("/dev/shm/mcorefs-bench")

    def through_mount() -> float:
        read_through(bench.weights)  # the shards are another copy of these bytes: warm both
        for shard in sorted(bench.checkpoint.rglob("*.distcp")):
            read_through(shard)
        with bench.mounted():
            return timed(lambda: read_through(bench.mnt / bench.weights.name))

    def to_tmpfs() -> float:
        read_through(bench.weights)
        try:
            return timed(lambda: subprocess.run(["cp", str(bench.weights), str(copy)], check=True))
        finally:
            copy.unlink(missing_ok=True)

    def real() -> float:
        read_through(bench.weights)
        return timed(lambda: read_through(bench.weights))

    bench.compare(
        "read, mount cold, shards cached", through_mount, to_tmpfs, "cp to fresh tmpfs", 1.0
    )
    bench.compare(
        "read, mount cold, shards cached", through_mount, real, "read of the real file", 10
    )

    def cold_mount() -> float:
        drop_caches()
        with bench.mounted():
            return timed(lambda: read_through(bench.mnt / bench.weights.name))

    def cold_real() -> float:
        drop_caches()
        return timed(lambda: read_through(bench.weights))

    bench.compare("read, everything cold", cold_mount, cold_real, "read of the real file", 1.3)


def from_pretrained(bench: Bench) -> None:
    def load(path: Path) -> float:
        command = [sys.executable, "-c", LOAD, str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(done.stdout.split()[-1])

    def cold_mount() -> float:
        drop_caches()
        with bench.mounted():
            return load(bench.mnt)

    def cold_real() -> float:
        drop_caches()
        return load(bench.real)

    bench.compare("from_pretrained, cold", cold_mount, cold_real, "real directory, cold", 1.3)
    with bench.mounted():
        load(bench.mnt)
        load(bench.real)
        bench.compare(
            "from_pretrained, warm",
            lambda: load(bench.mnt),
            lambda: load(bench.real),
            "real directory, warm",
            1.1,
        )


def materialize(bench: Bench) -> None:
    def clean() -> None:
        shutil.rmtree(bench.scratch, ignore_errors=True)
        os.sync()

    def ours() -> float:
        clean()
        command = [*MCOREFS, "materialize", str(bench.checkpoint), str(bench.scratch)]
        command += ["--tokenizer", str(bench.real)]
        return timed(
            lambda: subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        )

    def copying() -> float:
        clean()
        command = ["cp", "-r", str(bench.real), str(bench.scratch)]
        return timed(lambda: subprocess.run(command, check=True)) + timed(os.sync)

    bench.compare("materialize (synced)", ours, copying, "cp -r, then sync", 1.5)
    clean()


def memory(bench: Bench) -> None:
    if "peak_rss_mib" not in bench.figures:
        with bench.mounted():
            read_through(bench.mnt / bench.weights.name)
    found = bench.figures["peak_rss_mib"]
    print(f"{'daemon, peak resident memory':34} {found:6.0f} MiB   (bar 300 MB + cache of 512 MiB)")


def metadata(bench: Bench) -> None:
    for name, arguments, bar, most in SHAPES:
        root = bench.directory / name
        if not root.exists():
            print(f"making the metadata of {name}", file=sys.stderr)
            command = [sys.executable, "scripts/big_metadata.py", str(root), *arguments]
            subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        figures = [opened(root, bench.mnt) for _ in range(bench.rounds)]
        found = {key: statistics.median(f[key] for f in figures) for key in figures[0]}
        bench.figures |= {f"{name}: {key}": value for key, value in found.items()}
        looks = max(found["ls"], found["index"], found["header"])
        verdict = "ok" if found["ready"] < bar and found["MiB"] < most and looks < 1 else "MISSED"
        print(
            f"{name:24} {found['ready']:6.2f} s to ready ({found['cpu']:.2f} s of CPU), "
            f"{found['MiB']:.0f} MiB, ls {found['ls']:.3f} s, index.json {found['index']:.3f} s, "
            f"header {found['header']:.3f} s   (bar {bar} s, {most} MiB: {verdict})",
            flush=True,
        )


def opened(root: Path, mnt: Path) -> dict[str, float]:
    """A mount of `root` from the shell: seconds until it is ready and until it shows what is in
    it, CPU of both its processes until then, peak memory."""
    environment = {name: value for name, value in os.environ.items() if name != NO_BYTECODE}
    command = [*MCOREFS, "mount", str(root), str(mnt)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ready = timed(lambda: subprocess.run(command, check=True, cwd=ROOT, env=environment, **QUIET))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    starter = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    try:
        daemon = daemon_of(mnt)
        status = (daemon / "status").read_text()
        ticks = sum(map(int, (daemon / "stat").read_text().rpartition(")")[2].split()[11:13]))
        return {
            "ready": ready,
            "cpu": starter + ticks / os.sysconf("SC_CLK_TCK"),
            "ls": timed(lambda: subprocess.run(["ls", "-l", str(mnt)], check=True, **QUIET)),
            "index": timed((mnt / "model.safetensors.index.json").read_bytes),
            "header": max(timed(partial(header, f)) for f in sorted(mnt.glob("*.safetensors"))),
            "MiB": int(status.split("VmHWM:")[1].split()[0]) / 1024,
        }
    finally:
        subprocess.run([*MCOREFS, "umount", str(mnt)], check=True, cwd=ROOT)


def header(path: Path) -> None:
    """Read the header, all but its last page: there data begin, which are only a hole here."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        size = 8 + int.from_bytes(file.read(8), "little")
        os.pread(file.fileno(), size - size % 4096, 0)


MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    "ready": ready,
    "sequential": sequential,
    "from_pretrained": from_pretrained,
    "materialize": materialize,
    "memory": memory,
    "metadata": metadata,
}

if __name__ == "__main__":
    main()
