"""scripts/soak for a few seconds: the bytes of several mounts from many readers at once."""

from __future__ import annotations

from pathlib import Path

from scripts.soak import NAMES, soak
from tests.checkpoints import ensure

MIB = 1 << 20
ALLOWANCE = 200 * MIB
"""What a daemon needs beside its cache: itself, and the requests of its threads."""


def test_many_readers_of_several_mounts(tmp_path: Path) -> None:
    fixtures = [*ensure(NAMES).values()]
    used = soak(fixtures, tmp_path, seconds=6, readers=64, cache="16MiB")
    assert len(used) == len(fixtures) + 1
    for most in used:
        assert 0 < max(most.rss) < 16 * MIB + ALLOWANCE
        assert max(most.descriptors) < 512 + 64
