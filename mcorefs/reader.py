"""Bytes of virtual safetensors files: header, straight reads, and tiles under a budget.

A tensor whose bytes lie in few long runs is read straight from the shards into the caller's
buffer. One of which any range can be put together from little more than its own bytes (row-parallel
weights, casts) is *gathered* anew for each request. Any other (transposed weights, matrices added)
is computed a *tile* at a time: a contiguous box of about TILE_BYTES, or of so many that its source
is read once, kept in an LRU cache, so that the many small requests of one page-faulting reader do
not each pay for it. A tile is computed by the first thread that wants it; others wait for that
thread, which itself waits for nothing but storage.
"""

from __future__ import annotations

import itertools
import math
import threading
from bisect import bisect_right
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mcorefs.activity import Activity
from mcorefs.boxes import Box, Shape, flat_range_boxes
from mcorefs.layout import SafetensorsLayout
from mcorefs.leaf import Addresses, Run, StorageLeaf, as_runs, cost
from mcorefs.storage import Storage
from mcorefs.views import Array, Leaf, View, elementwise, moves_only

if TYPE_CHECKING:
    from cachetools import LRUCache

TILE_BYTES = 4 << 20
MIN_RUN = 32 << 10
"""Mean length from which runs are read one by one rather than gathered into tiles."""
PAGE, REQUEST_BYTES = 4 << 10, 128 << 10
"""The least a reader asks for, and what one that faults pages in asks for at a time."""
PIECES_OF_RUN = 8
"""Pieces that a MIN_RUN of a gathered request may consist of, on average."""
MAX_EXCESS = 1.25
"""Elements read for each that is asked for, up to which a box is cheap."""
MAX_TILE_BYTES = 64 << 20
MAX_LARGE = 2
"""Tiles of more than TILE_BYTES computed at a time: they are what many threads' memory would be."""
_NUMBERS = itertools.count()
"""Of readers: in a cache that they share, the id of a view may come to be that of another's."""


class TileCache:
    """Tiles by key, at most `budget` bytes of them. Thread-safe, each computed once at a time."""

    def __init__(self, budget: int, activity: Activity | None = None) -> None:
        from cachetools import LRUCache

        self.budget = budget
        self.activity = activity or Activity()
        self._tiles: LRUCache[Hashable, Array] = LRUCache(
            max(budget, 1), getsizeof=lambda tile: tile.nbytes
        )
        self._pending: dict[Hashable, Future[Array]] = {}
        self._lock = threading.Lock()
        self._large = threading.BoundedSemaphore(MAX_LARGE)

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._tiles

    def get(self, key: Hashable, view: View, box: Box, leaf: Leaf) -> Array:
        """Elements `box` of `view`, row-major; kept under `key` while the budget allows."""
        with self._lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self.activity.tile_hits.add(1)
                return tile
            pending = self._pending.get(key)
            if pending is None:
                mine = self._pending[key] = Future()
        if pending is not None:
            self.activity.tile_hits.add(1)
            return pending.result()
        self.activity.tile_misses.add(1)
        try:
            large = box.volume * view.dtype.itemsize > TILE_BYTES
            with self._large if large else nullcontext():
                tile = np.empty(box.sizes, view.dtype.carrier)
                view.read_into(box, tile, leaf)
            tile.flags.writeable = False
        except BaseException as problem:
            with self._lock:
                del self._pending[key]
            mine.set_exception(problem)
            raise
        mine.set_result(tile)
        with self._lock:
            del self._pending[key]
            if tile.nbytes <= self.budget:
                self._tiles[key] = tile
        return tile


@dataclass(frozen=True)
class _Straight:
    """A tensor as runs of its shards, sorted by start and covering it without gap."""

    runs: tuple[Run, ...]
    starts: tuple[int, ...]

    def pieces(self, start: int, nbytes: int) -> Iterator[tuple[Run, int, int]]:
        """(run, first byte in it, bytes) for bytes [start, start + nbytes) of the tensor."""
        at, end = start, start + nbytes
        i = bisect_right(self.starts, start) - 1
        while at < end:
            run = self.runs[i]
            count = min(run.start + run.nbytes, end) - at
            yield run, at - run.start, count
            at += count
            i += 1


@dataclass(frozen=True)
class _Gathered:
    """A tensor of which any range is cheap to put together."""


@dataclass(frozen=True)
class _Tiled:
    """A tensor cut into tiles: `rows` indices of `axis`, all of the axes behind it."""

    axis: int
    rows: int
    per_lead: int
    """Tiles for each index of the axes before `axis`."""


_Way = _Straight | _Gathered | _Tiled


class Reader:
    """Reads tensors and files of one model. Thread-safe; owns no thread.

    `cache` may be shared with other readers; a number makes one of its own, of so many bytes.
    Keeps the views it has read from, and how to read each, for as long as it lives.
    """

    def __init__(
        self,
        storage: Storage,
        cache: TileCache | int,
        tile_bytes: int = TILE_BYTES,
        min_run: int = MIN_RUN,
    ) -> None:
        self._storage = storage
        self._leaf = StorageLeaf(storage)
        self._cache = TileCache(cache) if isinstance(cache, int) else cache
        self._number = next(_NUMBERS)
        self._tile_bytes, self._min_run = tile_bytes, min_run
        self._addresses = Addresses()
        self._ways: dict[int, tuple[View, _Way]] = {}
        """By id, with the view itself: the id must not become that of another view."""

    def read_tensor(self, view: View, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of the row-major form of `view` from byte `start` on.

        Raises ReadFault if the source cannot deliver them.
        """
        way = self._way_of(view)
        if isinstance(way, _Straight):
            done = 0
            for run, inside, count in way.pieces(start, len(out)):
                self._storage.read_into(run.path, run.offset + inside, out[done : done + count])
                done += count
        elif isinstance(way, _Gathered):
            self._gather(view, start, out)
        else:
            self._read_tiles(view, way, start, out)

    def read_box(self, view: View, box: Box) -> Array:
        """Elements `box` of `view` as a new array of the dtype's carrier."""
        out = np.empty(box.sizes, view.dtype.carrier)
        view.read_into(box, out, self._leaf)
        return out

    def is_ranged(self, view: View) -> bool:
        """Whether any range of `view` is read with little beside it, and without a server."""
        return not self._storage.is_remote and not isinstance(self._way_of(view), _Tiled)

    def hold(self) -> None:
        """Open the shard files, so that they can be read when they have been deleted."""
        self._storage.hold()

    def let_go(self) -> None:
        """Close shard files that nobody reads; they are opened again for who does."""
        self._storage.let_go()

    def close(self) -> None:
        """Close the shard files."""
        self._storage.close()

    def _way_of(self, view: View) -> _Way:
        known = self._ways.get(id(view))
        if known is None:
            known = self._ways[id(view)] = view, self._way(view)
        return known[1]

    def _way(self, view: View) -> _Way:
        if moves_only(view):
            found = as_runs(self._storage, self._addresses, view, self._min_run)
            if found is not None:
                return _Straight(found, tuple(run.start for run in found))
        if elementwise(view) and not self._storage.is_remote and self._is_cheap(view):
            return _Gathered()
        return self._tiling(view)

    def _is_cheap(self, view: View) -> bool:
        """Whether few and long pieces make up a request, with little between them."""
        if 0 in view.shape:
            return True
        for nbytes, piece in ((PAGE, 0), (REQUEST_BYTES, self._min_run // PIECES_OF_RUN)):
            box = _first_box(view, nbytes)
            found = cost(view, box)
            if (
                found is None
                or found.elements > MAX_EXCESS * box.volume
                or found.pieces * piece > box.volume * view.dtype.itemsize
            ):
                return False
        return True

    def _tiling(self, view: View) -> _Tiled:
        """Tiles of the usual size, or so large that what they are made of is not read many times
        over: a tile of a transposed matrix takes a little of each row, and all that is between."""
        nbytes = self._tile_bytes
        if moves_only(view) and 0 not in view.shape:
            box = _first_box(view, nbytes)
            found = cost(view, box)
            if found is not None and found.elements > MAX_EXCESS * box.volume:
                # A sixteenth more: from the first element to the last is not quite the whole.
                wanted = found.elements * view.dtype.itemsize * 17 // 16
                larger = max(nbytes, min(wanted, MAX_TILE_BYTES, self._cache.budget // 4))
                box_of_larger = _first_box(view, larger)
                again = cost(view, box_of_larger)
                assert again is not None
                excess = again.elements / box_of_larger.volume
                if excess * MAX_EXCESS <= found.elements / box.volume:
                    nbytes = larger
        return _tiling(view.shape or (1,), view.dtype.itemsize, nbytes)

    def _gather(self, view: View, start: int, out: memoryview) -> None:
        size, end = view.dtype.itemsize, start + len(out)
        first, last = start // size, -(-end // size)
        whole = np.frombuffer(out, np.uint8)
        if first * size != start or last * size != end:  # of an element only some bytes are wanted
            whole = np.empty((last - first) * size, np.uint8)
        at, step = 0, max(1, self._tile_bytes // size)
        for low in range(first, last, step):
            for box in flat_range_boxes(view.shape, low, min(low + step, last)):
                part = whole[at : at + box.volume * size]
                view.read_into(box, part.view(view.dtype.carrier).reshape(box.sizes), self._leaf)
                at += len(part)
        if at != len(out):
            out[:] = whole[start - first * size :][: len(out)].data

    def _read_tiles(self, view: View, tiling: _Tiled, start: int, out: memoryview) -> None:
        size, shape = view.dtype.itemsize, view.shape or (1,)
        row_bytes = math.prod(shape[tiling.axis + 1 :]) * size
        lead_bytes = shape[tiling.axis] * row_bytes
        target = np.frombuffer(out, np.uint8)
        at, end = start, start + len(out)
        while at < end:
            lead, inside = divmod(at, lead_bytes)
            number = inside // (tiling.rows * row_bytes)
            first = number * tiling.rows
            rows = min(tiling.rows, shape[tiling.axis] - first)
            box = _tile_box(shape, tiling.axis, lead, first, rows) if view.shape else Box((), ())
            key = (self._number, id(view), lead * tiling.per_lead + number)
            skip = inside - first * row_bytes
            count = min(rows * row_bytes - skip, end - at)
            part = target[at - start : at - start + count]
            if count == rows * row_bytes and key not in self._cache:
                # Who asks for the whole tile needs no copy of it kept.
                self._cache.activity.tile_misses.add(1)
                view.read_into(box, part.view(view.dtype.carrier).reshape(box.sizes), self._leaf)
            else:
                tile = self._cache.get(key, view, box, self._leaf)
                part[:] = tile.reshape(-1).view(np.uint8)[skip : skip + count]
            at += count


def _tile_box(shape: Shape, axis: int, lead: int, first: int, rows: int) -> Box:
    index = tuple(int(i) for i in np.unravel_index(lead, shape[:axis])) if axis else ()
    rest = shape[axis + 1 :]
    return Box((*index, first, *(0,) * len(rest)), (*(1,) * axis, rows, *rest))


def _first_box(view: View, nbytes: int) -> Box:
    """The first tile of `nbytes`."""
    tiling = _tiling(view.shape or (1,), view.dtype.itemsize, nbytes)
    return _tile_box(view.shape, tiling.axis, 0, 0, tiling.rows) if view.shape else Box((), ())


def _tiling(shape: Shape, itemsize: int, tile_bytes: int) -> _Tiled:
    """Tiles of about `tile_bytes`, each one contiguous range of the row-major form."""
    axis = 0
    row_bytes = math.prod(shape[1:]) * itemsize
    while row_bytes > tile_bytes and axis + 1 < len(shape):
        axis += 1
        row_bytes = math.prod(shape[axis + 1 :]) * itemsize
    rows = max(1, min(shape[axis], tile_bytes // max(row_bytes, 1)))
    return _Tiled(axis, rows, -(-shape[axis] // rows))


@dataclass(frozen=True, eq=False)
class SafetensorsFile:
    """A `model-*.safetensors` file whose bytes are computed when they are read (VirtualFile)."""

    layout: SafetensorsLayout
    reader: Reader

    @property
    def size(self) -> int:
        return self.layout.size

    def read_into(self, offset: int, out: memoryview) -> None:
        done = self._header_into(offset, out)
        for view, start, count in self._tensors(offset + done, len(out) - done):
            self.reader.read_tensor(view, start, out[done : done + count])
            done += count

    def _header_into(self, offset: int, out: memoryview) -> int:
        part = self.layout.header[offset : offset + len(out)]
        out[: len(part)] = part
        return len(part)

    def _tensors(self, offset: int, nbytes: int) -> Iterator[tuple[View, int, int]]:
        """(view, first byte in it, bytes) for each tensor in a range behind the header."""
        starts, tensors = self.layout.starts, self.layout.tensors
        at, end = offset, offset + nbytes
        i = bisect_right(starts, at) - 1
        while at < end:
            count = min(starts[i] + tensors[i].nbytes, end) - at
            if count > 0:
                yield tensors[i].view, at - starts[i], count
                at += count
            i += 1
