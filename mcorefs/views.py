"""The view algebra: a Hugging Face tensor as an expression over stored tensors.

A view knows its shape and dtype and how to fill a box of itself: it pushes the *box* down to its
sources and hands on a NumPy view of the caller's buffer, so the only copy happens at the leaf.
Nodes are named as in torch. Pure: no I/O, no state; the leaf that reads is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mcorefs.boxes import Box, Shape, flat_range_boxes
from mcorefs.dtypes import DType
from mcorefs.index import StoredTensor

Array = NDArray[Any]
Leaf = Callable[[StoredTensor, Box, Array], None]
"""leaf(tensor, box, out): fill `out` (any strides, carrier dtype, shape box.sizes) with the box."""


class View(Protocol):
    """An expression over stored tensors; immutable."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def sources(self) -> tuple[View, ...]:
        """The views this one is made of; none for a stored tensor."""
        ...

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        """Fill `out` (shape box.sizes, dtype.carrier, any strides) with the elements of `box`."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as the checkpoint holds it."""

    tensor: StoredTensor

    @property
    def shape(self) -> Shape:
        return self.tensor.shape

    @property
    def dtype(self) -> DType:
        return self.tensor.dtype

    @property
    def sources(self) -> tuple[View, ...]:
        return ()

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        leaf(self.tensor, box, out)


@dataclass(frozen=True, slots=True)
class _Unary:
    source: View

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def sources(self) -> tuple[View, ...]:
        return (self.source,)


@dataclass(frozen=True, slots=True)
class Narrow(_Unary):
    """Elements [start, start + length) along `axis`."""

    axis: int
    start: int
    length: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.start + self.length <= self.source.shape[self.axis]:
            raise ValueError(f"narrow {self.start}+{self.length} of {self.source.shape}")

    @property
    def shape(self) -> Shape:
        return _replace(self.source.shape, self.axis, self.length)

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        offsets = _replace(box.offsets, self.axis, box.offsets[self.axis] + self.start)
        self.source.read_into(Box(offsets, box.sizes), out, leaf)


@dataclass(frozen=True, slots=True)
class Select(_Unary):
    """Index `index` of `axis`; the axis goes."""

    axis: int
    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.source.shape[self.axis]:
            raise ValueError(f"select {self.index} of {self.source.shape}")

    @property
    def shape(self) -> Shape:
        return self.source.shape[: self.axis] + self.source.shape[self.axis + 1 :]

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        offsets = (*box.offsets[: self.axis], self.index, *box.offsets[self.axis :])
        sizes = (*box.sizes[: self.axis], 1, *box.sizes[self.axis :])
        self.source.read_into(Box(offsets, sizes), np.expand_dims(out, self.axis), leaf)


@dataclass(frozen=True, slots=True)
class Unflatten(_Unary):
    """`axis` seen as several axes of `sizes`."""

    axis: int
    sizes: Shape

    def __post_init__(self) -> None:
        if math.prod(self.sizes) != self.source.shape[self.axis]:
            raise ValueError(f"unflatten {self.source.shape} axis {self.axis} to {self.sizes}")

    @property
    def shape(self) -> Shape:
        return _splice(self.source.shape, self.axis, 1, self.sizes)

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        axis, count = self.axis, len(self.sizes)
        inner = Box(box.offsets[axis : axis + count], box.sizes[axis : axis + count])
        for where, start, length in _flat_runs(self.sizes, inner):
            part = out[(slice(None),) * axis + where]
            shape = _splice(box.sizes, axis, count, (length,))
            offsets = _splice(box.offsets, axis, count, (start,))
            merged = _merged(part, shape)
            if merged is not None:
                self.source.read_into(Box(offsets, shape), merged, leaf)
            else:
                whole = np.empty(shape, out.dtype)
                self.source.read_into(Box(offsets, shape), whole, leaf)
                part[...] = whole.reshape(part.shape)


@dataclass(frozen=True, slots=True)
class Flatten(_Unary):
    """Axes [axis, axis + count) seen as one."""

    axis: int
    count: int

    @property
    def shape(self) -> Shape:
        end = self.axis + self.count
        return _splice(
            self.source.shape,
            self.axis,
            self.count,
            (math.prod(self.source.shape[self.axis : end]),),
        )

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        axis = self.axis
        inner = self.source.shape[axis : axis + self.count]
        start, length = box.offsets[axis], box.sizes[axis]
        at = 0
        for piece in flat_range_boxes(inner, start, start + length):
            where = (slice(None),) * axis + (slice(at, at + piece.volume),)
            at += piece.volume
            offsets = _splice(box.offsets, axis, 1, piece.offsets)
            sizes = _splice(box.sizes, axis, 1, piece.sizes)
            # Cutting one axis in several is always a view, whatever the strides.
            self.source.read_into(Box(offsets, sizes), out[where].reshape(sizes), leaf)


@dataclass(frozen=True, slots=True)
class Permute(_Unary):
    """Axes in the order `dims`, as torch.permute."""

    dims: tuple[int, ...]

    @property
    def shape(self) -> Shape:
        return tuple(self.source.shape[d] for d in self.dims)

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        back = tuple(self.dims.index(axis) for axis in range(len(self.dims)))
        source = Box(tuple(box.offsets[i] for i in back), tuple(box.sizes[i] for i in back))
        self.source.read_into(source, out.transpose(back), leaf)


@dataclass(frozen=True, slots=True)
class Cat:
    """Views joined along an axis that they have."""

    sources: tuple[View, ...]
    axis: int

    def __post_init__(self) -> None:
        first = self.sources[0]
        for view in self.sources:
            if view.dtype != first.dtype or _replace(view.shape, self.axis, 0) != _replace(
                first.shape, self.axis, 0
            ):
                raise ValueError(f"cat of {[v.shape for v in self.sources]} on {self.axis}")

    @property
    def dtype(self) -> DType:
        return self.sources[0].dtype

    @property
    def shape(self) -> Shape:
        total = sum(view.shape[self.axis] for view in self.sources)
        return _replace(self.sources[0].shape, self.axis, total)

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        axis, at = self.axis, 0
        start, stop = box.offsets[axis], box.offsets[axis] + box.sizes[axis]
        for view in self.sources:
            length = view.shape[axis]
            low, high = max(start, at), min(stop, at + length)
            if low < high:
                part = Box(
                    _replace(box.offsets, axis, low - at), _replace(box.sizes, axis, high - low)
                )
                where = (slice(None),) * axis + (slice(low - start, high - start),)
                view.read_into(part, out[where], leaf)
            at += length


@dataclass(frozen=True, slots=True)
class Stack:
    """Views of one shape joined along a new axis."""

    sources: tuple[View, ...]
    axis: int

    def __post_init__(self) -> None:
        first = self.sources[0]
        if any(v.shape != first.shape or v.dtype != first.dtype for v in self.sources):
            raise ValueError(f"stack of {[v.shape for v in self.sources]}")

    @property
    def dtype(self) -> DType:
        return self.sources[0].dtype

    @property
    def shape(self) -> Shape:
        return _splice(self.sources[0].shape, self.axis, 0, (len(self.sources),))

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        axis = self.axis
        inner = Box(_splice(box.offsets, axis, 1, ()), _splice(box.sizes, axis, 1, ()))
        for i in range(box.sizes[axis]):
            where = (slice(None),) * axis + (i,)
            self.sources[box.offsets[axis] + i].read_into(inner, out[where], leaf)


@dataclass(frozen=True, slots=True)
class To:
    """The values of `source` as another float dtype, rounded to nearest even."""

    source: View
    dtype: DType

    def __post_init__(self) -> None:
        if not (self.dtype.is_float and self.source.dtype.is_float):
            raise ValueError(f"to {self.dtype.name} from {self.source.dtype.name}")

    @property
    def shape(self) -> Shape:
        return self.source.shape

    @property
    def sources(self) -> tuple[View, ...]:
        return (self.source,)

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        have = np.empty(box.sizes, self.source.dtype.carrier)
        self.source.read_into(box, have, leaf)
        with np.errstate(over="ignore", invalid="ignore"):  # overflow becomes inf, as in torch
            cast = have.view(self.source.dtype.values).astype(self.dtype.values)
        out[...] = cast.view(self.dtype.carrier)


def to(view: View, dtype: DType) -> View:
    """`view` as `dtype`: itself where it is that already."""
    return view if view.dtype == dtype else To(view, dtype)


def leaves(view: View) -> Iterator[StoredTensor]:
    """The stored tensors that `view` reads from."""
    if isinstance(view, Stored):
        yield view.tensor
    for source in view.sources:
        yield from leaves(source)


def moves_only(view: View) -> bool:
    """Whether the bytes of `view` are bytes of its stored tensors, only arranged anew."""
    return not isinstance(view, To) and all(moves_only(source) for source in view.sources)


def _replace(values: Shape, axis: int, value: int) -> Shape:
    return (*values[:axis], value, *values[axis + 1 :])


def _splice(values: Shape, axis: int, count: int, new: Shape) -> Shape:
    return (*values[:axis], *new, *values[axis + count :])


def _merged(part: Array, shape: Shape) -> Array | None:
    """`part` reshaped to `shape` if NumPy can do it without copying."""
    merged = part.reshape(shape)
    return merged if np.may_share_memory(merged, part) else None


def _flat_runs(sizes: Shape, box: Box) -> Iterator[tuple[tuple[slice | int, ...], int, int]]:
    """Runs of the flattened axis that make up `box` of axes `sizes`.

    Yields (index into the box, start in the flattened axis, length). A run spans as many trailing
    axes as the box covers whole.
    """
    split = len(sizes) - 1
    while split > 0 and box.sizes[split] == sizes[split]:
        split -= 1
    run = math.prod(box.sizes[split:])
    lead = box.sizes[:split]
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    base = sum(o * s for o, s in zip(box.offsets, strides, strict=True))
    for index in np.ndindex(*lead):
        start = base + sum(i * s for i, s in zip(index, strides, strict=False))
        yield (*index, *(slice(None),) * (len(sizes) - split)), start, run
