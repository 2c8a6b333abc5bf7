"""The view algebra against eager NumPy and torch: any graph, any chunking, any box, any strides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import EllipsisType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcorefs.boxes import Box, Shape
from mcorefs.dtypes import BF16, BY_NAME, F16, F32, DType
from mcorefs.index import StoredTensor, stored_tensor
from mcorefs.views import (
    Array,
    Cat,
    Flatten,
    Leaf,
    Narrow,
    Permute,
    Select,
    Stack,
    Stored,
    To,
    Unflatten,
    View,
    leaves,
    moves_only,
    to,
)
from tests.tilings import boxes, raw_chunks, shapes, tilings

MAX_VOLUME = 4000
FLOATS = [dtype for dtype in BY_NAME.values() if dtype.is_float]
CAST_TO = [dtype for dtype in FLOATS if dtype.itemsize > 1]


class Memory:
    """Stored tensors whose elements are in memory, for a leaf that insists on its contract."""

    def __init__(self) -> None:
        self.arrays: dict[StoredTensor, Array] = {}

    def add(self, dtype: DType, shape: Shape, tiles: list[Box]) -> StoredTensor:
        tensor, problem = stored_tensor("t", dtype, shape, raw_chunks(tiles, dtype.itemsize))
        assert tensor is not None, problem
        rng = np.random.default_rng(len(self.arrays))
        self.arrays[tensor] = (
            rng.integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
            .view(dtype.carrier)
            .reshape(shape)
        )
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


STEPS = [
    Step(_has_axes, _narrow),
    Step(lambda view: any(view.shape), _select),
    Step(_has_axes, _unflatten),
    Step(_has_axes, _flatten),
    Step(lambda view: True, _permute),
    Step(lambda view: _has_axes(view) and math.prod(view.shape) < MAX_VOLUME, _cat),
    Step(lambda view: len(view.shape) < 7 and math.prod(view.shape) < MAX_VOLUME, _stack),
    Step(lambda view: view.dtype.is_float, _to),
]


def torch_cast(value: Array, source: DType, target: DType) -> Array:
    """`value` (a carrier) cast by torch."""
    bits = torch.from_numpy(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    cast = bits.view(getattr(torch, source.torch)).to(getattr(torch, target.torch))
    return cast.view(torch.uint8).numpy().view(target.carrier).reshape(value.shape)


def assert_same(found: Array, wanted: Array, dtype: DType, cast: bool) -> None:
    """Equal bits; what went through a cast may differ in which nan it is."""
    if cast and dtype.is_float:
        with np.errstate(invalid="ignore"):
            nan = np.isnan(found.view(dtype.values))
            np.testing.assert_array_equal(nan, np.isnan(wanted.view(dtype.values)))
        found, wanted = found[~nan], wanted[~nan]
    np.testing.assert_array_equal(found, wanted)


@st.composite
def outs(draw: st.DrawFn, sizes: Shape, dtype: DType) -> Array:
    """An array of `sizes` full of junk: contiguous, in another order of axes, every other element,
    or backwards."""
    order = draw(st.permutations(range(len(sizes))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, -1])) for _ in sizes]
    base = np.full([sizes[axis] * abs(steps[axis]) for axis in order], 0xA5, dtype.carrier)
    back = [order.index(axis) for axis in range(len(sizes))]
    every: list[slice | EllipsisType] = [slice(None, None, step) for step in steps]
    return base.transpose(back)[(..., *every)]


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_any_box_of_any_view_is_what_numpy_says(data: st.DataObject) -> None:
    memory = Memory()
    view, value = data.draw(graphs(memory))
    assert view.shape == value.shape
    assert view.dtype.carrier == value.dtype
    box = data.draw(boxes(view.shape)) if data.draw(st.booleans()) else Box.whole(view.shape)
    out = data.draw(outs(box.sizes, view.dtype))
    view.read_into(box, out, memory.leaf)
    assert_same(out, value[box.slices()], view.dtype, cast=not moves_only(view))
    assert set(leaves(view)) <= set(memory.arrays)


def whole(view: View, leaf: Leaf) -> Array:
    out = np.empty(view.shape, view.dtype.carrier)
    view.read_into(Box.whole(view.shape), out, leaf)
    return out


def telling_bits(dtype: DType) -> Array:
    """Every value of a small dtype; of a wide one every sign, exponent and kind of tie."""
    if dtype.itemsize <= 2:
        return np.arange(1 << 8 * dtype.itemsize, dtype=dtype.carrier)
    rng = np.random.default_rng(0)
    width = 8 * dtype.itemsize
    random = rng.integers(0, 1 << width, 200_000, dtype.carrier)
    unit = 1 << width - 16  # one step of the upper 16 bits, which are a bf16 where width is 32
    upper = np.arange(1 << 16, dtype=dtype.carrier) << (width - 16)
    ties = [upper | np.full_like(upper, low) for low in (1, unit // 2, unit // 2 + 1, unit - 1)]
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(dtype.values)
    exact = np.nan_to_num(halves, nan=0.0, posinf=0.0, neginf=0.0)
    between = (exact[1:] / 2 + exact[:-1] / 2).view(dtype.carrier)
    one = np.ones_like(between)
    return np.concatenate([random, upper, *ties, between, between + one, between - one])


@pytest.mark.parametrize(
    ("source", "target"),
    [pair for pair in itertools.product(FLOATS, CAST_TO) if pair[0] != pair[1]],
    ids=lambda dtype: dtype.name,
)
def test_casts_are_bit_equal_with_torch(source: DType, target: DType) -> None:
    memory = Memory()
    bits = telling_bits(source)
    tensor = memory.add(source, bits.shape, [Box.whole(bits.shape)])
    memory.arrays[tensor] = bits
    found = whole(To(Stored(tensor), target), memory.leaf)
    wanted = torch_cast(bits, source, target)
    assert_same(found, wanted, target, cast=True)
    values = wanted.view(target.values)
    assert np.isnan(values).any()
    assert np.isinf(values).any() or source.name == "F8_E4M3"


def test_to_of_the_same_dtype_is_the_view_itself() -> None:
    view = _some(BF16, (2,))
    assert to(view, BF16) is view
    assert moves_only(view)
    assert not moves_only(Select(to(view, F32), 0, 0))


def _some(dtype: DType, shape: Shape) -> View:
    return Stored(Memory().add(dtype, shape, [Box.whole(shape)]))


@pytest.mark.parametrize(
    "make",
    [
        lambda v: Narrow(v, 0, 2, 3),
        lambda v: Narrow(v, 0, -1, 2),
        lambda v: Narrow(v, 0, 1, -1),
        lambda v: Narrow(v, -1, 0, 1),
        lambda v: Narrow(v, 2, 0, 1),
        lambda v: Select(v, 0, 4),
        lambda v: Select(v, 0, -1),
        lambda v: Select(v, -1, 0),
        lambda v: Unflatten(v, 0, (3, 2)),
        lambda v: Unflatten(v, 0, (-2, -2)),
        lambda v: Unflatten(Narrow(v, 0, 0, 1), 0, ()),
        lambda v: Unflatten(v, -1, (3, 2)),
        lambda v: Flatten(v, 1, 2),
        lambda v: Flatten(v, 0, 0),
        lambda v: Flatten(v, -1, 1),
        lambda v: Permute(v, (0, 0)),
        lambda v: Permute(v, (0,)),
        lambda v: Permute(v, (-1, 0)),
        lambda v: Cat((), 0),
        lambda v: Cat((v, v), 2),
        lambda v: Cat((v, v), -1),
        lambda v: Cat((v, _some(BF16, (4, 5))), 0),
        lambda v: Cat((v, _some(F32, (4, 6))), 0),
        lambda v: Stack((), 0),
        lambda v: Stack((v, v), 3),
        lambda v: Stack((v, v), -1),
        lambda v: Stack((v, _some(BF16, (4, 5))), 0),
        lambda v: Stack((v, _some(F32, (4, 6))), 0),
        lambda v: To(_some(BY_NAME["I32"], (2,)), BF16),
        lambda v: To(v, BY_NAME["I32"]),
        lambda v: To(v, BY_NAME["F8_E4M3"]),
    ],
)
def test_impossible_nodes_are_refused(make: Callable[[View], View]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        make(_some(BF16, (4, 6)))
