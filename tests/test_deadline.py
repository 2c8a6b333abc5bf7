"""Work with a deadline: what hangs is left behind, counted, and bounded."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mcorefs import deadline
from mcorefs.deadline import Deadline, LateError
from mcorefs.files import FileIdentity
from mcorefs.local import LOOKS, PATIENCE, LocalFiles
from mcorefs.mount.operations import Turns


def nothing(result: object) -> None: ...


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_results_and_errors_come_back() -> None:
    patience = Deadline(30)
    assert patience.run("a", lambda: 7, nothing) == 7
    lost: list[object] = []
    with pytest.raises(ZeroDivisionError):
        patience.run("a", lambda: 1 // 0, lost.append)
    assert lost == [None]
    assert patience.hanging == 0


def test_one_thread_serves_one_caller() -> None:
    patience = Deadline(30)
    names = {patience.run("a", threading.get_ident, nothing) for _ in range(50)}
    assert len(names) <= 2  # one may still be about to rest


def test_what_hangs_is_left_behind_and_alone() -> None:
    patience, go_on, lost = Deadline(0.05), threading.Event(), list[object]()

    def hang() -> str:
        assert go_on.wait(30)
        return "late"

    with pytest.raises(LateError, match="nothing within"):
        patience.run("a", hang, lost.append)
    assert patience.hanging == 1
    started = time.monotonic()
    refused: list[object] = []
    with pytest.raises(LateError, match="still hangs"):
        patience.run("a", lambda: 1, refused.append)
    assert time.monotonic() - started < 0.04
    assert refused == [None]
    assert patience.run("b", lambda: 2, nothing) == 2
    assert not lost
    go_on.set()
    until(lambda: lost == ["late"])
    assert patience.hanging == 0
    assert patience.run("a", lambda: 3, nothing) == 3


def test_no_more_hang_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "MAX_HANGING", 3)
    patience, go_on = Deadline(0.01), threading.Event()
    before = threading.active_count()
    for name in "abc":
        with pytest.raises(LateError, match="nothing within"):
            patience.run(name, lambda: go_on.wait(30), nothing)
    for name in "def":
        with pytest.raises(LateError, match="3 requests to this storage hang"):
            patience.run(name, lambda: True, nothing)
    assert threading.active_count() <= before + 3
    go_on.set()
    until(lambda: patience.hanging == 0)
    assert patience.run("d", lambda: True, nothing)


def test_a_fork_starts_its_own_threads() -> None:
    patience = Deadline(5)
    patience.run("a", lambda: 1, nothing)
    until(lambda: bool(patience._idle))
    pid = os.fork()
    if pid == 0:
        os._exit(patience.run("a", lambda: 17, nothing))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 17


def test_a_late_open_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"abc")
    files = LocalFiles({str(path): FileIdentity.of(path.stat())}, 8, Deadline(0.05))
    go_on, opened, open_ = threading.Event(), list[int](), os.open

    def slow(name: str, flags: int) -> int:
        assert go_on.wait(30)
        opened.append(open_(name, flags))
        return opened[-1]

    monkeypatch.setattr(os, "open", slow)
    with pytest.raises(OSError, match="does not answer"):
        files.read_into(str(path), 0, memoryview(bytearray(3)))
    go_on.set()
    until(lambda: bool(opened))

    def is_closed() -> bool:
        try:
            os.fstat(opened[0])
        except OSError:
            return True
        return False

    until(is_closed)


def test_a_slow_read_gives_its_turn_away() -> None:
    turns, go_on = Turns(1), threading.Event()

    def slow() -> None:
        with turns:
            assert go_on.wait(30)

    thread = threading.Thread(target=slow)
    thread.start()
    until(lambda: bool(turns._since))
    for _ in range(3):
        with turns:
            pass  # after a moment
    go_on.set()
    thread.join()
    with turns:
        assert turns._free.empty()  # still no more than one at once


class Disk:
    """What the kernel says of a file whose bytes come after so many looks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, looks: int) -> None:
        path.write_bytes(b"abc")
        self.files = LocalFiles({str(path): FileIdentity.of(path.stat())}, 8, Deadline(5))
        self._path, self._looks, self._looked = str(path), looks, 0
        self.waited = 0
        self._preadv = os.preadv
        monkeypatch.setattr(os, "preadv", self.preadv)

    def preadv(self, fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        self._looked += 1
        if flags and self._looked <= self._looks:
            raise BlockingIOError
        self.waited += not flags
        return self._preadv(fd, buffers, at)

    def read(self) -> int:
        """How often it was looked at."""
        out, self._looked = bytearray(3), 0
        self.files.read_into(self._path, 0, memoryview(out))
        assert out == b"abc"
        return self._looked


def test_what_comes_soon_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, tmp_path / "shard", len(LOOKS) - 1)
    for _ in range(2 * PATIENCE):
        assert disk.read() == len(LOOKS)
    assert disk.waited == 0


def test_a_slow_disk_is_looked_at_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, tmp_path / "shard", 99)
    found = [disk.read() for _ in range(PATIENCE + 3)]
    assert found == [len(LOOKS) + 1] * PATIENCE + [2] * 3
    assert disk.waited == PATIENCE + 3
