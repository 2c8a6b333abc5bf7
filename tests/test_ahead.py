"""Reading ahead of whoever reads a file from front to back."""

from __future__ import annotations

import threading

from mcorefs.remote.ahead import PIECE, AheadFile, ReadAhead


class Noting:
    """A file that notes which pieces are read (VirtualFile)."""

    def __init__(self, pieces: int) -> None:
        self.size = pieces * PIECE
        self.read: list[int] = []
        self.met = threading.Barrier(2, timeout=20)
        self.meeting = -1
        """A piece that is not read until two want it."""

    def read_into(self, offset: int, out: memoryview) -> None:
        self.read.append(offset // PIECE)
        if offset // PIECE == self.meeting:
            self.met.wait()


def test_who_goes_on_reading_is_read_ahead_of() -> None:
    """The reader meets one that was sent ahead."""
    file = Noting(pieces=12)
    file.meeting = 3
    ahead = AheadFile(file, ReadAhead(most=4))
    part = memoryview(bytearray(PIECE // 4))
    for offset in range(0, 3 * PIECE + 1, len(part)):
        ahead.read_into(offset, part)
    assert file.read.count(file.meeting) == 2


def test_nothing_is_read_ahead_twice_or_beyond_the_end() -> None:
    file = Noting(pieces=12)
    ahead = AheadFile(file, ReadAhead(most=4))
    for piece in range(12):
        ahead.read_into(piece * PIECE, memoryview(bytearray(PIECE)))
    assert max(file.read) == 11
    assert all(file.read.count(piece) <= 2 for piece in range(12))


def test_who_reads_here_and_there_is_not() -> None:
    file = Noting(pieces=40)
    ahead = AheadFile(file, ReadAhead(most=4))
    for piece in (30, 2, 17, 25, 8):
        ahead.read_into(piece * PIECE, memoryview(bytearray(10)))
    assert sorted(file.read) == [2, 8, 17, 25, 30]
