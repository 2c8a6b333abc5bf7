"""Random expressions over stored tensors, each beside its value by eager NumPy and torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from mcorefs.arithmetic import Add
from mcorefs.boxes import Box, Shape
from mcorefs.dtypes import BF16, BY_NAME, F16, F32, DType
from mcorefs.index import Chunk, StoredTensor, stored_tensor
from mcorefs.views import (
    Array,
    Cat,
    Flatten,
    Narrow,
    Permute,
    Select,
    Stack,
    Stored,
    To,
    Unflatten,
    View,
)
from tests.tilings import raw_chunks, shapes, tilings

MAX_VOLUME = 4000


class Memory:
    """Stored tensors with their elements in memory, and a leaf that insists on its contract."""

    def __init__(self) -> None:
        self.arrays: dict[StoredTensor, Array] = {}

    def store(self, array: Array, dtype: DType, tiles: list[Box]) -> tuple[Chunk, ...]:
        """Chunks for `tiles` of `array`: here they lie nowhere."""
        return raw_chunks(tiles, dtype.itemsize)

    def add(self, dtype: DType, shape: Shape, tiles: list[Box]) -> StoredTensor:
        rng = np.random.default_rng(len(self.arrays))
        raw = rng.integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
        array = raw.view(dtype.carrier).reshape(shape)
        tensor, problem = stored_tensor("t", dtype, shape, self.store(array, dtype, tiles))
        assert tensor is not None, problem
        self.arrays[tensor] = array
        return tensor

    def leaf(self, tensor: StoredTensor, box: Box, out: Array) -> None:
        assert box.within(tensor.shape)
        assert out.shape == box.sizes
        assert out.dtype == tensor.dtype.carrier
        for chunk, part in tensor.overlapping(box):
            local = self.arrays[tensor][chunk.box.slices()]
            out[part.relative_to(box.offsets).slices()] = local[
                part.relative_to(chunk.box.offsets).slices()
            ]


@st.composite
def graphs(draw: st.DrawFn, memory: Memory) -> tuple[View, Array]:
    """A random expression, and its value by eager NumPy."""
    view, value = draw(stored(memory))
    for _ in range(draw(st.integers(0, 6))):
        possible = [step for step in STEPS if step.possible(view)]
        view, value = draw(st.sampled_from(possible)).draw(draw, memory, view, value)
    return view, value


@st.composite
def stored(
    draw: st.DrawFn, memory: Memory, shape: Shape | None = None, dtype: DType | None = None
) -> tuple[View, Array]:
    if shape is None:
        shape = draw(shapes())
        if draw(st.integers(0, 9)) == 0:
            axis = draw(st.integers(0, len(shape)))
            shape = (*shape[:axis], 0, *shape[axis:])
    chosen = draw(st.sampled_from([BF16, F32, BY_NAME["U8"]])) if dtype is None else dtype
    tensor = memory.add(chosen, shape, draw(tilings(shape)))
    return Stored(tensor), memory.arrays[tensor]


class Step:
    """One node drawn on top of a view, beside what NumPy makes of it."""

    def __init__(
        self,
        possible: Callable[[View], bool],
        draw: Callable[[st.DrawFn, Memory, View, Array], tuple[View, Array]],
    ) -> None:
        self.possible, self.draw = possible, draw


def _axis(draw: st.DrawFn, view: View) -> int:
    return draw(st.integers(0, len(view.shape) - 1))


def _narrow(draw: st.DrawFn, _: Memory, view: View, value: Array) -> tuple[View, Array]:
    axis = _axis(draw, view)
    start = draw(st.integers(0, view.shape[axis]))
    length = draw(st.integers(0, view.shape[axis] - start))
    where = (slice(None),) * axis + (slice(start, start + length),)
    return Narrow(view, axis, start, length), value[where]


def _select(draw: st.DrawFn, _: Memory, view: View, value: Array) -> tuple[View, Array]:
    axis = draw(st.sampled_from([axis for axis, n in enumerate(view.shape) if n]))
    index = draw(st.integers(0, view.shape[axis] - 1))
    return Select(view, axis, index), np.asarray(value.take(index, axis))


def _unflatten(draw: st.DrawFn, _: Memory, view: View, value: Array) -> tuple[View, Array]:
    axis = _axis(draw, view)
    n = view.shape[axis]
    divisors = [d for d in range(1, n + 1) if n % d == 0] or [1, 2]
    first = draw(st.sampled_from(divisors))
    sizes = draw(st.permutations((first, n // first, *([1] if draw(st.booleans()) else []))))
    shape = (*view.shape[:axis], *sizes, *view.shape[axis + 1 :])
    return Unflatten(view, axis, tuple(sizes)), value.reshape(shape)


def _flatten(draw: st.DrawFn, _: Memory, view: View, value: Array) -> tuple[View, Array]:
    axis = _axis(draw, view)
    count = draw(st.integers(1, len(view.shape) - axis))
    merged = math.prod(view.shape[axis : axis + count])
    shape = (*view.shape[:axis], merged, *view.shape[axis + count :])
    return Flatten(view, axis, count), value.reshape(shape)


def _permute(draw: st.DrawFn, _: Memory, view: View, value: Array) -> tuple[View, Array]:
    dims = tuple(draw(st.permutations(range(len(view.shape)))))
    return Permute(view, dims), value.transpose(dims)


def _cat(draw: st.DrawFn, memory: Memory, view: View, value: Array) -> tuple[View, Array]:
    axis = _axis(draw, view)
    length = draw(st.integers(0, 3))
    shape = (*view.shape[:axis], length, *view.shape[axis + 1 :])
    parts = draw(st.permutations([(view, value), draw(stored(memory, shape, view.dtype))]))
    return Cat(tuple(v for v, _ in parts), axis), np.concatenate([a for _, a in parts], axis)


def _stack(draw: st.DrawFn, memory: Memory, view: View, value: Array) -> tuple[View, Array]:
    axis = draw(st.integers(0, len(view.shape)))
    others = [draw(stored(memory, view.shape, view.dtype)) for _ in range(draw(st.integers(0, 2)))]
    parts = draw(st.permutations([(view, value), *others]))
    return Stack(tuple(v for v, _ in parts), axis), np.stack([a for _, a in parts], axis)


def _to(draw: st.DrawFn, _: Memory, view: View, value: Array) -> tuple[View, Array]:
    dtype = draw(st.sampled_from([BF16, F16, F32]))
    return To(view, dtype), torch_cast(value, view.dtype, dtype)


def _has_axes(view: View) -> bool:
    return 0 < len(view.shape) < 7


def _add(draw: st.DrawFn, _: Memory, view: View, value: Array) -> tuple[View, Array]:
    other = draw(st.sampled_from([1.0, -1.0, 0.1]))
    return Add(view, other), torch_added(value, view.dtype, other)


STEPS = [
    Step(_has_axes, _narrow),
    Step(lambda view: any(view.shape), _select),
    Step(_has_axes, _unflatten),
    Step(_has_axes, _flatten),
    Step(lambda view: True, _permute),
    Step(lambda view: _has_axes(view) and math.prod(view.shape) < MAX_VOLUME, _cat),
    Step(lambda view: len(view.shape) < 7 and math.prod(view.shape) < MAX_VOLUME, _stack),
    Step(lambda view: view.dtype.is_float, _to),
    Step(lambda view: view.dtype in (BF16, F16, F32), _add),
]


def torch_cast(value: Array, source: DType, target: DType) -> Array:
    """`value` (a carrier) cast by torch."""
    cast = _tensor(value, source).to(getattr(torch, target.torch))
    return cast.view(torch.uint8).numpy().view(target.carrier).reshape(value.shape)


def torch_added(value: Array, dtype: DType, other: float) -> Array:
    """`value` (a carrier) with `other` added by torch."""
    values = _tensor(value, dtype)
    total = (values.float() + other).to(values.dtype)
    return total.view(torch.uint8).numpy().view(dtype.carrier).reshape(value.shape)


def _tensor(value: Array, dtype: DType) -> Tensor:
    bits = torch.from_numpy(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    return bits.view(getattr(torch, dtype.torch))


def assert_same(found: Array, wanted: Array, dtype: DType, cast: bool) -> None:
    """Equal bits; what went through a cast may differ in which nan it is."""
    if cast and dtype.is_float:
        with np.errstate(invalid="ignore"):
            nan = np.isnan(found.view(dtype.values))
            np.testing.assert_array_equal(nan, np.isnan(wanted.view(dtype.values)))
        found, wanted = found[~nan], wanted[~nan]
    np.testing.assert_array_equal(found, wanted)
