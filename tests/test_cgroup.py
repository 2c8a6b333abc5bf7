"""A mount inside a cgroup that limits its memory: real cgroups, of whichever version is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from mcorefs.memory import LEAST, MIB
from mcorefs.mount import mounted

LIMIT = 400_000_000
SIDE = 8192
"""Of a matrix of 128 MiB, which is read transposed: tiles, not runs."""

SERVE = """
import sys
from dataclasses import dataclass
from pathlib import Path

from mcorefs.boxes import Box
from mcorefs.dtypes import BY_TORCH
from mcorefs.index import Chunk, Span, stored_tensor
from mcorefs.memory import cache_budget
from mcorefs.mount import mounting
from mcorefs.reader import Reader
from mcorefs.storage import Storage, regular_file
from mcorefs.tree import VirtualTree
from mcorefs.views import Permute, Stored

path, mnt, side = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
shape, size = (side, side), side * side * 2
chunk = Chunk(Box.whole(shape), Span(path, 0, size))
tensor, _ = stored_tensor("t", BY_TORCH["bfloat16"], shape, (chunk,))
identity, _ = regular_file(path)
budget = cache_budget(None)
reader = Reader(Storage({path: identity}), budget)
view = Permute(Stored(tensor), (1, 0))


@dataclass
class File:
    size: int

    def read_into(self, offset, out):
        reader.read_tensor(view, offset, out)


with mounting(VirtualTree({"weights": File(size)}, 0), mnt):
    print(budget, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of our own with a limit on its memory."""
    mine = {
        line.split(":", 2)[1]: line.split(":", 2)[2]
        for line in Path("/proc/self/cgroup").read_text().splitlines()
    }
    base = Path("/sys/fs/cgroup")
    if "memory" in mine:
        directory, limit = base / "memory" / mine["memory"].lstrip("/"), "memory.limit_in_bytes"
    else:
        directory, limit = base / mine.get("", "/").lstrip("/"), "memory.max"
    made = directory / f"mcorefs-test-{os.getpid()}"
    try:
        made.mkdir()
        (made / limit).write_text(str(LIMIT))
    except OSError as problem:
        with suppress(OSError):
            made.rmdir()
        pytest.skip(f"no cgroup can be made here: {problem}")
    yield made
    made.rmdir()


def killed(cgroup: Path) -> int:
    names = ("memory.oom_control", "memory.events")
    (file,) = (cgroup / name for name in names if (cgroup / name).exists())
    return next(
        int(line.split()[1])
        for line in file.read_text().splitlines()
        if line.split()[0] == "oom_kill"
    )


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mcorefs-cgroup-") as name:
        place = Path(name)
        (place / "mnt").mkdir()
        yield place
        while mounted(place / "mnt") is not None:
            subprocess.run(["umount", "-l", str(place / "mnt")], check=False)


def test_the_daemon_lives_within_the_limit(cgroup: Path, place: Path) -> None:
    array = np.random.default_rng(7).integers(0, 1 << 16, (SIDE, SIDE), np.uint16)
    with open(place / "shard", "wb") as file:
        array.tofile(file)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # who reads it is charged
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(place / "shard"), str(place / "mnt"), str(SIDE)],
        preexec_fn=lambda: (cgroup / "cgroup.procs").write_text("0") and None,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    budget = int(server.stdout.readline())
    assert LEAST <= budget <= LIMIT // 8 < 64 * MIB
    # Read by four processes at once, in pieces as page faults ask for.
    command = ["cmp", str(place / "mnt/weights"), str(place / "expected")]
    np.ascontiguousarray(array.T).tofile(place / "expected")
    readers = [subprocess.Popen(command) for _ in range(4)]
    assert [reader.wait(timeout=90) for reader in readers] == [0] * 4
    found = json.loads((place / "mnt/.mcorefs/status.json").read_text())
    assert found["read_errors"] == 0
    assert found["resident_bytes"] < LIMIT * 3 // 4
    server.communicate(timeout=30)
    assert server.returncode == 0
    assert killed(cgroup) == 0
