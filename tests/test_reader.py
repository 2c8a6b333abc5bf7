"""From shards on disk to bytes of files: the right bytes or a ReadFault, within the budget."""

from __future__ import annotations

import errno
import gc
import io
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcorefs.boxes import Box, Shape
from mcorefs.dtypes import BF16, BY_NAME, F32, DType
from mcorefs.errors import ReadFault
from mcorefs.files import read_all
from mcorefs.index import Chunk, Span, StoredTensor, stored_tensor
from mcorefs.layout import lay_out
from mcorefs.leaf import StorageLeaf
from mcorefs.mapping.plan import HfTensor
from mcorefs.reader import Reader, SafetensorsFile, TileCache
from mcorefs.storage import FileIdentity, Storage, regular_file
from mcorefs.views import Array, Cat, Narrow, Permute, Stack, Stored, To, View, moves_only
from tests.graphs import Memory, assert_same, graphs

U8 = BY_NAME["U8"]
THREADS = 16


class Disk(Memory):
    """Stored tensors in files: raw spans and torch.save archives between other bytes."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        super().__init__()
        self.root, self.rng = root, rng
        self.contents = {str(root / f"{name}.distcp"): bytearray() for name in "abc"}

    def store(self, array: Array, dtype: DType, tiles: list[Box]) -> tuple[Chunk, ...]:
        return tuple(Chunk(tile, self._written(array[tile.slices()], dtype)) for tile in tiles)

    def _written(self, part: Array, dtype: DType) -> Span:
        path, content = self.rng.choice(list(self.contents.items()))
        content += self.rng.randbytes(self.rng.randrange(70))
        kind = self.rng.choice(["raw", "rows", "transposed", "slice"])
        data = part.tobytes() if kind == "raw" else self._archive(part, dtype, kind)
        span = Span(path, len(content), len(data), "raw" if kind == "raw" else "torch_zip")
        content += data
        return span

    def _archive(self, part: Array, dtype: DType, kind: str) -> bytes:
        tensor = as_torch(part, dtype)
        if kind == "transposed":
            order = self.rng.sample(range(tensor.ndim), tensor.ndim)
            back = [order.index(axis) for axis in range(tensor.ndim)]
            tensor = tensor.permute(order).contiguous().permute(back)
        elif kind == "slice":
            around = torch.zeros(tensor.numel() + 5, dtype=tensor.dtype)
            around[3:-2] = tensor.flatten()
            tensor = around[3:-2].view(tensor.shape)
        out = io.BytesIO()
        torch.save(tensor, out)
        return out.getvalue()

    def flush(self) -> dict[str, FileIdentity]:
        for path, content in self.contents.items():
            Path(path).write_bytes(bytes(content))
        return identities(*self.contents)


def as_torch(array: Array, dtype: DType) -> torch.Tensor:
    flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return flat.view(getattr(torch, dtype.torch)).reshape(array.shape)


def identities(*paths: str | Path) -> dict[str, FileIdentity]:
    found = {}
    for path in map(str, paths):
        identity, why = regular_file(path)
        assert identity, why
        found[path] = identity
    return found


def ranges(rng: random.Random, size: int, count: int) -> list[tuple[int, int]]:
    """(start, length) of reads in a file of `size`: long, short, empty, at its ends."""
    found = [(0, size), (size, 0), (0, min(1, size)), (max(0, size - 1), min(1, size))]
    for _ in range(count):
        start = rng.randint(0, size)
        found.append((start, rng.randint(0, min(size - start, rng.choice([8, 64, size])))))
    return found


def read_range(reader: Reader, view: View, start: int, length: int) -> bytes:
    out = bytearray(b"\xa5" * length)
    reader.read_tensor(view, start, memoryview(out))
    return bytes(out)


disk_tests = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(THREADS) as executor:
        yield executor


# ---------------------------------------------------------------- the byte-range law


@disk_tests
@given(data=st.data())
def test_any_range_of_any_tensor(
    data: st.DataObject, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    disk = Disk(tmp_path, rng)
    view, value = data.draw(graphs(disk))
    storage = Storage(disk.flush(), max_open=rng.choice([1, 512]))
    reader = Reader(
        storage,
        cache=rng.choice([0, 100, 1000, 1 << 20]),
        tile_bytes=rng.choice([16, 100, 4096]),
        min_run=rng.choice([1, 64, 1 << 20]),
    )
    whole = reader.read_box(view, Box.whole(view.shape))
    assert_same(whole, value, view.dtype, cast=not moves_only(view))
    content = whole.tobytes()
    wanted = ranges(rng, len(content), 20)
    found = pool.map(lambda part: read_range(reader, view, *part), wanted)
    for (start, length), part in zip(wanted, found, strict=True):
        assert part == content[start : start + length]
    storage.close()


@disk_tests
@given(data=st.data())
def test_any_range_of_any_file(
    data: st.DataObject, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    disk = Disk(tmp_path, rng)
    tensors, values = [], {}
    for number in range(data.draw(st.integers(0, 4))):
        view, value = data.draw(graphs(disk).filter(lambda made: moves_only(made[0])))
        tensors.append(HfTensor(f"t{number}", view))
        values[f"t{number}"] = value.tobytes()
    storage = Storage(disk.flush())
    reader = Reader(storage, rng.choice([0, 300]), rng.choice([16, 100]), rng.choice([1, 64]))
    for layout in lay_out(tensors, 100_000)[0].values():
        file = SafetensorsFile(layout, reader)
        content = layout.header + b"".join(values[tensor.name] for tensor in layout.tensors)
        assert file.size == len(content)
        assert read_all(file) == content

        def read(part: tuple[int, int], file: SafetensorsFile = file) -> bytes:
            out = bytearray(b"\xa5" * part[1])
            file.read_into(part[0], memoryview(out))
            return bytes(out)

        wanted = ranges(rng, len(content), 20)
        for (start, length), part in zip(wanted, pool.map(read, wanted), strict=True):
            assert part == content[start : start + length]
    storage.close()


# ---------------------------------------------------------------- how it reads


@dataclass
class Asked:
    path: str
    offset: int
    nbytes: int
    address: int


class Watched(Storage):
    """Notes every read; `before` is called within it."""

    def __init__(self, files: Mapping[str, FileIdentity], max_open: int = 512) -> None:
        super().__init__(files, max_open)
        self.asked: list[Asked] = []
        self.before: Callable[[], None] = lambda: None

    def read_into(self, path: str, offset: int, out: memoryview) -> None:
        address = np.frombuffer(out, np.uint8).__array_interface__["data"][0] if out else 0
        self.asked.append(Asked(path, offset, len(out), address))
        self.before()
        super().read_into(path, offset, out)


def written(path: Path, array: Array, dtype: DType) -> StoredTensor:
    """`array` as one raw chunk in a file of its own, and a file offset that is not 0."""
    path.write_bytes(b"prefix" + array.tobytes())
    return raw(path, dtype, array.shape, 6)


def raw(path: Path, dtype: DType, shape: Shape, offset: int = 0) -> StoredTensor:
    nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    chunk = Chunk(Box.whole(shape), Span(str(path), offset, nbytes))
    tensor, problem = stored_tensor("t", dtype, shape, (chunk,))
    assert tensor, problem
    return tensor


def noise(*shape: int, dtype: DType = BF16, seed: int = 0) -> Array:
    """Random bits with no nan among them, so that casts there and back keep them."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(dtype.values)
    return values.view(dtype.carrier)


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Watched, StoredTensor, Array]:
    array = noise(64, 512)
    tensor = written(tmp_path / "shard", array, BF16)
    return Watched(identities(tmp_path / "shard")), tensor, array


def cast(array: Array) -> bytes:
    """BF16 to F32 by hand."""
    return (array.astype(np.uint32) << 16).tobytes()


Shard = tuple[Watched, StoredTensor, Array]


def test_whole_runs_go_straight_into_the_callers_buffer(shard: Shard) -> None:
    storage, tensor, array = shard
    reader = Reader(storage, 1 << 30)
    out = bytearray(5000)
    base = np.frombuffer(out, np.uint8).__array_interface__["data"][0]
    for _ in range(2):
        reader.read_tensor(Stored(tensor), 1001, memoryview(out)[10:4010])
        assert out[10:4010] == array.tobytes()[1001:5001]
    wanted = Asked(storage.asked[0].path, 6 + 1001, 4000, base + 10)
    assert storage.asked == [wanted, wanted], "not kept, not copied, nothing else read"


def test_a_range_over_several_runs_is_one_read_each(tmp_path: Path) -> None:
    arrays = [noise(100, seed=i) for i in range(3)]
    parts = [written(tmp_path / f"{i}", array, BF16) for i, array in enumerate(arrays)]
    storage = Watched(identities(*tmp_path.iterdir()))
    view = Stack(tuple(map(Stored, parts)), 0)
    content = b"".join(array.tobytes() for array in arrays)
    assert read_range(Reader(storage, 0), view, 150, 300) == content[150:450]
    assert [asked.nbytes for asked in storage.asked] == [50, 200, 50]


def test_rows_as_far_apart_in_the_shard_as_in_the_file_are_runs_of_their_own(
    tmp_path: Path,
) -> None:
    arrays = [noise(4, 10, seed=i) for i in range(2)]
    parts = [written(tmp_path / f"{i}", array, BF16) for i, array in enumerate(arrays)]
    view = Cat(tuple(Narrow(Stored(part), 1, 0, 5) for part in parts), 1)
    storage = Watched(identities(*tmp_path.iterdir()))
    wanted = np.concatenate([array[:, :5] for array in arrays], 1).tobytes()
    assert read_range(Reader(storage, 0, min_run=1), view, 0, 80) == wanted
    assert [asked.nbytes for asked in storage.asked] == [10] * 8


def test_neighbours_in_a_file_are_one_run(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(range(200)))
    halves = [raw(path, U8, (100,), offset) for offset in (0, 100)]
    storage = Watched(identities(path))
    view = Stack(tuple(map(Stored, halves)), 0)
    assert read_range(Reader(storage, 0), view, 50, 100) == bytes(range(50, 150))
    assert len(storage.asked) == 1


def test_a_tile_is_computed_once_however_many_want_it(
    shard: Shard, pool: ThreadPoolExecutor
) -> None:
    storage, tensor, array = shard
    storage.before = lambda: time.sleep(0.2)
    reader = Reader(storage, 1 << 20)
    view = Permute(Stored(tensor), (1, 0))
    barrier = threading.Barrier(THREADS)

    def read(number: int) -> bytes:
        barrier.wait()
        return read_range(reader, view, number * 100, 100)

    content = array.T.tobytes()
    assert list(pool.map(read, range(THREADS))) == [
        content[number * 100 : number * 100 + 100] for number in range(THREADS)
    ]
    assert len(storage.asked) == 1
    assert read_range(reader, view, 0, len(content)) == content
    assert len(storage.asked) == 1


def test_a_fault_reaches_all_who_wait_and_is_not_kept(
    shard: Shard, pool: ThreadPoolExecutor
) -> None:
    storage, tensor, array = shard

    def fail() -> None:
        time.sleep(0.2)
        raise ReadFault("the disk is on fire")

    storage.before = fail
    reader = Reader(storage, 1 << 20)
    view = Permute(Stored(tensor), (1, 0))
    barrier = threading.Barrier(THREADS)

    def read(_: int) -> str:
        barrier.wait()
        with pytest.raises(ReadFault) as caught:
            read_range(reader, view, 0, 10)
        assert caught.value.errno == errno.EIO
        return str(caught.value)

    assert set(pool.map(read, range(THREADS))) == {"the disk is on fire"}
    assert len(storage.asked) == 1
    storage.before = lambda: None
    assert read_range(reader, view, 0, 10) == array.T.tobytes()[:10]


def test_tiles_are_kept_up_to_the_budget(shard: Shard) -> None:
    storage, tensor, array = shard
    cache, leaf = TileCache(3000), StorageLeaf(storage)
    view = Stored(tensor)  # rows of 1024 bytes
    alive: list[weakref.ref[Array]] = []

    def get(row: int) -> bool:
        """Whether row `row` was read from the shard."""
        before = len(storage.asked)
        tile = cache.get(row, view, Box((row, 0), (1, 512)), leaf)
        np.testing.assert_array_equal(tile, array[row : row + 1])
        assert not tile.flags.writeable
        alive.append(weakref.ref(tile))
        return len(storage.asked) > before

    for row in range(10):
        assert get(row)
        gc.collect()
        kept = {id(tile): tile.nbytes for ref in alive if (tile := ref()) is not None}
        assert sum(kept.values()) <= 3000
    assert not get(9)
    assert not get(8)
    assert get(7), "the one used longest ago makes room"
    assert not get(8)


@pytest.mark.parametrize("budget", [0, 1, 1000])
def test_a_tile_over_the_budget_is_served_and_not_kept(shard: Shard, budget: int) -> None:
    storage, tensor, array = shard
    reader = Reader(storage, budget)
    view = Permute(Stored(tensor), (1, 0))
    for _ in range(2):
        assert read_range(reader, view, 77, 1000) == array.T.tobytes()[77:1077]
    assert len(storage.asked) == 2


@pytest.mark.parametrize("parts", [2, 8])
def test_columns_cut_over_files_are_gathered_without_waste(tmp_path: Path, parts: int) -> None:
    """Row-parallel weights: whatever is asked for, just that is read, and nothing is kept."""
    arrays = [noise(64, 256, seed=i) for i in range(parts)]
    shards = [Stored(written(tmp_path / f"{i}", array, BF16)) for i, array in enumerate(arrays)]
    view, content = Cat(tuple(shards), 1), np.concatenate(arrays, axis=1).tobytes()
    storage = Watched(identities(*tmp_path.iterdir()))
    reader = Reader(storage, 1 << 20, min_run=1024)
    for start, length in ((0, len(content)), (700, 4096), (4096, 100), (1, 1), (513, 9999), (8, 0)):
        storage.asked.clear()
        assert read_range(reader, view, start, length) == content[start : start + length]
        assert sum(asked.nbytes for asked in storage.asked) <= length + 2
        assert len(storage.asked) <= 3 * parts


@pytest.mark.parametrize("rows", [100, 300])
def test_a_transposed_tensor_is_read_once(tmp_path: Path, rows: int) -> None:
    """Asked for in small pieces, in tiles that each need all rows of what they are made of."""
    array = noise(3, rows, 400)
    view = Permute(Stored(written(tmp_path / "shard", array, BF16)), (0, 2, 1))
    content = array.transpose(0, 2, 1).tobytes()
    storage = Watched(identities(tmp_path / "shard"))
    reader = Reader(storage, 1 << 20, tile_bytes=16 << 10)
    step = 4 << 10
    found = [
        read_range(reader, view, i, min(step, len(content) - i))
        for i in range(0, len(content), step)
    ]
    assert b"".join(found) == content
    assert sum(asked.nbytes for asked in storage.asked) <= 1.01 * len(content)


def test_large_tiles_are_computed_a_few_at_a_time(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    array = noise(5, 2048, 1600)  # 6.6 MB each
    view = Permute(Stored(written(tmp_path / "shard", array, BF16)), (0, 2, 1))
    storage = Watched(identities(tmp_path / "shard"))
    busy, most, lock = set[int](), 0, threading.Lock()

    def slow() -> None:
        nonlocal most
        with lock:
            busy.add(threading.get_ident())
            most = max(most, len(busy))
        time.sleep(0.01)
        with lock:
            busy.remove(threading.get_ident())

    storage.before = slow
    reader = Reader(storage, 1 << 30)
    size = array[0].nbytes
    found = pool.map(lambda i: read_range(reader, view, i * size, 100), range(len(array)))
    assert list(found) == [expert.T[0, :50].tobytes() for expert in array]
    assert most == 2


def test_tiles_are_no_larger_than_asked(shard: Shard) -> None:
    storage, tensor, array = shard
    content = cast(array)
    for tile_bytes in (4, 100, 2048, 3000, 1 << 20):
        storage.asked.clear()
        reader = Reader(storage, 1 << 20, tile_bytes=tile_bytes)
        assert read_range(reader, To(Stored(tensor), F32), 0, len(content)) == content
        assert max(asked.nbytes for asked in storage.asked) <= tile_bytes / 2
        assert sum(asked.nbytes for asked in storage.asked) == len(content) / 2


def test_views_that_come_and_go_are_not_mixed_up(tmp_path: Path) -> None:
    """An id may be that of a view that is gone."""
    arrays = [noise(8, seed=i) for i in range(50)]
    parts = [written(tmp_path / f"{i}", array, BF16) for i, array in enumerate(arrays)]
    reader = Reader(Storage(identities(*tmp_path.iterdir())), 1 << 20)
    for part, array in zip(parts, arrays, strict=True):
        assert read_range(reader, To(Stored(part), F32), 0, 32) == cast(array)
        assert read_range(reader, Stored(part), 0, 16) == array.tobytes()


@pytest.mark.parametrize("make", [lambda v: v, lambda v: To(v, F32), lambda v: Stack((v, v), 0)])
def test_scalars(tmp_path: Path, make: Callable[[View], View]) -> None:
    stored = Stored(written(tmp_path / "shard", noise(1).reshape(()), BF16))
    view = make(stored)
    reader = Reader(Storage(identities(tmp_path / "shard")), 1 << 20)
    size = view.dtype.itemsize * (view.shape or (1,))[0]
    content = reader.read_box(view, Box.whole(view.shape)).tobytes()
    assert len(content) == size
    assert any(content)
    for start in range(size):
        assert read_range(reader, view, start, size - start) == content[start:]


def test_transposed_shards_are_read_once_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    array = noise(256, 1024, dtype=F32)
    torch.save(as_torch(array.T.copy(), F32).t(), path)
    chunk = Chunk(Box.whole(array.shape), Span(str(path), 0, path.stat().st_size, "torch_zip"))
    tensor, _ = stored_tensor("t", F32, array.shape, (chunk,))
    assert tensor
    storage = Watched(identities(path))
    leaf = StorageLeaf(storage, gather_bytes=64 << 10)
    out = np.zeros_like(array)
    leaf(tensor, Box.whole(array.shape), out)
    np.testing.assert_array_equal(out, array)
    assert max(asked.nbytes for asked in storage.asked) <= 64 << 10
    assert sum(asked.nbytes for asked in storage.asked) <= array.nbytes + 2 * 2048


def test_a_leaf_fills_all_or_refuses(shard: Shard) -> None:
    """What it would leave as it was is memory of something else."""
    storage, tensor, _ = shard
    with pytest.raises(ReadFault, match="was asked of shape"):
        StorageLeaf(storage)(tensor, Box((60, 0), (5, 512)), np.empty((5, 512), np.uint16))


def sparse(path: Path, shape: Shape) -> StoredTensor:
    """A tensor of zeros that takes no space, with ones in its last row."""
    tensor = raw(path, U8, shape)
    with path.open("wb") as file:
        file.seek(shape[0] * shape[1] - shape[1])
        file.write(b"\1" * shape[1])
    return tensor


def test_a_tensor_larger_than_memory_is_read(tmp_path: Path) -> None:
    """It has addresses, and planning how to read it needs no more."""
    shape = (1 << 23, 1 << 16)
    view = Stored(sparse(tmp_path / "shard", shape))
    reader = Reader(Storage(identities(tmp_path / "shard")), 0)
    assert read_range(reader, view, shape[0] * shape[1] - shape[1] - 1, 3) == b"\0\1\1"


def test_runs_beyond_number_become_tiles(tmp_path: Path) -> None:
    """Else a plan of long runs would itself grow with the model."""
    shape = (50_000, 65_536)
    view = Narrow(Stored(sparse(tmp_path / "shard", shape)), 1, 0, 40_000)
    storage = Watched(identities(tmp_path / "shard"))
    reader = Reader(storage, 0, tile_bytes=80_000)
    assert read_range(reader, view, shape[0] * 40_000 - 40_001, 3) == b"\0\1\1"
    assert max(asked.nbytes for asked in storage.asked) > 3, "a tile was read, not a run"


def test_archives_that_touch_are_placed_by_one_read_each(tmp_path: Path) -> None:
    """A shard is full of them: the tail of one lies beside the head of the next."""
    arrays = [noise(40, 64) for _ in range(6)]
    content, spans = b"", list[Span]()
    path = tmp_path / "shard"
    for array in arrays:
        entry = _entry(as_torch(array, BF16))
        spans.append(Span(str(path), len(content), len(entry), "torch_zip"))
        content += entry
    path.write_bytes(content)
    storage = Watched(identities(path))
    for array, span in zip(arrays, spans, strict=True):
        placed = storage.place(Chunk(Box.whole(array.shape), span), BF16)
        assert content[placed.offset : placed.offset + array.nbytes] == array.tobytes()
    assert len(storage.asked) == len(arrays) + 1


# ---------------------------------------------------------------- what goes wrong


def faults(read: Callable[[], object], pool: ThreadPoolExecutor, match: str | None = None) -> None:
    """Fails with EIO, and does not hang."""
    with pytest.raises(ReadFault, match=match) as caught:
        pool.submit(read).result(timeout=30)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.EIO


def _replace(path: Path, data: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(data)
    other.rename(path)


def _make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _make_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "replaced": lambda path: _replace(path, path.read_bytes()),
    "replaced by another": lambda path: _replace(path, b"x" * path.stat().st_size),
    "rewritten": lambda path: path.write_bytes(b"x" * path.stat().st_size),
    "truncated": lambda path: os.truncate(path, 100),
    "grown": lambda path: os.truncate(path, 1 << 20),
    "a fifo": _make_fifo,
    "a link": _make_link,
    "a directory": _make_directory,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("make", [Stored, lambda tensor: To(Stored(tensor), F32)])
def test_a_shard_changed_before_it_is_opened_is_a_fault(
    name: str, make: Callable[[StoredTensor], View], shard: Shard, pool: ThreadPoolExecutor
) -> None:
    storage, tensor, _ = shard
    CHANGES[name](Path(tensor.chunks[0].span.path))
    reader = Reader(storage, 1 << 20)
    for _ in range(2):
        faults(lambda: read_range(reader, make(tensor), 0, 10), pool, match="shard")


@pytest.mark.parametrize("name", sorted({*CHANGES} - {"rewritten", "truncated"}))
def test_a_shard_changed_while_it_is_open_is_read_as_it_was(
    name: str, shard: Shard, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    _, tensor, array = shard
    path = Path(tensor.chunks[0].span.path)
    other = written(tmp_path / "more", array, BF16)
    storage = Storage(identities(path, tmp_path / "more"), max_open=1)
    reader = Reader(storage, 0)
    content = array.tobytes()
    assert read_range(reader, Stored(tensor), 0, 10) == content[:10]
    CHANGES[name](path)
    assert read_range(reader, Stored(tensor), 0, len(content)) == content
    assert read_range(reader, Stored(other), 0, 10) == content[:10]
    faults(lambda: read_range(reader, Stored(tensor), 0, 10), pool, match="shard")


def test_a_shard_truncated_while_it_is_open_is_a_fault_where_it_is_cut(
    shard: Shard, pool: ThreadPoolExecutor
) -> None:
    storage, tensor, array = shard
    reader = Reader(storage, 1 << 20)
    view, content = Stored(tensor), array.tobytes()
    read_range(reader, view, 0, 1)
    os.truncate(tensor.chunks[0].span.path, 6 + 1000)
    assert read_range(reader, view, 500, 500) == content[500:1000]
    for start, length in ((500, 501), (1000, 1), (2000, 10), (0, len(content))):
        faults(lambda s=start, n=length: read_range(reader, view, s, n), pool, "file ends")  # type: ignore[misc]
    assert read_range(reader, To(view, F32), 0, 4) == cast(array)[:4]
    for other in (To(view, F32), Permute(view, (1, 0))):
        faults(lambda o=other: read_range(reader, o, 2000, 4), pool, match="file ends")  # type: ignore[misc]


@pytest.mark.parametrize("offset", [-1, 1 << 62, 1 << 63, 1 << 70])
def test_impossible_offsets_are_faults(offset: int, shard: Shard, pool: ThreadPoolExecutor) -> None:
    storage, tensor, _ = shard
    faults(lambda: storage.read(tensor.chunks[0].span.path, offset, 1), pool)


def _entry(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        _entry(torch.zeros(5, dtype=torch.bfloat16)),
        _entry(torch.zeros(2, 2, dtype=torch.bfloat16)),
        _entry(torch.zeros(4, dtype=torch.float16)),
        _entry({"a": torch.zeros(4, dtype=torch.bfloat16)}),
        _entry(torch.zeros(4, dtype=torch.bfloat16))[:-1],
        _entry(torch.zeros(4, dtype=torch.bfloat16)).replace(b"PK\3\4", b"PK\3\5"),
        b"\0" * 500,
        b"",
    ],
)
def test_an_entry_that_is_not_as_indexed_is_a_fault(
    content: bytes, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    path = tmp_path / "shard"
    path.write_bytes(content)
    chunk = Chunk(Box.whole((4,)), Span(str(path), 0, len(content), "torch_zip"))
    tensor, _ = stored_tensor("t", BF16, (4,), (chunk,))
    assert tensor
    reader = Reader(Storage(identities(path)), 1 << 20)
    for view in (Stored(tensor), To(Stored(tensor), F32)):
        faults(lambda view=view: read_range(reader, view, 0, 4), pool, match="shard")  # type: ignore[misc]


def test_short_reads_are_continued(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, tensor, array = shard
    preadv = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    content = array.tobytes()
    assert read_range(Reader(storage, 0), Stored(tensor), 0, len(content)) == content


def test_errors_of_the_disk_are_faults(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    storage, tensor, _ = shard

    def broken(*_: Any) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "preadv", broken)
    faults(lambda: read_range(Reader(storage, 0), Stored(tensor), 0, 1), pool, match="Stale")


# ---------------------------------------------------------------- open files


def open_files(root: Path) -> int:
    """Descriptors of this process on files below `root`."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{fd}").startswith(str(root))
        except FileNotFoundError:
            continue
    return count


def test_many_files_and_threads_with_few_descriptors(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    arrays = [noise(300, seed=i) for i in range(50)]
    parts = [Stored(written(tmp_path / f"{i}", array, BF16)) for i, array in enumerate(arrays)]
    storage = Storage(identities(*tmp_path.iterdir()), max_open=2)
    reader = Reader(storage, 0)
    view = Stack(tuple(parts), 0)
    content = np.stack(arrays).tobytes()
    most: list[int] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            start = rng.randrange(len(content))
            length = min(rng.choice([1, 100, 2000]), len(content) - start)
            assert read_range(reader, view, start, length) == content[start : start + length]
            most.append(open_files(tmp_path))

    list(pool.map(read, range(THREADS)))
    assert max(most) <= 2 + THREADS
    assert open_files(tmp_path) <= 2
    storage.close()
    assert open_files(tmp_path) == 0


def test_files_are_closed_when_nobody_holds_them_any_more(shard: Shard, tmp_path: Path) -> None:
    _, tensor, array = shard
    reader = Reader(Storage(identities(*tmp_path.iterdir())), 0)
    assert read_range(reader, Stored(tensor), 0, 100) == array.tobytes()[:100]
    assert open_files(tmp_path) == 1
    del reader
    gc.collect()
    assert open_files(tmp_path) == 0


def test_closing_waits_for_no_one_and_leaves_nothing_open(
    shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    storage, tensor, array = shard
    preadv = os.preadv
    reading, go_on = threading.Event(), threading.Event()

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        reading.set()
        assert go_on.wait(30)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    reader = Reader(storage, 0)
    pending = pool.submit(read_range, reader, Stored(tensor), 0, 100)
    assert reading.wait(30)
    storage.close()
    assert open_files(tmp_path) == 1, "it is being read from"
    faults(lambda: read_range(reader, Stored(tensor), 0, 1), pool, match="closed")
    go_on.set()
    assert pending.result(timeout=30) == array.tobytes()[:100]
    assert open_files(tmp_path) == 0
    faults(lambda: read_range(reader, Stored(tensor), 0, 1), pool, match="closed")
    assert open_files(tmp_path) == 0


def test_a_slow_open_holds_up_no_other_file(
    shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    _, tensor, array = shard
    other = written(tmp_path / "slow", array, BF16)
    reader = Reader(Storage(identities(tmp_path / "shard", tmp_path / "slow")), 0)
    open_ = os.open
    opening, go_on = threading.Event(), threading.Event()

    def slow(path: str, flags: int) -> int:
        if path.endswith("slow"):
            opening.set()
            assert go_on.wait(30)
        return open_(path, flags)

    monkeypatch.setattr(os, "open", slow)
    pending = [pool.submit(read_range, reader, Stored(other), 0, 9) for _ in range(3)]
    assert opening.wait(30)
    read = pool.submit(read_range, reader, Stored(tensor), 0, 9)
    assert read.result(timeout=30) == array.tobytes()[:9]
    go_on.set()
    assert {done.result(timeout=30) for done in pending} == {array.tobytes()[:9]}
    assert open_files(tmp_path) == 2


def test_regular_file_refuses_all_else(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert regular_file(str(path))[1] == "No such file or directory"
    path.write_bytes(b"abc")
    identity, why = regular_file(str(path))
    assert identity == FileIdentity.of(path.stat())
    assert why is None
    for change in (_make_link, _make_fifo, _make_directory):
        change(path)
        identity, why = regular_file(str(path))
        assert identity is None
        assert why
