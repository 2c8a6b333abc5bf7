"""`torch.save` archives: where the bytes of a tensor lie, found without torch and without copying.

An archive is a zip whose records are all STORED. Sizes are in the central directory only (the
local headers leave them to a data descriptor), data offsets in the local headers only (they are
padded for alignment); CRCs may be zero. Facts: pytorch:caffe2/serialize/inline_container.cc and
torch/serialization.py. The archive may start anywhere in its file, as in a `.distcp`.

Read as strictly as it is written: what two zip readers could understand differently is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mcorefs.errors import CheckpointError
from mcorefs.unpickle import StoredView, describe, loads

Pread = Callable[[int, int], bytes]
"""pread(offset, nbytes) relative to the start of the archive; raises if it comes short."""

_EOCD = struct.Struct("<4s4H2LH")
_EOCD64_LOCATOR = struct.Struct("<4sLQL")
_EOCD64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_CRC = 16
"""Offset of a record's checksum in the directory."""
_LOCAL = struct.Struct("<4s5H3L2H")
_ALL_ONES16, _ALL_ONES32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTOR, _UTF8 = 0x0008, 0x0800
"""Flags of a record: its sizes follow it; its name is UTF-8. No other is ever set."""
_DESCRIPTORS = (0, 12, 16, 20, 24)
"""Bytes of what follows the data: a CRC and two sizes of 4 or 8 bytes, with or without a mark."""
GUESS = 2048
"""Head and tail of an archive of one tensor: two reads of this size find everything."""
_TWINS = 4
"""Kinds of archives remembered for each size."""
MAX_PICKLE = 1 << 30
MAX_DIRECTORY = 1 << 28
"""Some two million records."""
MAX_SMALL = 1 << 20
"""Most bytes of either in an archive of one tensor, which is opened while files are read."""


@dataclass(frozen=True, slots=True)
class Record:
    """One member: its name without the archive's prefix, its local header, its size in bytes."""

    name: str
    header: int
    nbytes: int
    full_name: bytes | None = None
    """As the local header must repeat it; None where that is not known."""
    end: int | None = None
    """Where the next record or the directory begins."""
    crc: int | None = None
    """CRC-32 of its bytes; 0 where the writer computed none."""


def records(
    pread: Pread, nbytes: int, what: str, most: int = MAX_DIRECTORY
) -> Mapping[str, Record]:
    """The members of the archive of `nbytes` bytes, by name ("data.pkl", "data/0").

    Raises CheckpointError where it is not a well-formed archive of stored members, or has a
    directory of more than `most` bytes.
    """
    tail_start = max(0, nbytes - GUESS)
    tail = _read(pread, tail_start, nbytes - tail_start, nbytes, what)
    count, size, start = _find_directory(tail, nbytes, what)
    if size > most:
        raise _malformed(what, f"its directory has {size} bytes")
    if start >= tail_start:
        directory = tail[start - tail_start : start - tail_start + size]
    else:
        directory = _read(pread, start, size, nbytes, what)
    found = _parse_directory(directory, count, what)
    return _bounded(found, start, what)


def _find_directory(tail: bytes, nbytes: int, what: str) -> tuple[int, int, int]:
    """(number of records, size, start) of the directory, from the last bytes of the archive.

    It ends the archive: there is no comment, so there is one place only to look for its end.
    """
    if len(tail) < _EOCD.size or not tail[-_EOCD.size :].startswith(b"PK\5\6"):
        raise _malformed(what, "it does not end as one does; it may be cut short")
    *disks, here, count, size, start, comment = _EOCD.unpack(tail[-_EOCD.size :])[1:]
    end = nbytes - _EOCD.size
    locator = tail[-_EOCD.size - _EOCD64_LOCATOR.size : -_EOCD.size]
    if locator.startswith(b"PK\6\7"):
        _, disk, end, _ = _EOCD64_LOCATOR.unpack(locator)
        large = tail[: -_EOCD.size - _EOCD64_LOCATOR.size][-_EOCD64.size :]
        adjacent = end + _EOCD64.size == nbytes - _EOCD.size - _EOCD64_LOCATOR.size
        if not adjacent or len(large) < _EOCD64.size or not large.startswith(b"PK\6\6"):
            raise _malformed(what, "its zip64 directory record is not where it should be")
        small = (here, count, size, start)
        length, _, _, *more, here, count, size, start = _EOCD64.unpack(large)[1:]
        disks += [disk, *more]
        ones = (_ALL_ONES16, _ALL_ONES16, _ALL_ONES32, _ALL_ONES32)
        wide = (here, count, size, start)
        agree = all(s in (w, one) for s, w, one in zip(small, wide, ones, strict=True))
        if not agree or length != _EOCD64.size - 12:
            raise _malformed(what, "its two directory records disagree")
    if any(disks) or here != count or comment:
        raise _malformed(what, "it has several parts or a comment")
    if start + size != end or count * _CENTRAL.size > size:
        raise _malformed(what, "its directory is not where it should be")
    return count, size, start


def _parse_directory(directory: bytes, count: int, what: str) -> list[Record]:
    found: list[Record] = []
    prefixes: set[str] = set()
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(directory) or not directory.startswith(b"PK\1\2", at):
            raise _malformed(what, "its directory is cut short")
        fields = _CENTRAL.unpack_from(directory, at)
        flags, method = fields[3], fields[4]
        packed, size, name_len, extra_len, comment_len, disk = fields[8:14]
        at += _CENTRAL.size
        raw = directory[at : at + name_len]
        extra = directory[at + name_len : at + name_len + extra_len]
        at += name_len + extra_len + comment_len
        try:
            prefix, slash, name = raw.decode().partition("/")
            size, packed, header = _zip64(extra, size, packed, fields[16])
        except (ValueError, struct.error):
            raise _malformed(what, "its directory is damaged") from None
        if method != 0 or packed != size or flags & ~(_DESCRIPTOR | _UTF8) or disk:
            raise _malformed(what, f"record {name!a:.80} is compressed or encrypted")
        if b"\0" in raw or not (name.isascii() or flags & _UTF8):  # readers differ in what it is
            raise _malformed(what, f"a record is called {name!a:.80}")
        prefixes.add(prefix + slash)
        found.append(Record(name, header, size, raw, crc=fields[7]))
    if at != len(directory) or len(prefixes) > 1:
        raise _malformed(what, "its directory is damaged")
    return found


def _zip64(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """The three fields with those that hold all ones taken from the zip64 extra field.

    Raises struct.error or ValueError if they are not there.
    """
    values = [size, packed, header]
    absent = [i for i, value in enumerate(values) if value == _ALL_ONES32]
    at = 0
    while at < len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        if at + 4 + length > len(extra):
            raise ValueError
        if tag == 1:
            numbers = struct.unpack_from(f"<{len(absent)}Q", extra[: at + 4 + length], at + 4)
            for i, number in zip(absent, numbers, strict=True):
                values[i] = number
            absent = []
        at += 4 + length
    if absent:
        raise ValueError
    return values[0], values[1], values[2]


def _bounded(found: list[Record], directory: int, what: str) -> Mapping[str, Record]:
    """The records by name, each with its end. Raises if two share bytes or a name."""
    ordered = sorted(found, key=lambda record: record.header)
    ends = [record.header for record in ordered[1:]]
    by_name: dict[str, Record] = {}
    for record, end in zip(ordered, [*ends, directory], strict=False):
        if record.header + _LOCAL.size + len(record.full_name or b"") + record.nbytes > end:
            raise _malformed(what, f"record {record.name!a:.80} lies outside of it")
        if record.name in by_name:
            raise _malformed(what, f"record {record.name!a:.80} comes twice")
        by_name[record.name] = replace(record, end=end)
    return by_name


def data_start(pread: Pread, record: Record, nbytes: int, what: str) -> int:
    """Offset of the record's bytes from the start of the archive of `nbytes` bytes.

    Raises CheckpointError if the local header contradicts the directory.
    """
    name = record.full_name or b""
    local = _read(pread, record.header, _LOCAL.size + len(name), nbytes, what)
    magic, _, flags, method, _, _, _, packed, size, name_len, extra_len = _LOCAL.unpack_from(local)
    named = _LOCAL.size + name_len
    start = record.header + named + extra_len
    end = nbytes if record.end is None else record.end
    # Sizes that follow the data, or stand in a zip64 field, are not here.
    elsewhere = (0, _ALL_ONES32) if flags & _DESCRIPTOR else (_ALL_ONES32,)
    if (
        magic != b"PK\3\4"
        or method != 0
        or flags & ~(_DESCRIPTOR | _UTF8)
        or not {packed, size} <= {record.nbytes, *elsewhere}
        or (record.full_name is not None and (name_len, local[_LOCAL.size :]) != (len(name), name))
        or start + record.nbytes > end
        or not _is_behind(start + record.nbytes, record.end, bool(flags & _DESCRIPTOR))
    ):
        raise _malformed(what, f"the header of record {record.name!a:.80} is damaged")
    if extra_len and not _are_fields(_read(pread, record.header + named, extra_len, nbytes, what)):
        raise _malformed(what, f"the header of record {record.name!a:.80} is damaged")
    return int(start)


def _is_behind(data_end: int, end: int | None, has_descriptor: bool) -> bool:
    """Whether nothing but a descriptor lies between a record's data and what comes next."""
    return end is None or end - data_end in (_DESCRIPTORS if has_descriptor else (0,))


def _are_fields(extra: bytes) -> bool:
    """Whether that is what it is to be: fields, each with its length. So a wrong length of what
    precedes the data, which only the local header states, is no shift of the data."""
    at = 0
    while at + 4 <= len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return at == len(extra)


def load(pread: Pread, nbytes: int, what: str) -> tuple[object, Mapping[str, Record]]:
    """The object saved in the archive, as data (`unpickle.loads`), and the archive's records.

    A tensor becomes a StoredView of the record `data/<key>` of its storage; none is read.
    """
    members = records(pread, nbytes, what)
    return _load(pread, members, nbytes, what, MAX_PICKLE), members


def load_object(pread: Pread, nbytes: int, what: str) -> object:
    """The object saved in the archive, as data; see `load`."""
    return load(pread, nbytes, what)[0]


@dataclass(frozen=True, slots=True)
class _Twin:
    """An archive that was looked through: one that has the same bytes around its data, but for
    checksums and the id of its data, needs no second look."""

    head: bytes
    """All that comes before the data."""
    kept: tuple[tuple[int, int], ...]
    """Ranges of the directory that must be the same, counted from the end of the archive."""
    directory: bytes
    """The bytes in those ranges."""
    found: tuple[int, StoredView]

    def matches(self, head: bytes, tail: bytes) -> bool:
        return head.startswith(self.head) and _pick(tail, self.kept) == self.directory


class Locator:
    """Finds the one tensor in each of many archives, most of which are alike. Thread-safe."""

    def __init__(self, remembered: int = 256) -> None:
        self._twins: dict[int, tuple[_Twin, ...]] = {}
        """By the size of the archive: weights of different shapes often are of one size."""
        self._remembered = remembered

    def locate(self, pread: Pread, nbytes: int, what: str) -> tuple[int, StoredView]:
        """(offset of its storage's bytes, the tensor) for an archive that holds one tensor.

        Reads the head and the tail of the archive, never the data. Raises CheckpointError.
        """
        count = min(GUESS, nbytes)
        head = _read(pread, 0, count, nbytes, what)
        tail = _read(pread, nbytes - count, count, nbytes, what)
        twins = self._twins.get(nbytes, ())
        for twin in twins:
            if twin.matches(head, tail):
                return twin.found
        found = _locate(_buffered(pread, head, tail, nbytes), nbytes, what)
        room = len(self._twins) < self._remembered and len(twins) < _TWINS
        if found[0] <= len(head) and room:
            kept = _all_but_checksums(tail, nbytes, what)
            if kept:
                twin = _Twin(head[: found[0]], kept, _pick(tail, kept), found)
                self._twins[nbytes] = (*twins, twin)
        return found


def _buffered(pread: Pread, head: bytes, tail: bytes, nbytes: int) -> Pread:
    """`pread` on an archive whose first and last bytes were read already."""

    def read(offset: int, count: int) -> bytes:
        if offset + count <= len(head):
            return head[offset : offset + count]
        from_tail = offset - (nbytes - len(tail))
        if from_tail >= 0:
            return tail[from_tail : from_tail + count]
        return pread(offset, count)

    return read


def _all_but_checksums(tail: bytes, nbytes: int, what: str) -> tuple[tuple[int, int], ...]:
    """The ranges of the directory in `tail` without each record's CRC, counted from the end of the
    archive; none if it does not lie within."""
    count, _, start = _find_directory(tail, nbytes, what)
    at = start - nbytes
    if -at > len(tail):
        return ()
    kept = []
    for _ in range(count):
        fields = _CENTRAL.unpack_from(tail, len(tail) + at)
        kept.append((at, at + _CRC))
        at += _CRC + 4
        kept.append((at, at := at - _CRC - 4 + _CENTRAL.size + sum(fields[10:13])))
    return (*kept, (at, 0))


def _pick(tail: bytes, kept: tuple[tuple[int, int], ...]) -> bytes:
    size = len(tail)
    return b"".join(tail[size + start : size + stop] for start, stop in kept)


def _locate(pread: Pread, nbytes: int, what: str) -> tuple[int, StoredView]:
    members = records(pread, nbytes, what, MAX_SMALL)
    tensor = _load(pread, members, nbytes, what, MAX_SMALL)
    if not isinstance(tensor, StoredView):
        raise CheckpointError(
            f"{what}: expected a plain tensor, found {describe(tensor)}. "
            "Quantised tensor classes cannot be read bit for bit."
        )
    record = record_of(tensor, members, what)
    return data_start(pread, record, nbytes, what), tensor


def record_of(tensor: StoredView, members: Mapping[str, Record], what: str) -> Record:
    """The record that holds every element of `tensor`. Raises CheckpointError if none does."""
    record = members.get(f"data/{tensor.storage.key}")
    if record is None:
        raise _malformed(what, f"it has no record data/{ascii(tensor.storage.key)[1:-1]:.80}")
    if tensor.storage.nbytes != record.nbytes:
        raise _malformed(
            what,
            f"record {record.name} has {record.nbytes} bytes, its pickle says "
            f"{tensor.storage.nbytes}",
        )
    strides = zip(tensor.size, tensor.stride, strict=True)
    last = tensor.offset + sum((size - 1) * stride for size, stride in strides)
    if 0 not in tensor.size and (last + 1) * tensor.dtype.itemsize > record.nbytes:
        raise _malformed(what, "its tensor reaches beyond its storage")
    return record


def _load(pread: Pread, members: Mapping[str, Record], nbytes: int, what: str, most: int) -> object:
    record = members.get("data.pkl")
    if record is None:
        raise _malformed(what, "it has no data.pkl")
    order = members.get("byteorder")
    if order is not None:
        value = _read_record(pread, order, 16, nbytes, what)
        if value != b"little":
            raise CheckpointError(
                f"{what} was written in {value!r} byte order; only little is read"
            )
    return loads(_read_record(pread, record, most, nbytes, what), what, storages=True)


def _read_record(pread: Pread, record: Record, most: int, nbytes: int, what: str) -> bytes:
    if record.nbytes > most:
        raise _malformed(what, f"its {record.name} has {record.nbytes} bytes")
    return _read(pread, data_start(pread, record, nbytes, what), record.nbytes, nbytes, what)


def _read(pread: Pread, offset: int, count: int, nbytes: int, what: str) -> bytes:
    if offset + count <= nbytes and len(data := pread(offset, count)) == count:
        return data
    raise _malformed(what, f"it ends before byte {offset + count}")


def _malformed(what: str, why: str) -> CheckpointError:
    return CheckpointError(f"{what} is not a well-formed torch.save archive: {why}")
