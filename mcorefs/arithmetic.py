"""Views that calculate with values: weights that training kept in parts, or around zero."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mcorefs.boxes import Box, Shape
from mcorefs.dtypes import BF16, F16, F32, DType
from mcorefs.views import Array, Computed, Elementwise, Leaf, View

FLOATS = (BF16, F16, F32)
"""Dtypes that are calculated with."""
_BLOCK = (64, 4096)
"""Rows and columns calculated at a time: few enough to stay in the processor's cache."""
_ONE_THREAD = 1 << 18
"""Multiplications up to which OpenBLAS takes no threads of its own (interface/gemm.c): those who
read are threads enough, and more of them only wait for each other."""


@dataclass(frozen=True, slots=True)
class Addmm(Computed):
    """`source` + alpha * (mat1 @ mat2), in the dtype of `source`: a weight with its LoRA adapter.

    Rounded as torch does where both matrices are `product`: mat1 @ mat2 to `product`, that times
    alpha to `product`, and the sum, taken in float32, to the dtype of `source`. Within mat1 @ mat2
    sums are float64, whose roundings the later ones hide: the bits do not show in which order they
    were taken, nor by which machine, nor for which box. Of a box it reads the same rows of mat1 and
    the same columns of mat2.
    """

    source: View
    mat1: View
    mat2: View
    alpha: float
    product: DType

    def __post_init__(self) -> None:
        shapes = [view.shape for view in (self.source, self.mat1, self.mat2)]
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"addmm of {shapes}")
        (rows, columns), (height, rank), (depth, width) = shapes
        if (rows, columns, rank) != (height, width, depth):
            raise ValueError(f"addmm of {shapes}")
        used = (self.source.dtype, self.mat1.dtype, self.mat2.dtype, self.product)
        if any(dtype not in FLOATS for dtype in used):
            raise ValueError(f"addmm of {[dtype.name for dtype in used]}")

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def shape(self) -> Shape:
        return self.source.shape

    @property
    def sources(self) -> tuple[View, ...]:
        return self.source, self.mat1, self.mat2

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        self.source.read_into(box, out, leaf)
        (first, left), (rows, columns) = box.offsets, box.sizes
        rank = self.mat1.shape[1]
        mat1 = _read(self.mat1, Box((first, 0), (rows, rank)), leaf)
        mat2 = _read(self.mat2, Box((0, left), (rank, columns)), leaf)
        with np.errstate(over="ignore", invalid="ignore"):  # becomes inf or nan, as in torch
            for across in _cuts(columns, _BLOCK[1]):
                wide = _float64(mat2[:, across])
                for down in _cuts(rows, _BLOCK[0]):
                    part = out[down, across]
                    product = _matmul(_float64(mat1[down]), wide)
                    part[...] = self._added(np.ascontiguousarray(part), product)

    def _added(self, have: Array, product: Array) -> Array:
        """`have` (a carrier) with a block of the product (float64) added."""
        delta = _rounded(product.astype(np.float32), self.product)
        delta = _rounded(delta * np.float32(self.alpha), self.product)
        total = have.view(self.dtype.values).astype(np.float32) + delta
        return total.astype(self.dtype.values).view(self.dtype.carrier)


@dataclass(frozen=True, slots=True)
class Add(Elementwise):
    """`source` + `other`: (source.float() + other).to(source.dtype), bit for bit; of a view,
    other.float()."""

    source: View
    other: float | View

    def __post_init__(self) -> None:
        for view in self.sources:
            if view.dtype not in FLOATS:
                raise ValueError(f"add to {view.dtype.name}")
            if view.shape != self.shape:
                raise ValueError(f"add of {self.shape} and {view.shape}")

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def shape(self) -> Shape:
        return self.source.shape

    @property
    def sources(self) -> tuple[View, ...]:
        return (self.source,) if isinstance(self.other, float) else (self.source, self.other)

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        values = _read(self.source, box, leaf).astype(np.float32)
        if isinstance(self.other, float):
            other: Array | np.float32 = np.float32(self.other)
        else:
            other = _read(self.other, box, leaf).astype(np.float32, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):  # becomes inf or nan, as in torch
            values += other
            total = values.astype(self.dtype.values)
        out[...] = total.view(self.dtype.carrier)


@dataclass(frozen=True, slots=True)
class Nothing(Computed):
    """What may be added to any value, and leaves its bits as they are: -0.0 throughout (0.0 would
    make another zero of -0.0)."""

    shape: Shape
    dtype: DType = F32

    @property
    def sources(self) -> tuple[View, ...]:
        return ()

    def read_into(self, box: Box, out: Array, leaf: Leaf) -> None:
        out[...] = 1 << (8 * self.dtype.itemsize - 1)


def _matmul(left: Array, right: Array) -> Array:
    """left @ right, in pieces for each of which BLAS takes one thread."""
    (rows, rank), columns = left.shape, right.shape[1]
    side = max(8, min(128, math.isqrt(_ONE_THREAD // max(rank, 1))))
    out = np.empty((rows, columns), left.dtype)
    for row, height, above in _pieces(rows, side):
        tall = left[row : row + height].reshape(-1, 1, above, rank)
        for column, width, beside in _pieces(columns, side):
            wide = right[:, column : column + width].reshape(rank, -1, beside).transpose(1, 0, 2)
            part = out[row : row + height, column : column + width]
            # Cutting axes is always a view.
            cut = part.reshape(height // above, above, width // beside, beside)
            np.matmul(tall, wide, out=cut.transpose(0, 2, 1, 3))
    return out


def _pieces(length: int, side: int) -> Iterator[tuple[int, int, int]]:
    """(start, length, length of a piece): what `side` divides, and the rest as one piece."""
    even = length // side * side
    if even:
        yield 0, even, side
    if length > even:
        yield even, length - even, length - even


def _read(view: View, box: Box, leaf: Leaf) -> Array:
    """Values of `view`."""
    have = np.empty(box.sizes, view.dtype.carrier)
    view.read_into(box, have, leaf)
    return have.view(view.dtype.values)


def _float64(values: Array) -> Array:
    # By way of float32, from which NumPy casts fast; it holds every value of these dtypes.
    return values.astype(np.float32).astype(np.float64)


def _rounded(values: Array, dtype: DType) -> Array:
    """`values`, which are float32, rounded to those of `dtype`."""
    return values if dtype == F32 else values.astype(dtype.values).astype(np.float32)


def _cuts(length: int, most: int) -> Iterator[slice]:
    """The pieces of at most `most` that [0, length) is cut into."""
    for start in range(0, length, most):
        yield slice(start, min(start + most, length))
