from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mcorefs.boxes import Box, Shape, flat_range_boxes, row_major_strides
from tests.tilings import boxes, shapes


def elements(box: Box, shape: Shape) -> list[int]:
    """Row-major numbers of the elements of `box`."""
    numbers: list[int] = np.arange(math.prod(shape)).reshape(shape)[box.slices()].ravel().tolist()
    return numbers


@given(st.data(), shapes())
def test_flat_range_is_its_boxes_in_order(data: st.DataObject, shape: Shape) -> None:
    total = math.prod(shape)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    found = list(flat_range_boxes(shape, start, stop))
    assert [n for box in found for n in elements(box, shape)] == list(range(start, stop))
    assert all(box.within(shape) for box in found)
    assert len(found) <= max(1, 2 * len(shape) - 1)


@given(shapes(max_dims=3), st.integers(0, 3))
def test_flat_range_of_an_empty_tensor_is_empty(shape: Shape, axis: int) -> None:
    assert list(flat_range_boxes((*shape[:axis], 0, *shape[axis:]), 0, 0)) == []


@given(st.data(), shapes())
def test_intersection_is_that_of_the_elements(data: st.DataObject, shape: Shape) -> None:
    one, other = data.draw(boxes(shape)), data.draw(boxes(shape))
    common = set(elements(one, shape)) & set(elements(other, shape))
    found = one.intersect(other)
    assert set(elements(found, shape) if found else ()) == common
    assert found == other.intersect(one)


@given(st.data(), shapes())
def test_relative_box_selects_the_same_elements(data: st.DataObject, shape: Shape) -> None:
    outer = data.draw(boxes(shape))
    inner = data.draw(boxes(outer.sizes))
    moved = Box(tuple(map(sum, zip(outer.offsets, inner.offsets, strict=True))), inner.sizes)
    assert moved.within(shape)
    assert moved.relative_to(outer.offsets) == inner
    array = np.arange(math.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(array[moved.slices()], array[outer.slices()][inner.slices()])


def test_within_refuses_negative_numbers_other_ranks_and_ends_beyond() -> None:
    assert Box((1, 0), (2, 0)).within((3, 4))
    assert Box((), ()).within(())
    for box in [
        Box((-1, 0), (2, 1)),
        Box((2, 0), (2, 1)),
        Box((4, 0), (-1, 1)),
        Box((0,), (1,)),
        Box((0, 0, 0), (1, 1, 1)),
        Box((0, 0), (1,)),
        Box((0,), (1, 1)),
    ]:
        assert not box.within((3, 4)), box


@given(shapes())
def test_row_major_strides_are_numpys(shape: Shape) -> None:
    assert row_major_strides(shape) == tuple(n // 8 for n in np.empty(shape, "i8").strides)
