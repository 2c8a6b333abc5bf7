"""torch.save archives: the bytes that torch would load, or a CheckpointError."""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.serialization import set_crc32_options
from torch.utils.serialization import config

from mcorefs import torchzip, unpickle
from mcorefs.dtypes import BF16, BY_TORCH
from mcorefs.errors import CheckpointError
from mcorefs.torchzip import (
    Locator,
    Pread,
    Record,
    data_start,
    load,
    load_object,
    record_of,
    records,
)
from mcorefs.unpickle import Storage, StoredView
from tests.tilings import shapes


def locate_tensor(pread: Pread, nbytes: int, what: str) -> tuple[int, StoredView]:
    """As a locator does that has seen nothing before."""
    return Locator().locate(pread, nbytes, what)


def saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def reading(data: bytes) -> Pread:
    """pread on `data`; as the contract has it, raises where it comes short."""

    def pread(offset: int, nbytes: int) -> bytes:
        assert offset >= 0
        assert nbytes >= 0
        assert offset + nbytes <= len(data), "asked for bytes beyond the archive"
        return data[offset : offset + nbytes]

    return pread


def located(data: bytes) -> tuple[int, StoredView]:
    return locate_tensor(reading(data), len(data), "entry")


def refused(data: bytes, match: str = "") -> None:
    for use in (located, lambda data: load_object(reading(data), len(data), "entry")):
        with pytest.raises(CheckpointError, match=f"^entry.*{match}"):
            use(data)


def elements(data: bytes, start: int, view: StoredView) -> bytes:
    """The bytes of the tensor, row-major, picked from `data` one by one."""
    size = view.dtype.itemsize
    index = np.arange(np.prod(view.size, dtype=int)).reshape(view.size)
    places = sum(
        (np.indices(view.size)[axis] * stride for axis, stride in enumerate(view.stride)),
        np.zeros_like(index),
    )
    starts = start + (view.offset + places.reshape(-1)) * size
    return b"".join(data[at : at + size] for at in starts.tolist())


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().flatten().clone(memory_format=torch.contiguous_format)
    return bytes(flat.view(torch.uint8).numpy())


@settings(deadline=None)
@given(st.data(), st.sampled_from(sorted(BY_TORCH)), shapes())
def test_a_tensor_is_found_bit_for_bit(
    data: st.DataObject, name: str, shape: tuple[int, ...]
) -> None:
    dtype = BY_TORCH[name]
    rng = np.random.default_rng(0)
    top = 2 if name == "bool" else 256
    base = torch.from_numpy(rng.integers(0, top, (*shape, dtype.itemsize), np.uint8))
    tensor = base.view(getattr(torch, name)).reshape(shape)
    for axis, n in enumerate(shape):
        start = data.draw(st.integers(0, n))
        tensor = tensor.narrow(axis, start, data.draw(st.integers(0, n - start)))
    if shape:
        tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
        if data.draw(st.booleans()):
            tensor = tensor[:1].expand(
                data.draw(st.integers(1, 3)) if len(tensor) else 0, *tensor.shape[1:]
            )
    content = saved(tensor)
    start, view = located(content)
    assert (view.size, view.stride, view.dtype) == (tensor.shape, tensor.stride(), dtype)
    assert elements(content, start, view) == bits(tensor)
    before = data.draw(st.integers(0, 100))
    shifted = b"\xa5" * before + content
    pread = reading(shifted)
    assert locate_tensor(lambda offset, n: pread(before + offset, n), len(content), "entry") == (
        start,
        view,
    )


def test_all_that_torch_can_say_of_its_archives() -> None:
    tensor = torch.arange(5000, dtype=torch.float32)
    config.save.storage_alignment = 4096
    try:
        aligned = saved(tensor)
    finally:
        config.save.storage_alignment = 64
    set_crc32_options(False)
    try:
        unsummed = saved(tensor)
    finally:
        set_crc32_options(True)
    for content in (aligned, unsummed, saved(torch.nn.Parameter(tensor))):
        start, view = located(content)
        assert elements(content, start, view) == bits(tensor)
    assert located(aligned)[0] % 4096 == 0


def test_a_tensor_with_attributes_is_a_tensor() -> None:
    for kind in (torch.nn.Parameter, torch.Tensor.clone):
        tensor = kind(torch.arange(4.0))
        tensor.__dict__["partition_dim"] = 0
        content = saved(tensor)
        assert elements(content, *located(content)) == bits(tensor)


def test_storages_shared_by_views_are_one_record() -> None:
    base = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    untyped = torch.zeros(6).untyped_storage()
    content = saved({"all": base, "t": base.t(), "row": base[2], "untyped": untyped, "n": 3})
    value, members = load(reading(content), len(content), "file")
    assert isinstance(value, dict)
    assert value["n"] == 3
    views = [value[name] for name in ("all", "t", "row")]
    assert {view.storage for view in views} == {Storage(BF16, "0", 24)}
    assert value["untyped"] == Storage(None, "1", 24)
    record = record_of(views[0], members, "file")
    start = data_start(reading(content), record, len(content), "file")
    for view, tensor in zip(views, (base, base.t(), base[2]), strict=True):
        assert record_of(view, members, "file") == record
        assert elements(content, start, view) == bits(tensor)


def test_records_are_those_that_zipfile_finds() -> None:
    content = saved({"a": torch.zeros(700), "b": torch.ones(3), "c": "x" * 5000})
    found = records(reading(content), len(content), "file")
    listed = zipfile.ZipFile(io.BytesIO(content)).infolist()
    assert {f"archive/{r.name}": (r.header, r.nbytes) for r in found.values()} == {
        info.filename: (info.header_offset, info.file_size) for info in listed
    }
    for record in found.values():
        start = data_start(reading(content), record, len(content), "file")
        wanted = zipfile.ZipFile(io.BytesIO(content)).read(f"archive/{record.name}")
        assert content[start : start + record.nbytes] == wanted


@pytest.mark.parametrize(
    "value",
    [
        {"a": torch.zeros(2)},
        torch.zeros(2).untyped_storage(),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2).to_sparse(),
        np.zeros(2),
        3,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_a_plain_tensor_is_not_located(value: object) -> None:
    with pytest.raises(CheckpointError, match="entry"):
        located(saved(value))


def test_torch_loads_what_we_locate_after_its_own_zip_rewrite() -> None:
    """Records whose sizes stand in the local headers, as Python's zipfile writes them."""
    tensor = torch.arange(6, dtype=torch.int16)
    source = zipfile.ZipFile(io.BytesIO(saved(tensor)))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    content = out.getvalue()
    assert torch.equal(torch.load(io.BytesIO(content)), tensor)
    assert elements(content, *located(content)) == bits(tensor)


# ---------------------------------------------------------------- archives made by hand

PICKLE = (
    b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n(X\7\0\0\0storagectorch\nFloatStorage\n"
    b"X\1\0\0\0kX\3\0\0\0cpuK\4tQK\0K\4\x85K\1\x85\x89}tR."
).replace(b"_v2\n(X", b"_v2\n((X")
DATA = bytes(range(16))


@dataclass
class Member:
    """A record, with anything about it that may be said wrongly. None: as it is."""

    name: bytes
    data: bytes
    central: dict[str, int] = field(default_factory=dict)
    local: dict[str, int] = field(default_factory=dict)
    local_name: bytes | None = None
    extra: bytes = b""
    gap: int = 0


@dataclass
class End:
    """The directory's end, with anything that may be said wrongly."""

    zip64: bool = False
    small: dict[str, int] = field(default_factory=dict)
    large: dict[str, int] = field(default_factory=dict)
    locator: dict[str, int] = field(default_factory=dict)
    comment: bytes = b""
    before: bytes = b""


def members() -> list[Member]:
    return [
        Member(b"x/data.pkl", PICKLE),
        Member(b"x/byteorder", b"little"),
        Member(b"x/data/k", DATA),
    ]


def archive(parts: list[Member], end: End | None = None) -> bytes:
    end = end or End()
    body, directory = b"", b""
    for part in parts:
        size = len(part.data)
        name = part.name if part.local_name is None else part.local_name
        local = {"flags": 0, "method": 0, "packed": size, "size": size, "extra": 0} | part.local
        central = {"flags": 0, "method": 0, "packed": size, "size": size, "disk": 0}
        central |= {"header": len(body)} | part.central
        directory += (
            struct.pack("<4s4H", b"PK\1\2", 0, 0, central["flags"], central["method"])
            + struct.pack("<2HL", 0, 0, 0)
            + struct.pack("<2L", central["packed"], central["size"])
            + struct.pack("<5H", len(part.name), len(part.extra), 0, central["disk"], 0)
            + struct.pack("<2L", 0, central["header"])
            + part.name
            + part.extra
        )
        body += (
            struct.pack("<4s3H", b"PK\3\4", 0, local["flags"], local["method"])
            + struct.pack("<2HL", 0, 0, 0)
            + struct.pack("<2L2H", local["packed"], local["size"], len(name), local["extra"])
            + name
            + part.data
            + b"\0" * part.gap
        )
    numbers = {"disk": 0, "here": len(parts), "count": len(parts), "size": len(directory)}
    numbers |= {"start": len(body)}
    tail = end.before
    if end.zip64:
        large = numbers | {"length": 44} | end.large
        locator = {"disk": 0, "offset": len(body) + len(directory) + len(tail), "disks": 1}
        locator |= end.locator
        tail += struct.pack("<4sQ2H2L", b"PK\6\6", large["length"], 0, 0, large["disk"], 0)
        tail += struct.pack("<4Q", *(large[key] for key in ("here", "count", "size", "start")))
        tail += struct.pack("<4sLQL", b"PK\6\7", locator["disk"], locator["offset"], 1)
    small = numbers | {"comment": len(end.comment)} | end.small
    tail += struct.pack("<4s4H", b"PK\5\6", small["disk"], 0, small["here"], small["count"])
    tail += struct.pack("<2LH", small["size"], small["start"], small["comment"])
    return body + directory + tail + end.comment


def test_archives_made_by_hand_are_read() -> None:
    wanted = (archive(members()).index(DATA), (4,))
    ones = {"here": 0xFFFF, "count": 0xFFFF, "size": 0xFFFFFFFF, "start": 0xFFFFFFFF}
    for content in [
        archive(members()),
        archive(members(), End(zip64=True)),
        archive(members(), End(zip64=True, small=ones)),
        archive(members()[::2]),
    ]:
        start, view = located(content)
        assert view.size == wanted[1]
        assert content[start : start + 16] == DATA
    streamed = members()
    for part in streamed:
        part.local = {"flags": 0x808, "packed": 0, "size": 0}
        part.central = {"flags": 0x808}
    content = archive(streamed)
    assert content[located(content)[0] :].startswith(DATA)


def _changed(number: int, **changes: object) -> list[Member]:
    parts = members()
    for name, value in changes.items():
        setattr(parts[number], name, value)
    return parts


BIG, ALL = 0xFFFFFFFE, 0xFFFFFFFF
WIDE = (1 << 64) - 1


def _zip64_extra(*numbers: int) -> bytes:
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


@pytest.mark.parametrize(
    "parts",
    {
        "deflate": _changed(2, central={"method": 8}),
        "deflate in the local header": _changed(2, local={"method": 8}),
        "encrypted": _changed(2, central={"flags": 1}),
        "encrypted in the local header": _changed(2, local={"flags": 1}),
        "strong encryption": _changed(2, central={"flags": 0x2000}),
        "packed size differs": _changed(2, central={"packed": 15}),
        "local size differs": _changed(2, local={"size": 15, "packed": 15}),
        "local size is absent": _changed(2, local={"size": 0, "packed": 0}),
        "local name differs": _changed(2, local_name=b"x/data/K"),
        "local name is longer": _changed(2, local_name=b"x/data/k0"),
        "local name is empty": _changed(2, local_name=b""),
        "local extra reaches over the data": _changed(2, local={"extra": 1}),
        "local extra is huge": _changed(2, local={"extra": 0xFFFF}),
        "size reaches over the next record": _changed(
            0, central={"size": len(PICKLE) + 1, "packed": len(PICKLE) + 1}
        ),
        "size reaches into the directory": _changed(2, central={"size": 17, "packed": 17}),
        "size beyond the archive": _changed(2, central={"size": BIG, "packed": BIG}),
        "header beyond the archive": _changed(2, central={"header": BIG}),
        "header is another record's": _changed(2, central={"header": 0}),
        "header is not one": _changed(2, central={"header": 3}),
        "on another disk": _changed(2, central={"disk": 1}),
        "all ones without zip64": _changed(2, central={"header": ALL}),
        "zip64 too short": _changed(2, central={"header": ALL}, extra=b"\1\0\4\0\0\0\0\0"),
        "zip64 longer than the extra": _changed(2, central={"header": ALL}, extra=b"\1\0\x10\0"),
        "zip64 of 2**64 - 1": _changed(2, central={"header": ALL}, extra=_zip64_extra(WIDE)),
        "zip64 size of 2**64 - 1": _changed(
            2, central={"size": ALL, "packed": ALL}, extra=_zip64_extra(WIDE, WIDE)
        ),
        "extra is cut": _changed(2, extra=b"\1\0\0"),
        "extra is longer than it is": _changed(2, extra=b"\2\0\xff\xff"),
        "twice": [*members(), members()[2]],
        "same name under another prefix": [*members(), Member(b"y/data/k", DATA)],
        "another prefix": _changed(2, name=b"y/data/k"),
        "no prefix": [Member(b"data.pkl", PICKLE), Member(b"data/k", DATA)],
        "name that is not UTF-8": _changed(1, name=b"x/\xff"),
        "no data.pkl": members()[1:],
        "no data": members()[:2],
        "no records": [],
        "big-endian": _changed(1, data=b"big"),
        "long byteorder": _changed(1, data=b"little" * 10),
        "storage shorter than the pickle says": _changed(2, data=DATA[:15]),
        "storage longer than the pickle says": _changed(2, data=DATA + b"\0"),
        "pickle of nothing": _changed(0, data=b""),
        "pickle that is none": _changed(0, data=b"\x80\2cos\nsystem\n"),
        "tensor beyond its storage": _changed(0, data=PICKLE.replace(b"K\0K\4", b"K\1K\4")),
        "stride beyond its storage": _changed(0, data=PICKLE.replace(b"\x85K\1", b"\x85K\2")),
        "size beyond its storage": _changed(0, data=PICKLE.replace(b"K\0K\4", b"K\0K\5")),
    }.items(),
    ids=lambda case: case[0],
)
def test_damaged_records_are_refused(parts: tuple[str, list[Member]]) -> None:
    with pytest.raises(CheckpointError, match=r"^entry"):
        located(archive(parts[1]))


@pytest.mark.parametrize(
    "end",
    [
        End(comment=b"hello"),
        End(small={"comment": 5}),
        End(comment=archive(members())[-22:]),
        End(before=b"\0"),
        End(before=archive(members())[-22:]),
        *(End(small={key: value}) for key in ("here", "count") for value in (0, 2, 4, 0xFFFF)),
        *(End(small={key: value}) for key in ("size", "start") for value in (0, 9, BIG, ALL)),
        End(small={"disk": 1}),
        End(small={"here": 4, "count": 4}),
        End(zip64=True, large={"disk": 1}),
        End(zip64=True, large={"length": 45}),
        End(zip64=True, locator={"disk": 1}),
        *(End(zip64=True, locator={"offset": value}) for value in (0, 9, WIDE, 1 << 63)),
        *(
            End(zip64=True, large={key: value}, small={key: ones})
            for key, ones in (("count", 0xFFFF), ("here", 0xFFFF), ("size", ALL), ("start", ALL))
            for value in (0, 9, 1 << 62, WIDE)
        ),
        End(zip64=True, small={"start": 9}),
        End(zip64=True, before=b"\0"),
    ],
    ids=repr,
)
def test_damaged_ends_are_refused(end: End) -> None:
    refused(archive(members(), end))


def test_bytes_before_or_after_are_refused() -> None:
    for content in (archive(members()), saved(torch.zeros(3))):
        refused(b"\0" + content)
        refused(content + b"\0")
        refused(content + content[-22:])
        refused(content[:-22] + content[-22:] * 2)


def test_two_archives_in_one_are_refused() -> None:
    """Which of two directories a reader sees must not depend on the reader."""
    one, other = archive(members()), saved(torch.zeros(3))
    refused(one + other)
    refused(other + one)


@pytest.mark.parametrize(
    "content", [archive(members()), saved(torch.arange(6.0).reshape(2, 3).t())]
)
def test_every_cut_is_refused(content: bytes) -> None:
    for end in range(len(content)):
        refused(content[:end])


def _short(content: bytes, end: int) -> Pread:
    return lambda offset, nbytes: content[offset : min(offset + nbytes, end)]


def test_a_source_that_comes_short_is_refused() -> None:
    """Even if pread breaks its contract, as a file does that was cut after its size was asked."""
    content = saved(torch.arange(5000.0))
    for end in (0, 21, 100, 700, 2047, 2048, 20_000, len(content) - 1):
        with pytest.raises(CheckpointError):
            locate_tensor(_short(content, end), len(content), "entry")


@pytest.mark.parametrize("content", [archive(members()), saved(torch.arange(4.0))])
def test_any_byte_may_be_wrong(content: bytes) -> None:
    """Refused, or a tensor inside its archive, whose bytes are where they were; nothing else is
    raised."""
    accepted, wanted = 0, located(content)[0]
    for at in range(len(content)):
        for value in {0, 0xFF, content[at] ^ 1, content[at] ^ 0x80}:
            damaged = content[:at] + bytes([value]) + content[at + 1 :]
            try:
                start, view = located(damaged)
            except CheckpointError:
                continue
            accepted += 1
            assert start == wanted
            assert start + view.storage.nbytes <= len(content)
            assert len(elements(damaged, start, view)) <= view.storage.nbytes
    assert accepted


def test_a_wrong_header_shifts_no_data() -> None:
    """Also where nothing is known but where the header is and how much data follows, as it is of
    the weights of a checkpoint of many records."""
    content = saved(torch.arange(4.0))
    known = records(reading(content), len(content), "entry")["data/0"]
    record = Record(known.name, known.header, known.nbytes)
    wanted = data_start(reading(content), known, len(content), "entry")
    assert data_start(reading(content), record, len(content), "entry") == wanted
    refused = 0
    for at in range(26, 30):  # the lengths of the name, and of what pads it
        for bit in range(8):
            damaged = bytearray(content)
            damaged[record.header + at] ^= 1 << bit
            for what_is_known in (record, known):
                with pytest.raises(CheckpointError, match=r"is damaged|lies outside|ends before"):
                    data_start(reading(bytes(damaged)), what_is_known, len(content), "entry")
                refused += 1
    assert refused == 64


def _noting(content: bytes, asked: list[int]) -> Pread:
    """pread on `content` that notes how much is asked of it."""
    pread = reading(content)
    return lambda offset, nbytes: asked.append(nbytes) or pread(offset, nbytes)  # type: ignore[func-returns-value]


def test_locating_reads_head_and_tail_only() -> None:
    content = saved(torch.zeros(1 << 20))
    asked: list[int] = []
    locate_tensor(_noting(content, asked), len(content), "entry")
    assert len(asked) == 2
    assert sum(asked) <= 4096


def test_archives_beyond_four_gibibytes() -> None:
    """zip64 as torch writes it: sizes and offsets that do not fit stand in an extra field."""
    hole = 5 << 30
    numel = hole // 4
    pickled = PICKLE.replace(b"K\4t", b"\x8a\5" + numel.to_bytes(5, "little") + b"t")
    streamed = {"flags": 0x808, "packed": 0, "size": 0}
    head = archive([Member(b"x/data.pkl", pickled, local=streamed)])
    head = head[: head.index(b"PK\1\2")]
    body = struct.pack("<4s5H3L2H", b"PK\3\4", 0, 0x808, 0, 0, 0, 0, 0, 0, 8, 0) + b"x/data/k"
    after = len(head) + len(body) + hole
    version = struct.pack("<4s5H3L2H", b"PK\3\4", 0, 0, 0, 0, 0, 0, 1, 1, 9, 0) + b"x/version3"

    def entry(name: bytes, size: int, header: int) -> bytes:
        wide = [n for n in (size, size, header) if n >= ALL]
        extra = _zip64_extra(*wide) if wide else b""
        packed, shown = min(size, ALL), min(header, ALL)
        lengths = (len(name), len(extra), 0, 0, 0)
        return (
            struct.pack("<4s6H3L", b"PK\1\2", 0, 0, 0x808, 0, 0, 0, 0, packed, packed)
            + struct.pack("<5H2L", *lengths, 0, shown)
            + name
            + extra
        )

    directory = (
        entry(b"x/data.pkl", len(pickled), 0)
        + entry(b"x/data/k", hole, len(head))
        + entry(b"x/version", 1, after)
    )
    start = after + len(version)
    tail = version + directory
    tail += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, 3, 3, len(directory), start)
    tail += struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1)
    tail += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(directory), ALL, 0)

    def pread(offset: int, nbytes: int) -> bytes:
        around = (head + body)[offset : offset + nbytes] if offset < after else b""
        end = tail[max(0, offset - after) : max(0, offset + nbytes - after)]
        return around + b"\0" * (nbytes - len(around) - len(end)) + end

    found, view = locate_tensor(pread, after + len(tail), "entry")
    assert found == len(head) + len(body)
    assert view.storage == Storage(BY_TORCH["float32"], "k", numel)


def test_a_huge_directory_is_not_read() -> None:
    nbytes = 1 << 40
    size = nbytes - 98
    ones = {"here": 0xFFFF, "count": 0xFFFF, "size": ALL}
    tail = archive([], End(True, ones, {"here": 3, "count": 3, "size": size}, {"offset": size}))
    asked: list[int] = []

    def pread(offset: int, count: int) -> bytes:
        asked.append(count)
        return (b"\0" * 4096 + tail)[-count:]

    with pytest.raises(CheckpointError, match="directory"):
        records(pread, nbytes, "entry")
    assert sum(asked) <= 4096


def test_an_entry_cannot_make_a_read_large() -> None:
    """One tensor needs few bytes beside its data; a reader must not be made to load more."""
    many = [Member(b"x/%d" % number, b"") for number in range(20_000)]
    for parts in (_changed(0, data=b"\0" * (2 << 20)), members() + many):
        content = archive(parts)
        asked: list[int] = []
        with pytest.raises(CheckpointError, match="bytes"):
            locate_tensor(_noting(content, asked), len(content), "entry")
        assert sum(asked) <= 8192


# --- archives that are alike ----------------------------------------------------------------


def verdict(locator: Locator, content: bytes) -> object:
    try:
        return locator.locate(reading(content), len(content), "entry")
    except CheckpointError as problem:
        return str(problem)


def test_an_archive_like_another_is_judged_as_if_it_were_the_first() -> None:
    """Every byte around the data changed, one at a time: no twin hides a difference."""
    content = saved(torch.arange(1500, dtype=torch.int16).reshape(30, 50))
    start, _ = locate_tensor(reading(content), len(content), "entry")
    locator = Locator()
    assert verdict(locator, content) == verdict(Locator(), content)
    for at in (*range(start), *range(start + 3000, len(content))):
        for flip in (1, 0x80):
            changed = bytearray(content)
            changed[at] ^= flip
            assert verdict(locator, bytes(changed)) == verdict(Locator(), bytes(changed)), at


def test_archives_that_are_alike_are_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = unpickle.loads

    def counting(*arguments: Any, **keywords: Any) -> object:
        looked.append(1)
        return real(*arguments, **keywords)

    monkeypatch.setattr(torchzip, "loads", counting)
    locator = Locator(remembered=2)
    for seed in range(5):  # different bytes, so different checksums and ids
        for shape in ((64, 64), (32, 128), (8, 8)):
            tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            content = saved(tensor)
            offset, view = locator.locate(reading(content), len(content), "entry")
            assert view.size == shape
            data = content[offset : offset + tensor.numel() * 4]
            assert data == tensor.numpy().tobytes()
    assert len(looked) == 3  # once for each shape
