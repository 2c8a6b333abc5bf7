"""What all formats share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mcorefs.errors import CheckpointError
from mcorefs.formats.base import reading


def test_reading_counts_from_its_offset_and_never_comes_short(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(range(100)))
    with reading(str(path), 10) as pread:
        assert pread(5, 3) == bytes([15, 16, 17])
        assert pread(89, 1) == b"\x63"
        for offset, count in ((89, 2), (90, 1), (1 << 63, 1), (1 << 80, 1)):
            with pytest.raises(CheckpointError, match="shard"):
                pread(offset, count)
    assert not [fd for fd in os.listdir("/proc/self/fd") if _target(fd) == str(path)]


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


@pytest.mark.parametrize("kind", ["missing", "link", "directory", "fifo"])
def test_reading_refuses_all_but_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "shard"
    if kind == "link":
        (tmp_path / "real").write_bytes(b"x")
        path.symlink_to("real")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match="shard"), reading(str(path)) as pread:
        pread(0, 1)
