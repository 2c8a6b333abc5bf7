"""`torch.save` archives: where the bytes of a tensor lie, found without torch and without copying.

An archive is a zip whose records are all STORED. Sizes are in the central directory only (the
local headers leave them to a data descriptor), data offsets in the local headers only (they are
padded for alignment); CRCs may be zero. Facts: pytorch:caffe2/serialize/inline_container.cc and
torch/serialization.py. The archive may start anywhere in its file, as in a `.distcp`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mcorefs.errors import CheckpointError
from mcorefs.unpickle import StoredView, loads

Pread = Callable[[int, int], bytes]
"""pread(offset, nbytes) relative to the start of the archive; raises if it comes short."""

_EOCD = struct.Struct("<4s4H2LH")
_EOCD64_LOCATOR = struct.Struct("<4sLQL")
_EOCD64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_GUESS = 2048
"""Head and tail of an archive of one tensor: two reads of this size find everything."""
MAX_PICKLE = 1 << 30


@dataclass(frozen=True, slots=True)
class Record:
    """One member: its name without the archive's prefix, its local header, its size in bytes."""

    name: str
    header: int
    nbytes: int


def records(pread: Pread, nbytes: int, what: str) -> Mapping[str, Record]:
    """The members of the archive of `nbytes` bytes, by name ("data.pkl", "data/0").

    Raises CheckpointError where it is not a well-formed archive of stored members.
    """
    tail_start = max(0, nbytes - _GUESS)
    tail = pread(tail_start, nbytes - tail_start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + _EOCD.size:
        raise _malformed(what, "it has no end-of-directory record")
    count, size, start = _EOCD.unpack_from(tail, at)[4:7]
    locator = at - _EOCD64_LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
        offset64 = _EOCD64_LOCATOR.unpack_from(tail, locator)[2]
        if offset64 + _EOCD64.size > nbytes:
            raise _malformed(what, "its directory lies outside of it")
        fields = _EOCD64.unpack(pread(offset64, _EOCD64.size))
        if fields[0] != b"PK\6\6":
            raise _malformed(what, "its zip64 directory record is damaged")
        count, size, start = fields[7:10]
    if start + size > nbytes or size > MAX_PICKLE:
        raise _malformed(what, "its directory lies outside of it")
    inside = start >= tail_start
    directory = (
        tail[start - tail_start : start - tail_start + size] if inside else pread(start, size)
    )
    return _parse_directory(directory, count, nbytes, what)


def _parse_directory(directory: bytes, count: int, nbytes: int, what: str) -> Mapping[str, Record]:
    found: dict[str, Record] = {}
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(directory):
            raise _malformed(what, "its directory is cut short")
        fields = _CENTRAL.unpack_from(directory, at)
        flags, method = fields[3], fields[4]
        packed, size, name_len, extra_len, comment_len = fields[8:13]
        header = fields[16]
        at += _CENTRAL.size
        name = directory[at : at + name_len].decode("utf-8", "replace")
        extra = directory[at + name_len : at + name_len + extra_len]
        size, packed, header = _zip64(extra, size, packed, header)
        at += name_len + extra_len + comment_len
        short = name.split("/", 1)[-1]
        if method != 0 or packed != size or flags & 1:
            raise _malformed(what, f"record {short} is compressed or encrypted")
        if header + _LOCAL.size + size > nbytes or short in found:
            raise _malformed(what, f"record {short} lies outside of it or comes twice")
        found[short] = Record(short, header, size)
    return found


def _zip64(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """The three fields with those that hold all ones taken from the zip64 extra field."""
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            numbers = list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            values = [size, packed, header]
            for i, value in enumerate(values):
                if value == 0xFFFFFFFF and numbers:
                    values[i] = numbers.pop(0)
            return values[0], values[1], values[2]
        at += 4 + length
    return size, packed, header


def data_start(pread: Pread, record: Record, nbytes: int, what: str) -> int:
    """Offset of the record's bytes from the start of the archive."""
    header = _LOCAL.unpack(pread(record.header, _LOCAL.size))
    start = record.header + _LOCAL.size + header[9] + header[10]
    if header[0] != b"PK\3\4" or header[3] != 0 or start + record.nbytes > nbytes:
        raise _malformed(what, f"the header of record {record.name} is damaged")
    return int(start)


def load(pread: Pread, nbytes: int, what: str) -> tuple[object, Mapping[str, Record]]:
    """The object saved in the archive, as data (`unpickle.loads`), and the archive's records.

    A tensor becomes a StoredView of the record `data/<key>` of its storage; none is read.
    """
    members = records(pread, nbytes, what)
    if "data.pkl" not in members:
        raise _malformed(what, "it has no data.pkl")
    _check_byte_order(pread, members, nbytes, what)
    return _load_pickle(pread, members["data.pkl"], nbytes, what), members


def load_object(pread: Pread, nbytes: int, what: str) -> object:
    """The object saved in the archive, as data; see `load`."""
    return load(pread, nbytes, what)[0]


def locate_tensor(pread: Pread, nbytes: int, what: str) -> tuple[int, StoredView]:
    """(offset of its storage's bytes, the tensor) for an archive that holds one tensor.

    Reads the head and the tail of the archive, never the data.
    """
    head = pread(0, min(_GUESS, nbytes))

    def buffered(offset: int, count: int) -> bytes:
        if offset + count <= len(head):
            return head[offset : offset + count]
        return pread(offset, count)

    members = records(pread, nbytes, what)
    if "data.pkl" not in members:
        raise _malformed(what, "it has no data.pkl")
    _check_byte_order(buffered, members, nbytes, what)
    tensor = _load_pickle(buffered, members["data.pkl"], nbytes, what)
    if not isinstance(tensor, StoredView):
        raise CheckpointError(
            f"{what}: expected a plain tensor, found {getattr(tensor, 'name', tensor)!s:.80}. "
            "Quantised tensor classes cannot be read bit for bit."
        )
    record = record_of(tensor, members, what)
    return data_start(buffered, record, nbytes, what), tensor


def record_of(tensor: StoredView, members: Mapping[str, Record], what: str) -> Record:
    """The record that holds every element of `tensor`. Raises CheckpointError if none does."""
    record = members.get(f"data/{tensor.storage.key}")
    if record is None:
        raise _malformed(what, f"it has no record data/{tensor.storage.key}")
    if len(tensor.size) != len(tensor.stride) or min((*tensor.size, *tensor.stride, 0)) < 0:
        raise _malformed(what, "its tensor has an impossible shape")
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True))
    end = 0 if 0 in tensor.size else (last + 1) * tensor.dtype.itemsize
    if tensor.offset < 0 or end > record.nbytes:
        raise _malformed(what, "its tensor reaches beyond its storage")
    return record


def _load_pickle(pread: Pread, record: Record, nbytes: int, what: str) -> object:
    if record.nbytes > MAX_PICKLE:
        raise _malformed(what, f"its data.pkl has {record.nbytes} bytes")
    start = data_start(pread, record, nbytes, what)
    return loads(pread(start, record.nbytes), what, storages=True)


def _check_byte_order(pread: Pread, members: Mapping[str, Record], nbytes: int, what: str) -> None:
    order = members.get("byteorder")
    if order is None:
        return
    value = pread(data_start(pread, order, nbytes, what), min(order.nbytes, 16))
    if value != b"little":
        raise CheckpointError(f"{what} was written in {value!r} byte order; only little is read")


def _malformed(what: str, why: str) -> CheckpointError:
    return CheckpointError(f"{what} is not a well-formed torch.save archive: {why}")
