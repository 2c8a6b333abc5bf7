"""The view algebra: a Hugging Face tensor as an expression over stored tensors.

A view knows its shape and dtype and how to fill a box of itself: it pushes the *box* down to its
sources and hands on a NumPy view of the caller's buffer, so the only copy happens at the leaf.
Nodes are named as in torch. Pure: no I/O, no state; the leaf that reads is the caller's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mcorefs.boxes import Box, Shape, flat_range_boxes
from mcorefs.dtypes import DType
from mcorefs.index import StoredTensor

_MOST_PARTS = 16
"""Parts that a box is read in, to save a copy of all of it."""

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


class Computed:
    """A node whose bytes are not those of its sources: it looks at values."""

    __slots__ = ()


class Elementwise(Computed):
    """A computed node each of whose elements is made of the one at its place in `sources`."""

    __slots__ = ()


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
    """Its shape and dtype are worked out once: a model has views by the ten thousand, and each is
    asked for them by whatever is above it."""

    source: View
    shape: Shape = field(init=False, repr=False, compare=False)
    dtype: DType = field(init=False, repr=False, compare=False)

    @property
    def sources(self) -> tuple[View, ...]:
        return (self.source,)

    def _note(self, shape: Shape) -> None:
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", self.source.dtype)


@dataclass(frozen=True, slots=True)
class Narrow(_Unary):
    """Elements [start, start + length) along `axis`."""

    axis: int
    start: int
    length: int

    def __post_init__(self) -> None:
        length = _length(self.source, self.axis)
        if not 0 <= self.start <= self.start + self.length <= length:
            raise ValueError(f"narrow {self.start}+{self.length} of {self.source.shape}")
        self._note(_replace(self.source.shape, self.axis, self.length))

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        offsets = _replace(box.offsets, self.axis, box.offsets[self.axis] + self.start)
        self.source.read_into(Box(offsets, box.sizes), out, leaf)


@dataclass(frozen=True, slots=True)
class Select(_Unary):
    """Index `index` of `axis`; the axis goes."""

    axis: int
    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < _length(self.source, self.axis):
            raise ValueError(f"select {self.index} of {self.source.shape}")
        shape = self.source.shape
        self._note(shape[: self.axis] + shape[self.axis + 1 :])

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        offsets = (*box.offsets[: self.axis], self.index, *box.offsets[self.axis :])
        sizes = (*box.sizes[: self.axis], 1, *box.sizes[self.axis :])
        again = out[(slice(None),) * self.axis + (None,)]
        self.source.read_into(Box(offsets, sizes), again, leaf)


@dataclass(frozen=True, slots=True)
class Unflatten(_Unary):
    """`axis` seen as several axes of `sizes`."""

    axis: int
    sizes: Shape

    def __post_init__(self) -> None:
        length = _length(self.source, self.axis)
        if not self.sizes or min(self.sizes) < 0 or math.prod(self.sizes) != length:
            raise ValueError(f"unflatten {self.source.shape} axis {self.axis} to {self.sizes}")
        self._note(_splice(self.source.shape, self.axis, 1, self.sizes))

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        if not box.volume:
            return
        axis, count = self.axis, len(self.sizes)
        inner = Box(box.offsets[axis : axis + count], box.sizes[axis : axis + count])
        for where, start, length in _flat_runs(self.sizes, inner):
            part = out[(slice(None),) * axis + where]
            shape = _splice(box.sizes, axis, count, (length,))
            run = Box(_splice(box.offsets, axis, count, (start,)), shape)
            end = axis + part.ndim - len(shape) + 1
            if _is_one_axis(part, axis, end):
                self.source.read_into(run, part.reshape(shape), leaf)
            elif part.shape[axis] <= _MOST_PARTS and _is_one_axis(part, axis + 1, end):
                for i, one in enumerate(np.moveaxis(part, axis, 0)):
                    count_of_one = length // part.shape[axis]
                    shape = _replace(shape, axis, count_of_one)
                    offsets = _replace(run.offsets, axis, start + i * count_of_one)
                    self.source.read_into(Box(offsets, shape), one.reshape(shape), leaf)
            else:
                whole = np.empty(shape, out.dtype)
                self.source.read_into(run, whole, leaf)
                part[...] = whole.reshape(part.shape)


@dataclass(frozen=True, slots=True)
class Flatten(_Unary):
    """Axes [axis, axis + count) seen as one."""

    axis: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.axis < self.axis + self.count <= len(self.source.shape):
            raise ValueError(f"flatten {self.axis}+{self.count} of {self.source.shape}")
        shape = self.source.shape
        length = math.prod(shape[self.axis : self.axis + self.count])
        self._note(_splice(shape, self.axis, self.count, (length,)))

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

    def __post_init__(self) -> None:
        if sorted(self.dims) != list(range(len(self.source.shape))):
            raise ValueError(f"permute {self.source.shape} to {self.dims}")
        self._note(tuple(self.source.shape[d] for d in self.dims))

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
        _check_alike(self.sources)
        _length(self.sources[0], self.axis)
        if len({_replace(view.shape, self.axis, 0) for view in self.sources}) > 1:
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
        _check_alike(self.sources)
        first = self.sources[0].shape
        if not 0 <= self.axis <= len(first) or any(v.shape != first for v in self.sources):
            raise ValueError(f"stack of {[v.shape for v in self.sources]} on {self.axis}")

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
            # The dots make it a view even where no axis is left.
            where: tuple[slice | int | EllipsisType, ...] = (*(slice(None),) * axis, i, ...)
            self.sources[box.offsets[axis] + i].read_into(inner, out[where], leaf)


@dataclass(frozen=True, slots=True)
class To(Elementwise):
    """The values of `source` as another float dtype, rounded to nearest even: the bits of
    torch.Tensor.to. A nan stays a nan; its other bits are not kept, and torch's own vary.

    Not to fp8, where libraries disagree on overflow and weights need scales anyway.
    """

    source: View
    dtype: DType

    def __post_init__(self) -> None:
        if not (self.dtype.is_float and self.source.dtype.is_float and self.dtype.itemsize > 1):
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
            values = have.view(self.source.dtype.values)
            if self.source.dtype.itemsize > 4 > self.dtype.itemsize:
                values = values.astype(np.float32)  # torch rounds twice: so do we
            cast = values.astype(self.dtype.values)
        out[...] = cast.view(self.dtype.carrier)


@dataclass(frozen=True, slots=True)
class Zeros(Computed):
    """What a checkpoint holds nothing of, since it is nothing but zeros."""

    shape: Shape
    dtype: DType

    @property
    def sources(self) -> tuple[View, ...]:
        return ()

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        out[...] = 0


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
    return not isinstance(view, Computed) and all(moves_only(source) for source in view.sources)


def elementwise(view: View) -> bool:
    """Whether each element of `view` is made of one element of its stored tensors."""
    plain = not isinstance(view, Computed) or isinstance(view, Elementwise)
    return plain and all(elementwise(source) for source in view.sources)


def _replace(values: Shape, axis: int, value: int) -> Shape:
    return (*values[:axis], value, *values[axis + 1 :])


def _splice(values: Shape, axis: int, count: int, new: Shape) -> Shape:
    return (*values[:axis], *new, *values[axis + count :])


def _length(view: View, axis: int) -> int:
    """Length of `axis`; ValueError where there is no such axis. None is counted from the end."""
    if not 0 <= axis < len(view.shape):
        raise ValueError(f"axis {axis} of {view.shape}")
    return view.shape[axis]


def _check_alike(sources: tuple[View, ...]) -> None:
    if len({view.dtype for view in sources}) != 1:
        raise ValueError(f"one dtype is needed, not {[view.dtype.name for view in sources]}")


def _is_one_axis(part: Array, start: int, end: int) -> bool:
    """Whether axes [start, end) of `part` can be seen as one without copying."""
    sides = zip(part.shape[start:end], part.strides[start:end], strict=True)
    long = [(size, stride) for size, stride in sides if size > 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in itertools.pairwise(long))


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
