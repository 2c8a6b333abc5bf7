"""scripts/soak for a few seconds: the bytes of several mounts from many readers at once."""

from __future__ import annotations

from pathlib import Path

from scripts.soak import NAMES, Model, soak
from tests.checkpoints import ensure

MIB = 1 << 20
ALLOWANCE = 200 * MIB
"""What a daemon needs beside its cache: itself, and the requests of its threads."""


def test_many_readers_of_several_mounts(tmp_path: Path) -> None:
    models = [Model.of(fixture) for fixture in ensure(NAMES).values()]
    came = soak(models, tmp_path, seconds=6, readers=64, cache="16MiB", reads=10_000)
    assert came.reads >= 10_000
    assert len(came.served) == len(models) + 1
    for each, asked in zip(came.served, came.asked, strict=True):
        assert asked["read_errors"] == 0 < asked["served_bytes"]
        for rss, descriptors in each.most(3):
            assert 0 < rss < 16 * MIB + ALLOWANCE
            assert descriptors < 512 + 64
