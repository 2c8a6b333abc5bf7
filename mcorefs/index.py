"""What a checkpoint holds: stored tensors, each a set of chunks that tile it exactly.

Formats build these from metadata alone; nothing here reads tensor data.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mcorefs.boxes import Box, Shape
from mcorefs.dtypes import DType

MAX_DIMS = 8


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
    chunks: tuple[Chunk, ...] = field(repr=False)
    _tree: _Node = field(repr=False)

    def overlapping(self, box: Box) -> Iterator[tuple[Chunk, Box]]:
        """Chunks that hold elements of `box`, each with the part of `box` that it holds."""
        if box.volume:
            yield from self._tree.overlapping(box)


def stored_tensor(
    fqn: str, dtype: DType, shape: Shape, chunks: tuple[Chunk, ...]
) -> tuple[StoredTensor | None, str | None]:
    """The tensor, or what is wrong with its chunks (gap, overlap, out of bounds): one is None."""
    if len(shape) > MAX_DIMS or any(n < 0 for n in shape):
        return None, f"{fqn}: shape {list(shape)} is not possible"
    filled = tuple(chunk for chunk in chunks if 0 not in chunk.box.sizes)
    for chunk in filled:
        if not chunk.box.within(shape):
            return None, f"{fqn}: chunk {_show(chunk.box)} lies outside of shape {list(shape)}"
    whole = Box.whole(shape)
    have = sum(chunk.box.volume for chunk in filled)
    if have != whole.volume:
        kind = "overlap" if have > whole.volume else "leave a gap"
        return None, (
            f"{fqn}: its {len(filled)} chunks hold {have} elements but shape {list(shape)} has "
            f"{whole.volume}: they {kind}"
        )
    try:
        tree = _build(filled, whole)
    except _BadTilingError as problem:
        return None, f"{fqn}: {problem}"
    return StoredTensor(fqn, dtype, shape, filled, tree), None


class _BadTilingError(Exception):
    pass


class _Node:
    """A box cut into slabs along one axis; found by bisection, so lookup never scans."""

    __slots__ = ("axis", "children", "starts", "stops")

    def __init__(
        self, axis: int, starts: list[int], stops: list[int], children: list[_Node | Chunk]
    ) -> None:
        self.axis, self.starts, self.stops, self.children = axis, starts, stops, children

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
    """Chunks that no axis separates (a pinwheel): rare and few, looked through one by one."""

    def overlapping(self, box: Box) -> Iterator[tuple[Chunk, Box]]:
        for child in self.children:
            assert isinstance(child, Chunk)
            if (part := child.box.intersect(box)) is not None:
                yield child, part


def _build(chunks: tuple[Chunk, ...], region: Box) -> _Node:
    node = _node(list(chunks), region, 0)
    if isinstance(node, Chunk):
        return _Scan(0, [], [], [node])
    return node


def _node(chunks: list[Chunk], region: Box, first_axis: int) -> _Node | Chunk:
    """Tree over `chunks`, which must tile `region`; their volumes are known to add up."""
    if len(chunks) == 1:
        if chunks[0].box != region:
            raise _BadTilingError(f"chunk {_show(chunks[0].box)} does not fill {_show(region)}")
        return chunks[0]
    ndim = len(region.sizes)
    for step in range(ndim):
        axis = (first_axis + step) % ndim
        slabs: dict[tuple[int, int], list[Chunk]] = {}
        for chunk in chunks:
            slabs.setdefault((chunk.box.offsets[axis], chunk.box.sizes[axis]), []).append(chunk)
        if len(slabs) > 1 and _tiles_axis(slabs, region, axis):
            return _slab_node(slabs, region, axis)
    _refuse_overlap(chunks)
    return _Scan(0, [], [], list(chunks))


def _tiles_axis(slabs: dict[tuple[int, int], list[Chunk]], region: Box, axis: int) -> bool:
    """Whether the slabs follow each other along `axis` without gap or overlap."""
    at = region.offsets[axis]
    for offset, size in sorted(slabs):
        if offset != at:
            return False
        at += size
    return at == region.offsets[axis] + region.sizes[axis]


def _slab_node(slabs: dict[tuple[int, int], list[Chunk]], region: Box, axis: int) -> _Node:
    starts, stops, children = [], [], []
    for (offset, size), members in sorted(slabs.items(), key=lambda item: item[0]):
        slab = Box(
            (*region.offsets[:axis], offset, *region.offsets[axis + 1 :]),
            (*region.sizes[:axis], size, *region.sizes[axis + 1 :]),
        )
        starts.append(offset)
        stops.append(offset + size)
        children.append(_node(members, slab, axis + 1))
    return _Node(axis, starts, stops, children)


def _refuse_overlap(chunks: list[Chunk]) -> None:
    """Raise if two chunks share elements; with equal volumes, no overlap means no gap."""
    ordered = sorted(chunks, key=lambda chunk: chunk.box.offsets)
    for i, chunk in enumerate(ordered):
        end = chunk.box.offsets[0] + chunk.box.sizes[0] if chunk.box.sizes else 1
        for other in ordered[i + 1 :]:
            if other.box.offsets and other.box.offsets[0] >= end:
                break
            if chunk.box.intersect(other.box) is not None:
                raise _BadTilingError(f"chunks {_show(chunk.box)} and {_show(other.box)} overlap")


def _show(box: Box) -> str:
    return (
        "[" + ", ".join(f"{o}:{o + s}" for o, s in zip(box.offsets, box.sizes, strict=True)) + "]"
    )
