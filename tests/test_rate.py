"""--max-read-rate: how long readers wait, told to a clock that only waiting moves."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mcorefs import rate as module
from mcorefs.model import Options
from mcorefs.rate import NO_LIMIT, Rate
from mcorefs.tree import open_tree
from tests.checkpoints import ensure


class Clock:
    def __init__(self) -> None:
        self.now, self.slept = 1000.0, 0.0
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now, self.slept = self.now + seconds, self.slept + seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_as_many_bytes_as_time_allows(clock: Clock) -> None:
    rate, begun = Rate(1000), clock.now
    for _ in range(50):
        rate.wait(100)
    assert clock.now - begun == pytest.approx(5 - module.BURST)


def test_a_pause_is_not_saved_up(clock: Clock) -> None:
    rate = Rate(1000)
    rate.wait(100)
    clock.now += 3600
    begun = clock.now
    rate.wait(1000)
    assert clock.now - begun == pytest.approx(1 - module.BURST)


def test_no_limit(clock: Clock) -> None:
    NO_LIMIT.wait(1 << 50)
    assert clock.slept == 0


def test_every_byte_of_the_shards_counts(clock: Clock, tmp_path: Path) -> None:
    fixture = ensure(["qwen3"])["qwen3"]
    options = Options(vocab_size=fixture.spec.vocab_size, max_read_rate=1000)
    opened = open_tree(fixture.root, options)
    name = "model.safetensors"
    file = opened.tree.files[name]
    begun = clock.now
    out = bytearray(file.size)
    file.read_into(0, memoryview(out))
    assert bytes(out) == (fixture.hf / name).read_bytes()
    assert clock.now - begun >= file.size / 1000 - module.BURST
