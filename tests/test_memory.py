"""The default budget and its limits, over made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcorefs.errors import McorefsError
from mcorefs.memory import LEAST, MIB, MOST, available_bytes, cache_budget


def machine(root: Path, free_mib: int, cgroup: str = "0::/\n") -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {free_mib * 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def cgroup(root: Path, path: str, limit: str, used_mib: int, reclaimable_mib: int = 0) -> None:
    directory = root / "sys/fs/cgroup" / path
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{used_mib * MIB}\n")
    (directory / "memory.stat").write_text(f"anon 1\ninactive_file {reclaimable_mib * MIB}\n")


def test_plenty(tmp_path: Path) -> None:
    machine(tmp_path, 1 << 20)
    assert available_bytes(tmp_path) == (1 << 20) * MIB
    assert cache_budget(None, tmp_path) == MOST


def test_little(tmp_path: Path) -> None:
    machine(tmp_path, 64)
    assert cache_budget(None, tmp_path) == LEAST


def test_the_tightest_cgroup_counts(tmp_path: Path) -> None:
    machine(tmp_path, 64_000, "0::/slurm/job/step\n")
    cgroup(tmp_path, "slurm", "max", 0)
    cgroup(tmp_path, "slurm/job", str(1000 * MIB), used_mib=700, reclaimable_mib=500)
    cgroup(tmp_path, "slurm/job/step", "max", 0)
    assert available_bytes(tmp_path) == 800 * MIB
    assert cache_budget(None, tmp_path) == 100 * MIB
    assert cache_budget(799 * MIB, tmp_path) == 799 * MIB
    with pytest.raises(McorefsError, match="asks for 900 MiB, but only 800 MiB"):
        cache_budget(900 * MIB, tmp_path)


def test_a_container_sees_only_its_own_cgroup(tmp_path: Path) -> None:
    machine(tmp_path, 64_000, "0::/docker/0123abcd\n")
    cgroup(tmp_path, "", str(512 * MIB), used_mib=112)
    assert available_bytes(tmp_path) == 400 * MIB


def test_cgroup_version_1(tmp_path: Path) -> None:
    machine(tmp_path, 64_000, "5:cpuset:/x\n4:memory:/x\n0::/\n")
    directory = tmp_path / "sys/fs/cgroup/memory/x"
    directory.mkdir(parents=True)
    (directory / "memory.limit_in_bytes").write_text(str(256 * MIB))
    (directory / "memory.usage_in_bytes").write_text(str(56 * MIB))
    assert available_bytes(tmp_path) == 200 * MIB


def test_this_machine() -> None:
    assert available_bytes() > 0
