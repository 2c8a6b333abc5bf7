"""Reading a box of a stored tensor: which chunks hold it, where they lie, the copy into place."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mcorefs.boxes import Box, Shape, row_major_strides
from mcorefs.errors import ReadFault
from mcorefs.index import Chunk, StoredTensor
from mcorefs.storage import Placed, Storage
from mcorefs.views import Array, View

GATHER_BYTES = 256 << 10
"""Most bytes taken from disk at once for elements that do not lie together: so few that they are
still in the processor's cache when they are put in place."""
MAX_RUNS = 4096
"""Runs kept for one tensor, at some 150 bytes each."""


@dataclass(frozen=True)
class StorageLeaf:
    """The leaf of every view of one checkpoint (`views.Leaf`)."""

    storage: Storage
    gather_bytes: int = GATHER_BYTES

    def __call__(self, tensor: StoredTensor, box: Box, out: Array) -> None:
        if self.storage.is_remote:
            self.storage.expect(_wanted(tensor, box))
        filled = 0
        for chunk, part in tensor.overlapping(box):
            where = part.relative_to(box.offsets).slices()
            if chunk.span.encoding is None:
                placed = self.storage.place(chunk, tensor.dtype)
                self._copy(placed, part.relative_to(chunk.box.offsets), out[where])
            else:
                local = part.relative_to(chunk.box.offsets)
                out[where] = _elements(self.storage.decoded(chunk.span), chunk, out.dtype, local)
            filled += part.volume
        if filled != box.volume:  # what is left of `out` is not data
            raise ReadFault(f"{tensor.fqn}: {box} was asked of shape {list(tensor.shape)}")

    def _copy(self, placed: Placed, box: Box, out: Array) -> None:
        """Elements `box` of a chunk into `out`: straight where both sides are one run of bytes,
        else through a buffer that holds one stretch of the file around the wanted elements."""
        first, stretch = _stretch(placed.strides, box)
        size = out.dtype.itemsize
        if stretch == box.volume and _row_major(placed.strides, box.sizes) and _dense(out):
            start = placed.offset + first * size
            self.storage.read_into(placed.path, start, out.data.cast("B"))
            return
        if stretch * size > self.gather_bytes and box.volume > 1:
            for half, where in _halves(box, _widest(placed.strides, box.sizes)):
                self._copy(placed, half, out[where])
            return
        buffer = np.empty(stretch, out.dtype)
        start = placed.offset + first * size
        self.storage.read_into(placed.path, start, buffer.data.cast("B"))
        strides = tuple(stride * size for stride in placed.strides)
        out[...] = np.lib.stride_tricks.as_strided(buffer, box.sizes, strides, writeable=False)


def _wanted(tensor: StoredTensor, box: Box) -> Iterator[tuple[Chunk, int, int]]:
    """(chunk, first byte of its elements, bytes) for each chunk that holds elements of `box`."""
    size = tensor.dtype.itemsize
    for chunk, part in tensor.overlapping(box):
        strides = chunk.span.strides or row_major_strides(chunk.box.sizes)
        first, stretch = _stretch(strides, part.relative_to(chunk.box.offsets))
        yield chunk, first * size, stretch * size


def _elements(
    decoded: bytes | bytearray, chunk: Chunk, dtype: np.dtype[np.generic], box: Box
) -> Array:
    """Elements `box` of a chunk that was compressed."""
    strides = chunk.span.strides or row_major_strides(chunk.box.sizes)
    steps = tuple(stride * dtype.itemsize for stride in strides)
    stored = np.frombuffer(decoded, dtype, offset=chunk.span.skip)
    whole = np.lib.stride_tricks.as_strided(stored, chunk.box.sizes, steps, writeable=False)
    found: Array = whole[box.slices()]
    return found


def _stretch(strides: Shape, box: Box) -> tuple[int, int]:
    """(first element, elements from the first to the last) of `box` in the file."""
    first, count = 0, 1
    for offset, size, stride in zip(box.offsets, box.sizes, strides, strict=True):
        first += offset * stride
        count += (size - 1) * stride
    return first, count


def _row_major(strides: Shape, sizes: Shape) -> bool:
    """Whether elements of `sizes` at `strides` follow each other; axes of one do not matter."""
    wanted = row_major_strides(sizes)
    return all(n == 1 or s == w for n, s, w in zip(sizes, strides, wanted, strict=True))


def _dense(out: Array) -> bool:
    return out.flags.c_contiguous and out.flags.writeable


def _widest(strides: Shape, sizes: Shape) -> int:
    """The axis along which elements of `sizes` lie furthest apart: halving it halves the stretch,
    or nearly. Of axes that lie no further than a point (expanded ones), the longest."""
    return max(range(len(sizes)), key=lambda axis: ((sizes[axis] - 1) * strides[axis], sizes[axis]))


def _halves(box: Box, axis: int) -> Iterator[tuple[Box, tuple[slice, ...]]]:
    size = box.sizes[axis]
    lead = (slice(None),) * axis
    for low, high in ((0, size // 2), (size // 2, size)):
        offsets = (*box.offsets[:axis], box.offsets[axis] + low, *box.offsets[axis + 1 :])
        sizes = (*box.sizes[:axis], high - low, *box.sizes[axis + 1 :])
        yield Box(offsets, sizes), (*lead, slice(low, high))


@dataclass(frozen=True, slots=True)
class Cost:
    """What reading a box takes: elements from disk, in so many pieces."""

    elements: int
    pieces: int


def cost(view: View, box: Box) -> Cost | None:
    """What StorageLeaf would read for `box` of `view`; None if it would have to decode chunks.

    The view is made to fill an array that the leaf does not touch. Places nothing, reads nothing.
    """
    elements = pieces = 0
    encoded = False

    def note(tensor: StoredTensor, box: Box, out: Array) -> None:
        nonlocal elements, pieces, encoded
        for chunk, part in tensor.overlapping(box):
            encoded = encoded or chunk.span.encoding is not None
            strides = chunk.span.strides or row_major_strides(chunk.box.sizes)
            elements += _stretch(strides, part.relative_to(chunk.box.offsets))[1]
            pieces += 1

    view.read_into(box, np.empty(box.sizes, view.dtype.carrier), note)
    return None if encoded else Cost(elements, pieces)


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes [start, start + nbytes) of a tensor's row-major form, as they lie in one file."""

    start: int
    nbytes: int
    path: str
    offset: int


class _ManyRunsError(Exception):
    """A box would be cut into more runs than were asked for."""


def _runs(
    storage: Storage, tensor: StoredTensor, box: Box, out: Array, base: int, most: int
) -> Iterator[Run]:
    """The runs of bytes that copying `box` of `tensor` to `out` would consist of.

    `out` is only looked at for its address and strides; `base` is the address of byte 0. Raises
    _ManyRunsError before those of a chunk that has more than `most`.
    """
    size = tensor.dtype.itemsize
    if storage.is_remote:
        storage.expect((chunk, 0, 0) for chunk, _ in tensor.overlapping(box))
    for chunk, part in tensor.overlapping(box):
        if chunk.span.encoding is not None:
            continue  # it leaves a gap: no run of bytes of the file is what it holds
        placed = storage.place(chunk, tensor.dtype)
        target = out[part.relative_to(box.offsets).slices()]
        local = part.relative_to(chunk.box.offsets)
        strides = tuple(stride // size for stride in target.strides)
        split = len(local.sizes)
        while split > 0 and _run_axes(local.sizes, placed.strides, strides, split - 1):
            split -= 1
        if math.prod(local.sizes[:split]) > most:
            raise _ManyRunsError
        length = math.prod(local.sizes[split:]) * size
        source, _ = _stretch(placed.strides, local)
        where = target.__array_interface__["data"][0] - base
        for index in itertools.product(*map(range, local.sizes[:split])):
            at = sum(i * s for i, s in zip(index, strides, strict=False))
            file_at = source + sum(i * s for i, s in zip(index, placed.strides, strict=False))
            yield Run(where + at * size, length, placed.path, placed.offset + file_at * size)


def _run_axes(sizes: Shape, source: Shape, target: Shape, split: int) -> bool:
    """Whether axes from `split` on are one run on both sides."""
    inner = math.prod(sizes[split + 1 :])
    return sizes[split] == 1 or source[split] == target[split] == inner


class Addresses:
    """Addresses with no memory behind them, for arrays that are only looked at. Kept from one to
    the next: to give up a mapping interrupts all processors."""

    def __init__(self) -> None:
        self._space: mmap.mmap | None = None

    def array(self, view: View) -> Array:
        """An array like `view`. Raises OSError, ValueError or OverflowError if it is too large."""
        count = math.prod(view.shape)
        nbytes = count * view.dtype.itemsize
        space = self._space
        if space is None or len(space) < nbytes:
            # Read-only pages are never counted as memory in use, however many.
            space = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
            self._space = space
        return np.frombuffer(space, view.dtype.carrier, count).reshape(view.shape)


def as_runs(
    storage: Storage, addresses: Addresses, view: View, min_run: int
) -> tuple[Run, ...] | None:
    """The runs that make up `view`, None if they are short and many.

    The view is made to fill an array that has addresses but no memory: the leaf sees where each
    piece would go and notes it instead of writing.
    """
    nbytes = math.prod(view.shape) * view.dtype.itemsize
    if nbytes == 0:
        return ()
    most = min(max(16, nbytes // min_run), MAX_RUNS)
    found: list[Run] = []
    try:
        out = addresses.array(view)
    except (OSError, ValueError, OverflowError):
        return None
    base = out.__array_interface__["data"][0]

    def note(tensor: StoredTensor, box: Box, target: Array) -> None:
        for run in _runs(storage, tensor, box, target, base, most):
            found.append(run)
            # A piece outside goes through a buffer of the view's own: not straight.
            if len(found) > most or not 0 <= run.start <= nbytes - run.nbytes:
                raise _ManyRunsError

    try:
        view.read_into(Box.whole(view.shape), out, note)
    except _ManyRunsError:
        return None
    ordered = sorted(found, key=lambda run: run.start)
    ends = [run.start + run.nbytes for run in ordered]
    if [0, *ends] != [*(run.start for run in ordered), nbytes]:
        return None
    return _joined(ordered)


def _joined(ordered: list[Run]) -> tuple[Run, ...]:
    """Neighbours that are neighbours in their file too become one run."""
    joined: list[Run] = []
    for run in ordered:
        if joined:
            last = joined[-1]
            if last.path == run.path and last.offset + last.nbytes == run.offset:
                joined[-1] = Run(last.start, last.nbytes + run.nbytes, last.path, last.offset)
                continue
        joined.append(run)
    return tuple(joined)
