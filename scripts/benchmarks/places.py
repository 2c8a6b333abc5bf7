"""What is measured: checkpoints, their real model directories, mounts of both."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MCOREFS = [sys.executable, "-m", "mcorefs"]
EXAMPLE = Path("/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c")
"""Of Debian's libfuse3-dev: libfuse's own passthrough file system."""

_MOE: dict[str, object] = {
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
_SHARED: dict[str, object] = {"layers": 4, "experts": 16, "topk": 4, "vocab_size": 16_000}
_TRANSPOSED: dict[str, object] = {
    "layers": 4,
    "hidden": 1440,
    "heads": 16,
    "kv_heads": 2,
    "head_dim": 64,
    "experts": 8,
    "moe_ffn": 1440,
    "vocab_size": 2000,
    "hf_max_shard_size": None,
}
SPECS: dict[str, tuple[str, dict[str, object]]] = {
    "moe": ("qwen3_moe-tp2-pp2-ep2", _MOE),
    "moe-small": ("qwen3_moe-tp2-pp2-ep2", _MOE | {"layers": 4, "experts": 8, "vocab_size": 8000}),
    "shared": ("qwen3_moe-tp2-pp2-ep2", _MOE | _SHARED),
    "transposed": ("gpt_oss-tp2-ep2", _TRANSPOSED),
    "transposed-small": ("gpt_oss-tp2-ep2", _TRANSPOSED | {"experts": 4}),
}
"""moe: a Qwen3-30B-A3B with fewer layers and experts (full: 1.5 billion parameters, 3.0 GB).
shared: one of 0.9 GB. transposed: a gpt-oss of half its width, whose experts lie transposed (full:
0.4 GB)."""


@dataclass(frozen=True)
class Place:
    """A checkpoint and the real files of the same model."""

    checkpoint: Path
    real: Path
    weights: Path

    @property
    def nbytes(self) -> int:
        return self.weights.stat().st_size

    @property
    def shards(self) -> list[Path]:
        return sorted(self.checkpoint.rglob("*.distcp"))

    def ranges(self, *marks: str) -> list[tuple[int, int]]:
        """(start, end) in the safetensors file of the tensors with one of `marks` in their names;
        those that follow each other are one."""
        with self.weights.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        del header["__metadata__"]
        found: list[tuple[int, int]] = []
        for start, end in sorted(
            tuple(part["data_offsets"])
            for name, part in header.items()
            if any(mark in name for mark in marks)
        ):
            start, end = start + 8 + length, end + 8 + length
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, end))
        return found


def place(directory: Path, name: str) -> Place:
    """The checkpoint `name` of SPECS, made (real megatron-core) where it is not there yet, or was
    made of another spec."""
    made = directory / name
    spec, changes = SPECS[name]
    note, wanted = made / "spec.json", json.dumps([spec, changes])
    if not note.exists() or note.read_text() != wanted:
        print(f"making {name} (a minute)", file=sys.stderr)
        shutil.rmtree(made, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.checkpoints", spec]
        command += ["--out", str(made), "--spec", json.dumps(changes)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        note.write_text(wanted)
    for file in made.joinpath("tokenizer").iterdir():
        shutil.copy(file, made / "hf")
    (weights,) = (made / "hf").glob("*.safetensors")
    return Place(made / "root", made / "hf", weights)


@dataclass(frozen=True)
class Mount:
    """A live mount, and the process that serves it."""

    path: Path
    pid: int

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def bytes_read(self) -> int:
        """Bytes that its reads returned, from disk or cache."""
        text = Path(f"/proc/{self.pid}/io").read_text()
        return int(text.split("rchar:")[1].split()[0])

    @property
    def peak_mib(self) -> float:
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) / 1024


@contextmanager
def mounted(at: Place, *options: str) -> Iterator[Mount]:
    """A fresh mount that every user may look at."""
    with tempfile.TemporaryDirectory(prefix="mcorefs-bench-") as name:
        os.chmod(name, 0o755)
        mnt = Path(name) / "mnt"
        mnt.mkdir()
        command = [*MCOREFS, "mount", str(at.checkpoint), str(mnt), "--tokenizer", str(at.real)]
        command += ["--allow-other"] if os.geteuid() == 0 else []
        subprocess.run([*command, *options], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            yield Mount(mnt, server_of(mnt))
        finally:
            subprocess.run([*MCOREFS, "umount", str(mnt)], check=True, cwd=ROOT)


def server_of(mnt: Path) -> int:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"mount" in command and os.fsencode(mnt) in command:
            return int(process.name)
    raise RuntimeError(f"no process serves {mnt}")


@contextmanager
def passed_through(directory: Path, scratch: Path) -> Iterator[tuple[Path, str]]:
    """(`directory` through libfuse's passthrough example, what that is)."""
    program = scratch / "passthrough_ll"
    if not program.exists():
        if not EXAMPLE.exists():
            raise SystemExit("apt-get install gcc pkg-config libfuse3-dev: for the passthrough")
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "fuse3"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        command = ["gcc", "-O2", "-w", str(EXAMPLE), "-o", str(program), *flags]
        subprocess.run(command, check=True)
    with tempfile.TemporaryDirectory(prefix="mcorefs-bench-") as name:
        command = [str(program), "-f", "-o", f"source={directory},cache=always", name]
        server = subprocess.Popen(command)
        try:
            while not os.path.ismount(name):
                if server.poll() is not None:
                    raise RuntimeError("the passthrough did not start")
                time.sleep(0.01)
            device = os.stat(name).st_dev
            ahead = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
            if os.geteuid() == 0:
                Path(ahead).write_text("4096\n")  # as a mount of mcorefs has it
            yield Path(name), "passthrough_ll"
        finally:
            subprocess.run(["fusermount3", "-u", name], check=True)
            server.wait()


def warm(*files: Path) -> None:
    for file in files:
        read_ranges(file, [(0, file.stat().st_size)])


def read_ranges(file: Path, ranges: list[tuple[int, int]]) -> float:
    """Seconds to read them with read(2), 1 MiB at a time."""
    buffer = memoryview(bytearray(1 << 20))
    fd = os.open(file, os.O_RDONLY)
    try:
        started = time.perf_counter()
        for at, end in ranges:
            while at < end:
                count = os.preadv(fd, [buffer[: end - at]], at)
                if count == 0:
                    raise RuntimeError(f"{file} ends at {at}")
                at += count
        return time.perf_counter() - started
    finally:
        os.close(fd)


def forget(*files: Path) -> None:
    """Drop the kernel's cache of `files`; of all files where this is root."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def drop_caches(at: Place) -> None:
    os.sync()
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    else:
        forget(at.weights, *at.shards)


def in_turns(rounds: int, *sides: Callable[[], float]) -> list[float]:
    """The median of each. Who goes first changes: what one frees the next one is given, and in a
    virtual machine memory that the host has to find again is several times slower to fill."""
    found: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        order = list(enumerate(sides))
        for i, side in order if number % 2 == 0 else reversed(order):
            found[i].append(side())
    return [statistics.median(figures) for figures in found]


@dataclass(frozen=True)
class Ended:
    """What a child took."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    """Resident."""
    said: str


def child(
    *command: str | Path, timeout: float = 300, env: Mapping[str, str] | None = None
) -> Ended:
    """A command that must succeed."""
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdout=printed, stderr=log, env=env
        )
        deadline, peak = time.monotonic() + timeout, 0.0
        while True:
            # Not ru_maxrss: before it becomes another program, a child has the memory of this one.
            with suppress(OSError, IndexError):
                text = Path(f"/proc/{process.pid}/status").read_text()
                peak = int(text.split("VmHWM:")[1].split()[0]) / 1024
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise RuntimeError(f"no end after {timeout} s: {command}")
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        log.seek(0)
        if process.returncode:
            said = log.read().decode(errors="replace")
            raise RuntimeError(f"{command} ended with {process.returncode}\n{said[-2000:]}")
        return Ended(seconds, used.ru_utime + used.ru_stime, peak, printed.read().decode())
