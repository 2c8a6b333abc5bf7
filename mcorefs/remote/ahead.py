"""Reading ahead of whoever reads a file from front to back, as engines and copies do.

A file of the tree is made of pieces of many objects, and where they lie is known only while it is
read. So it is read ahead by reading it: threads of their own read what comes next into nothing,
and what they read stays in the blocks of `Objects`. The longer a reader goes on, the further ahead.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from mcorefs.errors import ReadFault
from mcorefs.files import VirtualFile

PIECE = 4 << 20
MOST = 16
"""Pieces ahead of a reader, each of which a thread is busy with."""
_REMEMBERED = 4096


class ReadAhead:
    """Reads ahead in the files of one tree, at most `most` pieces at a time. Thread-safe; its
    threads begin in the process that reads."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Also in a process that was forked: it has none of the threads."""
        self._read: OrderedDict[tuple[int, int], None] = OrderedDict()
        """(id of a file, piece) that readers asked for, lately."""
        self._begun: OrderedDict[tuple[int, int], None] = OrderedDict()
        """Those begun ahead of them that they have not come to yet."""
        self._active = 0
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()

    def note(self, file: VirtualFile, offset: int, nbytes: int) -> None:
        """Bytes [offset, offset + nbytes) of `file` are about to be read."""
        if self._process != os.getpid():
            self._begin_anew()
        for piece in range(offset // PIECE, -(-(offset + nbytes) // PIECE)):
            self._note_piece(file, piece)

    def _note_piece(self, file: VirtualFile, piece: int) -> None:
        key = id(file), piece
        with self._lock:
            if next(reversed(self._read), None) == key:
                return
            self._begun.pop(key, None)
            self._read[key] = None
            self._read.move_to_end(key)
            _shorten(self._read, _REMEMBERED)
            run = 0
            while run < self._most and (id(file), piece - run - 1) in self._read:
                run += 1
            last = min(piece + min(2 * run, self._most), (file.size - 1) // PIECE)
            for number in range(piece + 1, last + 1):
                ahead = id(file), number
                if self._active < self._most and ahead not in self._begun:
                    self._begin(file, number)
                    self._begun[ahead] = None
            _shorten(self._begun, 4 * self._most)

    def _begin(self, file: VirtualFile, piece: int) -> None:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._most, "mcorefs-ahead")
        self._active += 1
        self._threads.submit(self._read_piece, file, piece)

    def _read_piece(self, file: VirtualFile, piece: int) -> None:
        start = piece * PIECE
        try:
            with suppress(ReadFault):  # whoever comes to read it learns of it
                file.read_into(start, memoryview(bytearray(min(PIECE, file.size - start))))
        finally:
            with self._lock:
                self._active -= 1


def _shorten(noted: OrderedDict[tuple[int, int], None], most: int) -> None:
    while len(noted) > most:
        noted.popitem(last=False)


@dataclass(frozen=True, eq=False)
class AheadFile:
    """A file whose readers are read ahead of (VirtualFile)."""

    file: VirtualFile
    ahead: ReadAhead

    @property
    def size(self) -> int:
        return self.file.size

    def read_into(self, offset: int, out: memoryview) -> None:
        self.ahead.note(self.file, offset, len(out))
        self.file.read_into(offset, out)
