"""How much memory there is for a cache: what the machine has free, within the cgroups' limits.

A container that goes over its limit is killed, and a mount dies with it, so the limit counts, not
the machine (proc_meminfo(5); Linux:Documentation/admin-guide/cgroup-v2.rst memory.max).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcorefs.errors import McorefsError

MIB = 1 << 20
MOST = 512 * MIB
"""Default budget where memory is plenty: the kernel's page cache keeps what was read, the tile
cache only has to bridge the requests for one tile."""
LEAST = 16 * MIB
_SHARE = 8
"""One part in so many of the memory there is goes to the default budget."""


def cache_budget(asked: int | None, root: Path = Path("/")) -> int:
    """Bytes for the tile cache: `asked`, or a default that suits this machine.

    Raises McorefsError if `asked` is more than there is. `root` is where /proc and /sys are.
    """
    available = available_bytes(root)
    if asked is None:
        return max(LEAST, min(MOST, available // _SHARE))
    if asked > available:
        raise McorefsError(
            f"--cache-size asks for {asked / MIB:,.0f} MiB, but only {available / MIB:,.0f} MiB of "
            "memory are free here (within this cgroup's limit); ask for less"
        )
    return asked


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can still be used: MemAvailable, or less where a cgroup allows less."""
    return min([_free_in_machine(root), *_free_in_cgroups(root)])


def _free_in_machine(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return MOST * _SHARE


def _free_in_cgroups(root: Path) -> Iterator[int]:
    """Limit less use, for this process's cgroup and each above it, as far as they are visible.

    Inside a container the path in /proc/self/cgroup is often that of the host; its own cgroup is
    then the mount point itself, which the walk upwards ends at.
    """
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        here = base / path.lstrip("/")
        for directory in (here, *here.parents):
            if (most := _number(directory / limit)) is not None:
                # Page cache counts as used but is given back on demand.
                reclaimable = _statistic(directory / "memory.stat", "inactive_file")
                yield max(0, most - (_number(directory / used) or 0) + reclaimable)
            if directory == base:
                break


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistic(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


@contextmanager
def gc_paused() -> Iterator[None]:
    """To open a checkpoint makes only what stays, at which the collector would look again and
    again; for a while afterwards it looks at it once more."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
