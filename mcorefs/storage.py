"""Reading spans: where a chunk's elements lie in its file, and the bytes there."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mcorefs.activity import Activity
from mcorefs.boxes import Shape, row_major_strides
from mcorefs.deadline import Deadline
from mcorefs.dtypes import DType
from mcorefs.encoding import MAX_NBYTES, EncodingError, decode
from mcorefs.errors import CheckpointError, ReadFault
from mcorefs.files import FileIdentity
from mcorefs.index import Chunk, Span
from mcorefs.local import LocalFiles, local_file
from mcorefs.patience import PASSING, again
from mcorefs.rate import NO_LIMIT, Rate
from mcorefs.remote import is_url
from mcorefs.torchzip import GUESS, Locator, Record, data_start

if TYPE_CHECKING:
    from mcorefs.remote.objects import Objects

__all__ = [
    "FileIdentity",
    "Placed",
    "Storage",
    "is_file",
    "is_file_name",
    "is_there",
    "read_file",
    "read_start",
    "regular_file",
    "sees",
]

REMOTE_BYTES = 64 << 20
"""Bytes of remote files that are kept, if nothing else is said."""

MAX_EDGES = 1024
"""Of archives within a file, at 2 * GUESS bytes each, that are kept for their neighbours."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a chunk's elements lie in its file; strides in elements."""

    path: str
    offset: int
    strides: Shape


class Storage:
    """The shard files of one checkpoint: of this machine, or in an object store where their names
    are URLs.

    `identities` are the files as they were when the index was made: what is read is of those, or a
    ReadFault, so that two versions are never mixed (`LocalFiles`, `Objects`). Thread-safe.
    """

    def __init__(
        self,
        identities: Mapping[str, FileIdentity],
        max_open: int = 512,
        remote_bytes: int = REMOTE_BYTES,
        rate: Rate = NO_LIMIT,
        deadline: Deadline | None = None,
        activity: Activity | None = None,
    ) -> None:
        self._identities = identities
        self._activity = activity or Activity()
        self._files = LocalFiles(identities, max_open, deadline)
        self._rate = rate
        self._objects: Objects | None = None
        if any(map(is_url, identities)):
            from mcorefs.remote.objects import Objects

            self._objects = Objects(identities, remote_bytes)
        self._locator = Locator()
        self._placed: dict[Span, Placed] = {}
        self._edges: dict[tuple[str, int], bytes] = {}
        """What was read around the end of one archive, until the next one wants it."""
        self._record_starts: dict[tuple[str, int], int] = {}
        self._decoded: OrderedDict[Span, bytes | bytearray] = OrderedDict()
        self._decoding = threading.Lock()

    def read_into(self, path: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of `path` from `offset` on. Raises ReadFault if it cannot."""
        if self._rate is not NO_LIMIT:
            self._rate.wait(len(out))
        if self._objects is not None and is_url(path):
            self._objects.read_into(path, offset, out)
        else:
            self._files.read_into(path, offset, out)
        self._activity.shard_bytes.add(len(out))

    def hold(self) -> None:
        """Open files of this machine, so that they can be read when they have been deleted."""
        if not self.is_remote:
            self._files.hold()

    def let_go(self) -> None:
        """Close files that nobody reads: a deleted one takes up its space until then."""
        self._files.let_go()

    @property
    def is_remote(self) -> bool:
        """Whether a read may take as long as a request to a server."""
        return self._objects is not None

    @property
    def pieces_ahead(self) -> int:
        """How many pieces it is worth to read ahead of a reader; 0 of files of this machine."""
        return 0 if self._objects is None else self._objects.pieces_ahead

    def expect(self, wanted: Iterable[tuple[Chunk, int, int]]) -> None:
        """Begin to fetch what will be read of remote chunks: (chunk, first byte of its elements,
        bytes), and what it takes to place them. Where they are not placed yet this is a guess."""
        if self._objects is not None:
            self._objects.expect(found for part in wanted for found in self._likely(*part))

    def _likely(self, chunk: Chunk, start: int, nbytes: int) -> Iterator[tuple[str, int, int]]:
        span = chunk.span
        placed = self._placed.get(span)
        if not is_url(span.path):
            return
        if placed is not None:
            yield span.path, placed.offset + start, nbytes
            return
        if span.kind != "raw":
            yield span.path, span.offset, GUESS
        if span.kind == "torch_zip":
            yield span.path, span.offset + span.nbytes - GUESS, GUESS
        if nbytes:
            yield span.path, span.offset + span.skip + start, nbytes + GUESS

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        """The bytes [offset, offset + nbytes) of `path`. Raises ReadFault if it cannot."""
        out = bytearray(nbytes)
        self.read_into(path, offset, memoryview(out))
        return bytes(out)

    def decoded(self, span: Span) -> bytes | bytearray:
        """What the compressed bytes of `span` stand for. Raises ReadFault if they cannot be had.

        One is decoded at a time, and no more than MAX_NBYTES are kept.
        """
        assert span.encoding is not None
        with self._decoding:
            found = self._decoded.pop(span, None)
            if found is None:
                try:
                    found = decode(self.read(span.path, span.offset, span.nbytes), span.encoding)
                except EncodingError as problem:
                    raise ReadFault(
                        f"{span.path} cannot be decoded ({span.encoding.codec}): {problem}"
                    ) from None
            self._decoded[span] = found
            while sum(map(len, self._decoded.values())) > MAX_NBYTES:
                self._decoded.popitem(last=False)
            return found

    def place(self, chunk: Chunk, dtype: DType) -> Placed:
        """Where the elements of `chunk` lie, found on first use and kept.

        Raises ReadFault when the entry contradicts the index or cannot be read.
        """
        span = chunk.span
        placed = self._placed.get(span)
        if placed is None:
            placed = self._placed[span] = self._find(chunk, dtype)
        return placed

    def _find(self, chunk: Chunk, dtype: DType) -> Placed:
        span, shape = chunk.span, chunk.box.sizes
        strides = row_major_strides(shape) if span.strides is None else span.strides
        if span.kind == "raw":
            return Placed(span.path, span.offset + span.skip, strides)
        if span.kind == "zip_record":
            return Placed(span.path, self._record_start(span) + span.skip, strides)
        what = f"{span.path} (entry at byte {span.offset})"
        try:
            start, tensor = self._locator.locate(
                lambda offset, count: self._near_edge(span, offset, count),
                span.nbytes,
                what,
            )
            if tensor.size != shape or tensor.dtype != dtype:
                raise CheckpointError(
                    f"{what}: .metadata says {dtype.torch} {list(shape)} but the entry holds "
                    f"{tensor.dtype.torch} {list(tensor.size)}"
                )
        except ReadFault:
            raise
        except CheckpointError as problem:
            raise ReadFault(str(problem)) from None
        offset = span.offset + start + tensor.offset * dtype.itemsize
        return Placed(span.path, offset, tensor.stride)

    def _near_edge(self, span: Span, offset: int, count: int) -> bytes:
        """Bytes of an archive, from the head of which to its tail others follow in its file: what
        lies around the edge of two is read once for both."""
        start = span.offset + offset
        edge = span.offset + (span.nbytes if offset else 0)
        low = max(0, edge - GUESS)
        high = min(edge + GUESS, self._identities[span.path].size)
        if self.is_remote or not low <= start <= start + count <= high:
            return self.read(span.path, start, count)
        around = self._edges.pop((span.path, edge), None)
        if around is None:
            around = self.read(span.path, low, high - low)
            if len(self._edges) >= MAX_EDGES:
                self._edges.clear()
            self._edges[span.path, edge] = around
        return around[start - low : start - low + count]

    def _record_start(self, span: Span) -> int:
        """Offset of a zip record's data; many chunks may lie in one record, so it is kept."""
        key = span.path, span.offset
        start = self._record_starts.get(key)
        if start is None:
            record = Record(f"at byte {span.offset}", span.offset, span.nbytes)

            def pread(offset: int, nbytes: int) -> bytes:
                return self.read(span.path, offset, nbytes)

            try:
                start = data_start(pread, record, self._identities[span.path].size, span.path)
            except ReadFault:
                raise
            except CheckpointError as problem:
                raise ReadFault(str(problem)) from None
            self._record_starts[key] = start
        return start

    def close(self) -> None:
        """Close every file, those of reads in progress when they end; later reads are refused."""
        self._files.close()
        if self._objects is not None:
            self._objects.close()


def regular_file(path: str | Path) -> tuple[FileIdentity | None, str | None]:
    """Identity of the regular file at `path`, or why there is none: one of the two is None."""
    if is_url(str(path)):
        from mcorefs.remote.path import identity_of

        return identity_of(path)
    return local_file(str(path))


def read_file(path: Path, most: int) -> bytes:
    """The content of the small file at `path`.

    Raises OSError, also where it has more than `most` bytes, or is a FIFO or a device: whoever made
    the directory may have put anything there, and those are never read to their end.
    """
    return again(lambda: _read_file(path, most))


def _read_file(path: Path, most: int) -> bytes:
    if is_url(str(path)):
        with path.open("rb") as file:
            data: bytes = file.read(most + 1)
        if len(data) > most:
            raise OSError(errno.EFBIG, f"it is larger than {most >> 20} MiB", str(path))
        return data
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    if status.st_size > most:
        why = f"it is larger than {most >> 20} MiB ({status.st_size} bytes)"
        raise OSError(errno.EFBIG, why, str(path))
    with path.open("rb") as file:
        return file.read(status.st_size)


def read_start(path: Path, most: int) -> bytes:
    """The first `most` bytes of the file at `path`. Raises OSError."""

    def read() -> bytes:
        with path.open("rb") as file:
            data: bytes = file.read(most)
            return data

    return again(read)


def is_file(path: Path) -> bool:
    """Whether there is a file at `path`, as `sees` says."""
    return sees(path.is_file)


def sees(look: Callable[[], bool]) -> bool:
    """What `look` says; False where we may not look, or not there. Raises OSError where the storage
    fails to say: nothing is taken for not there because of that."""
    try:
        return again(look)
    except OSError as problem:
        if problem.errno in PASSING:
            raise
        return False


def is_there(path: Path) -> bool:
    """Whether anything has the name `path`, be it a link that leads nowhere."""
    return sees(path.exists) or (not is_url(str(path)) and os.path.lexists(path))


def is_file_name(name: str) -> bool:
    """Whether `name` is that of a file in a directory: no path, and one the system can take."""
    if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
