"""What a checkpoint holds: stored tensors, each a set of chunks that tile it exactly.

Formats build these from metadata alone; nothing here reads tensor data.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mcorefs.boxes import Box, Shape, row_major_strides
from mcorefs.dtypes import DType
from mcorefs.encoding import Encoding
from mcorefs.errors import ReadFault

MAX_DIMS = 8
MAX_BYTES = 1 << 63
"""What NumPy, safetensors readers and file offsets can address."""
MAX_DEPTH = 32
"""Cuts within cuts of a tensor; parallel layouts need one for each way they shard."""
MIN_GRID = 32
"""Chunks of one tensor from which NumPy is worth its start."""
MAX_SCAN = 1024
"""Chunks of one tensor that interlock without a straight cut between them."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of one file that hold the elements of a chunk.

    kind "raw": elements in [offset, offset + nbytes).
    kind "torch_zip": a whole `torch.save` archive of one tensor, [offset, offset + nbytes), whose
    data offset and strides are found when it is first read (`storage`).
    kind "zip_record": a record of `nbytes` bytes of data whose local zip header is at `offset`;
    where its data begin is found when it is first read.
    """

    path: str
    offset: int
    nbytes: int
    kind: Literal["raw", "torch_zip", "zip_record"] = "raw"
    skip: int = 0
    """raw, zip_record: bytes of data before the first element."""
    strides: Shape | None = None
    """raw, zip_record: in elements; None where the elements are row-major."""
    encoding: Encoding | None = None
    """raw: how [offset, offset + nbytes) is compressed, if it is."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The elements of `box`, stored in `span`."""

    box: Box
    span: Span


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of the checkpoint, cut into chunks.

    The chunks tile `shape` exactly: build it with `stored_tensor`, which proves that.
    Equality is identity: one object per fqn and checkpoint.
    """

    fqn: str
    dtype: DType
    shape: Shape
    _tiling: Callable[[], tuple[tuple[Chunk, ...], _Node]] = field(repr=False)
    """What it is cut into: made when it is first asked for, where it is remembered."""

    @cached_property
    def _cut(self) -> tuple[tuple[Chunk, ...], _Node]:
        return self._tiling()

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self._cut[0]

    def overlapping(self, box: Box) -> Iterator[tuple[Chunk, Box]]:
        """Chunks that hold elements of `box`, each with the part of `box` that it holds."""
        if box.volume:
            yield from self._cut[1].overlapping(box)


def stored_tensor(
    fqn: str, dtype: DType, shape: Shape, chunks: tuple[Chunk, ...]
) -> tuple[StoredTensor | None, str | None]:
    """The tensor, or what is wrong with its chunks (gap, overlap, out of bounds): one is None.

    Any numbers at all may come in; time and memory are linear in the number of chunks.
    """
    try:
        tiling = _tiled(dtype, shape, chunks)
    except _BadTilingError as problem:
        return None, f"{fqn}: {problem}"
    return StoredTensor(fqn, dtype, shape, lambda: tiling), None


def remembered_tensor(
    fqn: str, dtype: DType, shape: Shape, chunks: Callable[[], tuple[Chunk, ...]]
) -> StoredTensor:
    """A tensor whose `chunks` were found right before; they are made, and proved once more, when
    somebody first asks for them. That may raise what `chunks` raises, or ReadFault."""

    def tiling() -> tuple[tuple[Chunk, ...], _Node]:
        try:
            return _tiled(dtype, shape, chunks())
        except _BadTilingError as problem:
            raise ReadFault(f"{fqn} was remembered wrongly: {problem}") from None

    return StoredTensor(fqn, dtype, shape, tiling)


def _tiled(
    dtype: DType, shape: Shape, chunks: tuple[Chunk, ...]
) -> tuple[tuple[Chunk, ...], _Node]:
    """(those of `chunks` that hold elements, where to find them). Raises _BadTilingError."""
    _check_shape(shape, dtype)
    filled = tuple(chunk for chunk in chunks if 0 not in chunk.box.sizes)
    tree: _Node | None = _grid(filled, shape)
    for chunk in filled:
        if tree is None or not _is_whole_archive(chunk.span):
            _check_chunk(chunk, shape, dtype)
    if tree is None:
        _check_volume(filled, shape)
        tree = _build(filled, Box.whole(shape))
    return filled, tree


class _BadTilingError(Exception):
    pass


def _check_shape(shape: Shape, dtype: DType) -> None:
    possible = len(shape) <= MAX_DIMS and all(0 <= n < MAX_BYTES for n in shape)
    # An axis of zero does not excuse the others: NumPy cannot address such an array either.
    if not possible or math.prod(n or 1 for n in shape) * dtype.itemsize >= MAX_BYTES:
        raise _BadTilingError(f"shape {_numbers(shape)} is not possible")


def _check_chunk(chunk: Chunk, shape: Shape, dtype: DType) -> None:
    box, span = chunk.box, chunk.span
    if not box.within(shape):
        raise _BadTilingError(f"chunk {_show(box)} lies outside of shape {_numbers(shape)}")
    if _is_whole_archive(span):
        return
    strides = row_major_strides(box.sizes) if span.strides is None else span.strides
    signed = (span.offset, span.nbytes, span.skip, *strides)
    if min(signed) < 0 or len(strides) != len(box.sizes):
        raise _BadTilingError(f"chunk {_show(box)} has an impossible place in {span.path}")
    last = sum((n - 1) * s for n, s in zip(box.sizes, strides, strict=True))
    need = span.skip + (last + 1) * dtype.itemsize
    held = span.nbytes if span.encoding is None else span.encoding.nbytes
    if need > held:
        raise _BadTilingError(
            f"chunk {_show(box)} needs {need} bytes but {span.path} holds {held} for it"
        )


def _is_whole_archive(span: Span) -> bool:
    """Whether it is looked through when it is first read."""
    return span.kind == "torch_zip" and span.offset >= 0 and span.nbytes >= 0


def _check_volume(chunks: Sequence[Chunk], shape: Shape) -> None:
    have, wanted = sum(chunk.box.volume for chunk in chunks), math.prod(shape)
    if have != wanted:
        kind = "overlap" if have > wanted else "leave a gap"
        raise _BadTilingError(
            f"its {len(chunks)} chunks hold {have} elements but shape {_numbers(shape)} has "
            f"{wanted}: they {kind}"
        )


class _Node:
    """A box cut into slabs along one axis; found by bisection, so lookup never scans."""

    __slots__ = ("axis", "children", "starts")

    def __init__(self, axis: int, starts: list[int], children: list[_Node | Chunk]) -> None:
        self.axis, self.starts, self.children = axis, starts, children

    def overlapping(self, box: Box) -> Iterator[tuple[Chunk, Box]]:
        start = box.offsets[self.axis]
        stop = start + box.sizes[self.axis]
        for i in range(max(bisect_right(self.starts, start) - 1, 0), len(self.starts)):
            if self.starts[i] >= stop:
                return
            child = self.children[i]
            if isinstance(child, _Node):
                yield from child.overlapping(box)
            elif (part := child.box.intersect(box)) is not None:
                yield child, part


class _Scan(_Node):
    """Chunks that no cut separates (a pinwheel): rare and few, looked through one by one."""

    __slots__ = ()

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        super().__init__(0, [], list(chunks))

    def overlapping(self, box: Box) -> Iterator[tuple[Chunk, Box]]:
        for child in self.children:
            assert isinstance(child, Chunk)
            if (part := child.box.intersect(box)) is not None:
                yield child, part


class _Grid(_Node):
    """As many chunks on each axis wherever one looks, as nearly all ways of sharding make them."""

    __slots__ = ("_cells", "_cuts")

    def __init__(
        self, cuts: list[list[int]], cells: NDArray[np.int64], chunks: Sequence[Chunk]
    ) -> None:
        super().__init__(0, [], list(chunks))
        self._cuts = cuts
        """On each axis, where slabs begin."""
        self._cells = cells
        """By slab on each axis, which chunk it is."""

    def overlapping(self, box: Box) -> Iterator[tuple[Chunk, Box]]:
        ranges = [
            slice(bisect_right(cuts, start) - 1, bisect_left(cuts, start + size))
            for cuts, start, size in zip(self._cuts, box.offsets, box.sizes, strict=True)
        ]
        for number in self._cells[tuple(ranges)].flat:
            chunk = self.children[number]
            assert isinstance(chunk, Chunk)
            if (part := chunk.box.intersect(box)) is not None:
                yield chunk, part


def _grid(chunks: Sequence[Chunk], shape: Shape) -> _Grid | None:
    """The grid that `chunks` are, if there are so many that it pays to look, and they tile `shape`
    as one: then each lies in it, and there is no gap and no overlap."""
    if len(chunks) < MIN_GRID or not shape:
        return None
    try:
        offsets = np.array([chunk.box.offsets for chunk in chunks], np.int64)
        sizes = np.array([chunk.box.sizes for chunk in chunks], np.int64)
    except (ValueError, OverflowError):  # not as many numbers in each, or no numbers of a file
        return None
    if offsets.shape != (len(chunks), len(shape)) or sizes.shape != offsets.shape:
        return None
    cuts, numbers = [], []
    for axis, length in enumerate(shape):
        starts, number = np.unique(offsets[:, axis], return_inverse=True)
        if starts[0] != 0 or starts[-1] >= length:
            return None
        if (sizes[:, axis] != np.diff(starts, append=length)[number]).any():
            return None
        cuts.append(starts.tolist())
        numbers.append(number)
    counts = tuple(map(len, cuts))
    if math.prod(counts) != len(chunks):
        return None
    cells = np.full(counts, -1, np.int64)
    cells[tuple(numbers)] = np.arange(len(chunks))
    return None if (cells < 0).any() else _Grid(cuts, cells, chunks)


def _build(chunks: Sequence[Chunk], region: Box) -> _Node:
    node = _node(chunks, region, 0, 0)
    return _Scan([node]) if isinstance(node, Chunk) else node


def _node(chunks: Sequence[Chunk], region: Box, first_axis: int, depth: int) -> _Node | Chunk:
    """Tree over `chunks`, which lie in `region` and should tile it.

    Raises if two of them overlap. As their volumes add up, no overlap means no gap.
    """
    if len(chunks) == 1:
        if chunks[0].box != region:
            raise _BadTilingError(f"chunk {_show(chunks[0].box)} does not fill {_show(region)}")
        return chunks[0]
    ndim = len(region.sizes)
    if depth < MAX_DEPTH:
        for axis in [(first_axis + step) % ndim for step in range(ndim)]:
            slabs = _slabs(chunks, axis)
            if len(slabs) > 1:
                return _slab_node(slabs, region, axis, depth)
    return _scan(chunks)


def _slabs(chunks: Sequence[Chunk], axis: int) -> list[tuple[int, int, list[Chunk]]]:
    """`chunks` in as many slabs (start, stop, members) as cuts across `axis` make that cut no
    chunk in two."""
    slabs: list[tuple[int, int, list[Chunk]]] = []
    start = stop = -1
    members: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.box.offsets[axis]):
        offset = chunk.box.offsets[axis]
        if offset >= stop:
            if members:
                slabs.append((start, stop, members))
            start, members = offset, []
        members.append(chunk)
        end = offset + chunk.box.sizes[axis]
        if end > stop:
            stop = end
    if members:
        slabs.append((start, stop, members))
    return slabs


def _slab_node(
    slabs: list[tuple[int, int, list[Chunk]]], region: Box, axis: int, depth: int
) -> _Node:
    starts, children = [], []
    for start, stop, members in slabs:
        slab = Box(
            (*region.offsets[:axis], start, *region.offsets[axis + 1 :]),
            (*region.sizes[:axis], stop - start, *region.sizes[axis + 1 :]),
        )
        starts.append(start)
        children.append(_node(members, slab, axis + 1, depth + 1))
    return _Node(axis, starts, children)


def _scan(chunks: Sequence[Chunk]) -> _Scan:
    """Chunks that cannot be told apart by cuts. Raises if two share elements, or if they are more
    than any way of sharding produces: comparing all with all would never end."""
    if len(chunks) > MAX_SCAN:
        raise _BadTilingError(f"{len(chunks)} of its chunks overlap or interlock")
    starts = np.array([chunk.box.offsets for chunk in chunks], np.int64)
    stops = starts + np.array([chunk.box.sizes for chunk in chunks], np.int64)
    for i in range(len(chunks) - 1):
        meets = (starts[i + 1 :] < stops[i]) & (stops[i + 1 :] > starts[i])
        found = np.flatnonzero(meets.all(axis=1))
        if found.size:
            other = chunks[i + 1 + int(found[0])]
            raise _BadTilingError(f"chunks {_show(chunks[i].box)} and {_show(other.box)} overlap")
    return _Scan(chunks)


def _show(box: Box) -> str:
    return f"at {_numbers(box.offsets)} of size {_numbers(box.sizes)}"


def _numbers(values: Shape) -> str:
    """As a list; numbers that no file could mean are not spelled out."""
    shown = (str(n) if abs(n) < 1 << 64 else "a number beyond 64 bits" for n in values)
    return f"[{', '.join(shown)}]"
