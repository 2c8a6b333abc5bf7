"""What lies behind a URL, below the formats: paths, small files, ranges of large ones."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pytest

from mcorefs.errors import CheckpointError, ReadFault
from mcorefs.files import FileIdentity
from mcorefs.remote import parse_path
from mcorefs.remote.objects import Objects
from mcorefs.storage import regular_file
from tests.object_store import ObjectStore, Request, s3

URL = "s3://bucket/data"
BLOCK = 1 << 10
DATA = bytes(i * i % 251 for i in range(20 * BLOCK - 7))


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with s3() as store:
        store.put("data", DATA)
        yield store


def identity(url: str) -> FileIdentity:
    found, why = regular_file(parse_path(url))
    assert found is not None, why
    return found


def objects(budget: int = 1 << 20) -> Objects:
    return Objects({URL: identity(URL)}, budget, BLOCK)


def read(source: Objects, offset: int, nbytes: int) -> bytes:
    out = bytearray(nbytes)
    source.read_into(URL, offset, memoryview(out))
    return bytes(out)


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize("text", ["/a/b", "a", "a:b", "file:///a/b", "local:///a%20b"])
def test_files_of_this_machine_are_ordinary_paths(text: str) -> None:
    path = parse_path(text)
    assert type(path) is type(Path())
    assert str(path) == {"file:///a/b": "/a/b", "local:///a%20b": "/a b"}.get(text, text)


def test_a_remote_path_is_like_a_path() -> None:
    path, like = parse_path("memory://bucket//run/./x/../iter_7.d/"), PurePosixPath("bucket/run")
    like /= "iter_7.d"
    assert str(path) == f"memory://{like}"
    for ask in ("name", "stem", "suffix"):
        assert getattr(path, ask) == getattr(like, ask)
    assert str(path.parent) == f"memory://{like.parent}"
    assert str(path / "a" / "b.c") == f"memory://{like}/a/b.c"
    assert str(path.with_name("other")) == f"memory://{like.with_name('other')}"
    assert [str(above) for above in path.parents] == ["memory://bucket/run", "memory://bucket"]
    assert path.is_relative_to(path.parent)
    assert not path.is_relative_to(path / "a")
    assert not (path.parent / "iter_7.deeper").is_relative_to(path)
    assert path.is_absolute()
    assert {path, parse_path(str(path))} == {path}
    with pytest.raises(TypeError, match="is no file of this machine"):
        os.stat(path)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://key:secret@bucket/x", "must not hold a password"),
        ("zip://a::s3://bucket/x", "chains of file systems"),
        ("https://host/run?token=secret", "a URL with a query"),
        ("nothing://x", "nothing:// is no file system that fsspec knows"),
        ("hdfs://x/y", "to read hdfs://, install what it needs: pyarrow"),
    ],
)
def test_urls_that_are_none(url: str, why: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_path(url)
    assert why in str(caught.value)
    assert "secret" not in str(caught.value)


# ---------------------------------------------------------------- ranges


def test_any_range(store: ObjectStore) -> None:
    source = objects(budget=4 * BLOCK)
    for offset, nbytes in ((0, len(DATA)), (BLOCK - 1, 2), (5 * BLOCK, BLOCK), (len(DATA) - 1, 1)):
        assert read(source, offset, nbytes) == DATA[offset : offset + nbytes]
    assert read(source, len(DATA), 0) == b""
    for offset, nbytes in ((-1, 2), (len(DATA), 1), (0, len(DATA) + 1)):
        with pytest.raises(ReadFault, match=f"it has {len(DATA)} bytes"):
            read(source, offset, nbytes)


def test_neighbouring_ranges_are_one_request(store: ObjectStore) -> None:
    source = objects()
    with store.noted() as requests:
        for offset in range(0, 2 * BLOCK, 64):
            read(source, offset, 64)
    assert [request.bytes_asked for request in requests] == ["bytes=0-1023", "bytes=1024-2047"]


def test_many_requests_are_in_flight(store: ObjectStore) -> None:
    """Each waits for fifteen others; so does a second reader of what is on its way already."""
    meeting = threading.Barrier(16, timeout=20)
    with store.failing(lambda request: _meet(meeting, request)), ThreadPoolExecutor(2) as pool:
        source = objects()
        with store.noted() as requests:
            both = [pool.submit(read, source, 0, 16 * BLOCK) for _ in range(2)]
            assert [one.result() for one in both] == [DATA[: 16 * BLOCK]] * 2
    assert len(requests) == 16


def _meet(meeting: threading.Barrier, request: Request) -> None:
    if request.bytes_asked:
        meeting.wait()


@pytest.mark.parametrize(("budget", "again"), [(20 * BLOCK, 0), (10 * BLOCK, 20)])
def test_blocks_are_kept_within_the_budget(store: ObjectStore, budget: int, again: int) -> None:
    source = objects(budget=budget)
    read(source, 0, len(DATA))
    with store.noted() as requests:
        assert read(source, 0, len(DATA)) == DATA
    assert len(requests) == again


def test_what_is_on_its_way_is_part_of_the_budget(store: ObjectStore) -> None:
    """Four blocks are known, of a budget of eight; six more on their way leave room for two."""
    source = objects(budget=8 * BLOCK)
    for block in range(4):
        read(source, block * BLOCK, BLOCK)
    held, go_on = threading.Semaphore(0), threading.Event()

    def hold(request: Request) -> None:
        held.release()
        go_on.wait(20)

    with store.failing(hold), ThreadPoolExecutor(6) as pool:
        coming = [pool.submit(read, source, n * BLOCK, BLOCK) for n in range(4, 10)]
        for _ in coming:
            held.acquire(timeout=20)
        assert source.kept == 2
        go_on.set()
        for n, one in enumerate(coming, 4):
            assert one.result() == DATA[n * BLOCK : (n + 1) * BLOCK]
    assert source.kept == 8


def test_a_closed_source_is_refused(store: ObjectStore) -> None:
    source = objects()
    read(source, 0, BLOCK)
    source.close()
    with pytest.raises(ReadFault, match="has been closed"):
        read(source, 0, BLOCK)


# ---------------------------------------------------------------- small files


def test_small_files_are_asked_for_once(store: ObjectStore) -> None:
    store.put("small/a", b"one")
    path = parse_path("s3://bucket/small/a")
    with store.noted() as requests:
        for _ in range(3):
            with path.open("rb") as file:
                assert file.read() == b"one"
    assert len([request for request in requests if request.bytes_asked]) == 1


def test_all_of_a_file_system_can_be_read(store: ObjectStore) -> None:
    """As far as pathlib's methods are used: glob, iterdir, stat."""
    for name in ("tree/a/x.pt", "tree/b/x.pt", "tree/b/y.txt"):
        store.put(name, b"12345")
    top = parse_path("s3://bucket/tree")
    assert sorted(map(str, top.glob("*/x.pt"))) == [f"{top}/a/x.pt", f"{top}/b/x.pt"]
    assert sorted(child.name for child in (top / "b").iterdir()) == ["x.pt", "y.txt"]
    assert (top / "b" / "y.txt").stat().st_size == 5
    assert not (top / "c").exists()
    with pytest.raises(FileNotFoundError):
        (top / "c").read_bytes()
    with pytest.raises(IsADirectoryError):
        top.read_bytes()


def test_identity_of_a_replaced_object_differs(store: ObjectStore) -> None:
    store.put("twice", b"one")
    before = identity("s3://bucket/twice")
    store.put("twice", b"two")
    assert identity("s3://bucket/twice") != before
