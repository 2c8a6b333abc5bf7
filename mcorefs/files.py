"""VirtualFile: a file of the tree, to those who serve it (`mount`, `materialize`, the API).
FileIdentity: a real file, to those who read it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What must stay the same about a file for its bytes to be the same."""

    size: int
    mtime_ns: int
    inode: int
    """0 of an object in a store."""
    version: str = ""
    """ETag or the like of an object in a store; "" of a local file."""

    @staticmethod
    def of(status: os.stat_result) -> FileIdentity:
        return FileIdentity(status.st_size, status.st_mtime_ns, status.st_ino)


class VirtualFile(Protocol):
    """A read-only file of known size whose bytes may be computed when they are read.

    Implementations are safe to call from many threads at once, and never wait for a thread that
    itself may be serving a read of this tree.
    """

    @property
    def size(self) -> int:
        """Bytes in the file; never changes."""
        ...

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill all of `out` (writable, C-contiguous bytes) with the bytes from `offset` on.

        The caller asks only for bytes inside the file: 0 <= offset, offset + len(out) <= size.
        Raises ReadFault (an OSError with errno EIO) if the source cannot deliver them.
        """
        ...


@dataclass(frozen=True)
class BytesFile:
    """A small file held in memory: config.json, the index, tokenizer files."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self.data[offset : offset + len(out)]


def read_all(file: VirtualFile) -> bytes:
    """The whole content of `file`."""
    out = bytearray(file.size)
    file.read_into(0, memoryview(out))
    return bytes(out)
