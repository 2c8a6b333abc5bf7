"""Boxes: half-open regions of elements of a tensor, the one geometry of every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """Elements with offsets[i] <= index[i] < offsets[i] + sizes[i]; a scalar has no axes."""

    offsets: Shape
    sizes: Shape

    @staticmethod
    def whole(shape: Shape) -> Box:
        """All elements of a tensor of `shape`."""
        return Box((0,) * len(shape), shape)

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def within(self, shape: Shape) -> bool:
        """Whether the box lies inside a tensor of `shape` (never negative, never beyond)."""
        if not len(self.offsets) == len(self.sizes) == len(shape):
            return False
        for o, s, n in zip(self.offsets, self.sizes, shape, strict=True):
            if o < 0 or s < 0 or o + s > n:
                return False
        return True

    def intersect(self, other: Box) -> Box | None:
        """The elements in both boxes, None if there are none."""
        offsets: list[int] = []
        sizes: list[int] = []
        axes = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        for o, s, p, t in axes:
            start = o if o > p else p
            size = min(o + s, p + t) - start
            if size <= 0:
                return None
            offsets.append(start)
            sizes.append(size)
        return Box(tuple(offsets), tuple(sizes))

    def relative_to(self, origin: Shape) -> Box:
        """The same elements counted from `origin`."""
        return Box(tuple(o - p for o, p in zip(self.offsets, origin, strict=True)), self.sizes)

    def slices(self) -> tuple[EllipsisType | slice, ...]:
        """Index expression for a view of this box of a NumPy array: a view even of a scalar."""
        return (..., *(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True)))


def row_major_strides(shape: Shape) -> Shape:
    """Strides in elements of a C-contiguous tensor of `shape`."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def flat_range_boxes(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """Boxes that make up elements [start, stop) of the row-major order, in that order.

    Each box is itself one contiguous range of that order; of n axes there are at most 2 * n - 1.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = math.prod(shape[1:])
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)
    if first == last:
        yield from _in_row(first, flat_range_boxes(shape[1:], head, tail))
        return
    if head:
        yield from _in_row(first, flat_range_boxes(shape[1:], head, inner))
        first += 1
    if first < last:
        rest = shape[1:]
        yield Box((first, *(0,) * len(rest)), (last - first, *rest))
    if tail:
        yield from _in_row(last, flat_range_boxes(shape[1:], 0, tail))


def _in_row(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    for box in boxes:
        yield Box((row, *box.offsets), (1, *box.sizes))
