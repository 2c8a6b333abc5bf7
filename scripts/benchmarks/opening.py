"""Opening checkpoints as large as people train: metadata as megatron-core writes it, and holes."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from scripts.benchmarks.bench import Bench
from scripts.benchmarks.places import MCOREFS, ROOT, server_of

_SHAPES = (
    ("qwen3-30b-a3b", ["qwen3-30b-a3b"], 1),
    ("qwen3-30b-a3b-etp4", ["qwen3-30b-a3b", "--etp", "4"], 2),
    ("deepseek-v3", ["deepseek-v3"], 5),
    ("deepseek-v3-buckets", ["deepseek-v3", "--optimizer", "dp_reshardable"], 5),
)
"""(name, what big_metadata.py makes, seconds to open it in)."""


def metadata(bench: Bench) -> None:
    for name, arguments, bar in _SHAPES:
        root = bench.directory / name
        if not root.exists():
            print(f"making the metadata of {name}", file=sys.stderr)
            command = [sys.executable, "scripts/big_metadata.py", str(root), *arguments]
            subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        figures = [_opened(root) for _ in range(bench.rounds)]
        found = {key: statistics.median(f[key] for f in figures) for key in figures[0]}
        bench.row(f"{name}: mount to ready", found["ready"], "s", at_most=bar)
        bench.row(f"{name}: CPU of that", found["cpu"], "s")
        bench.row(f"{name}: peak resident memory", found["MiB"], "MiB", at_most=1500)
        bench.row(f"{name}: ls, index, any header", found["looks"], "s", at_most=1)
        with tempfile.TemporaryDirectory(prefix="mcorefs-bench-") as cache:
            os.environ["XDG_CACHE_HOME"] = cache
            _opened(root, "--index-cache")
            again = [_opened(root, "--index-cache")["ready"] for _ in range(bench.rounds)]
            del os.environ["XDG_CACHE_HOME"]
        ready = statistics.median(again)
        bench.row(
            f"{name}: mount to ready, --index-cache, again", ready, "s", "without", found["ready"]
        )


def _opened(root: Path, *options: str) -> dict[str, float]:
    """A mount of `root` from the shell: seconds until it is ready and (the most) until it shows
    something of what is in it, CPU of both its processes until then, peak memory."""
    with tempfile.TemporaryDirectory(prefix="mcorefs-bench-") as name:
        mnt = Path(name)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ready = _timed(partial(_run, *MCOREFS, "mount", root, mnt, *options))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        starter = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        try:
            daemon = Path("/proc") / str(server_of(mnt))
            status = (daemon / "status").read_text()
            ticks = sum(map(int, (daemon / "stat").read_text().rpartition(")")[2].split()[11:13]))
            looks: tuple[Callable[[], object], ...] = (
                partial(_run, "ls", "-l", mnt),
                (mnt / "model.safetensors.index.json").read_bytes,
                *(partial(_header, file) for file in sorted(mnt.glob("*.safetensors"))),
            )
            return {
                "ready": ready,
                "cpu": starter + ticks / os.sysconf("SC_CLK_TCK"),
                "MiB": int(status.split("VmHWM:")[1].split()[0]) / 1024,
                "looks": max(map(_timed, looks)),
            }
        finally:
            subprocess.run([*MCOREFS, "umount", str(mnt)], check=True, cwd=ROOT)


def _run(*command: str | Path) -> None:
    quiet = subprocess.DEVNULL
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, stdout=quiet, stderr=quiet)


def _header(path: Path) -> None:
    """Read the header, all but its last page: there data begin, which are only a hole here."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        size = 8 + int.from_bytes(file.read(8), "little")
        os.pread(file.fileno(), size - size % 4096, 0)


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
