"""The view algebra against eager NumPy and torch: any graph, any chunking, any box, any strides."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import EllipsisType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcorefs.arithmetic import Add
from mcorefs.boxes import Box, Shape
from mcorefs.dtypes import BF16, BY_NAME, F16, F32, DType
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
    Zeros,
    leaves,
    moves_only,
    to,
)
from tests.graphs import Memory, assert_same, graphs, torch_added, torch_cast
from tests.tilings import boxes

FLOATS = [dtype for dtype in BY_NAME.values() if dtype.is_float]
CAST_TO = [dtype for dtype in FLOATS if dtype.itemsize > 1]


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


def test_zeros_are_read_from_nothing() -> None:
    view = Zeros((3, 5), BY_NAME["F32"])
    out = np.full((2, 5), 7, view.dtype.carrier)
    view.read_into(Box((1, 0), (2, 5)), out, Memory().leaf)
    assert not out.any()
    assert not list(leaves(view))
    assert not moves_only(view)


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


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("other", [1.0, -1.0, 1 / 3])
def test_sums_are_bit_equal_with_torch(dtype: DType, other: float) -> None:
    memory = Memory()
    bits = telling_bits(dtype)
    tensor = memory.add(dtype, bits.shape, [Box.whole(bits.shape)])
    memory.arrays[tensor] = bits
    view = Add(Stored(tensor), other)
    assert not moves_only(view)
    assert_same(whole(view, memory.leaf), torch_added(bits, dtype, other), dtype, cast=True)


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
        lambda v: Add(_some(BY_NAME["I32"], (2,)), 1.0),
        lambda v: To(v, BY_NAME["F8_E4M3"]),
    ],
)
def test_impossible_nodes_are_refused(make: Callable[[View], View]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        make(_some(BF16, (4, 6)))


def test_rows_in_turns_are_read_without_a_copy_of_all() -> None:
    """Gate and up rows of gpt-oss: each half goes straight into every other place."""
    memory = Memory()
    tensor = memory.add(BF16, (12, 5), [Box.whole((12, 5))])
    view = Flatten(Permute(Unflatten(Stored(tensor), 0, (2, 6)), (2, 1, 0)), 1, 2)
    out = np.empty((5, 12), BF16.carrier)
    parts: list[Array] = []
    view.read_into(Box.whole(view.shape), out, lambda *asked: parts.append(asked[2]))
    assert len(parts) == 2
    assert all(np.shares_memory(part, out) for part in parts)
