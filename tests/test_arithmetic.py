"""Nodes that calculate, against torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mcorefs.arithmetic import Add, Addmm, Nothing
from mcorefs.boxes import Box
from mcorefs.dtypes import BF16, BY_NAME, F16, F32, DType
from mcorefs.views import Array, Narrow, Permute, Select, Stored, Unflatten, View, moves_only
from tests.graphs import Memory
from tests.tilings import boxes, tilings

FLOATS = (BF16, F16, F32)
Draw = st.DataObject | None


def stored(memory: Memory, values: Tensor, draw: Draw = None) -> View:
    """`values` as a stored tensor, in one chunk or in drawn ones."""
    shape = tuple(values.shape)
    dtype = next(d for d in FLOATS if getattr(torch, d.torch) == values.dtype)
    tiles = [Box.whole(shape)] if draw is None else draw.draw(tilings(shape))
    tensor = memory.add(dtype, shape, tiles)
    bits = values.contiguous().view(torch.uint8).numpy().reshape(-1).view(dtype.carrier)
    memory.arrays[tensor] = bits.reshape(shape)
    return Stored(tensor)


def addmm(
    memory: Memory, parts: Sequence[Tensor], alpha: float, product: DType, draw: Draw = None
) -> Addmm:
    w, b, a = (stored(memory, values, draw) for values in parts)
    return Addmm(w, b, a, alpha, product)


def torch_dtype(dtype: DType) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype.torch)
    return found


def bits(values: Tensor, dtype: DType) -> Array:
    raw = values.contiguous().view(torch.uint8).numpy().reshape(-1)
    return raw.view(dtype.carrier).reshape(tuple(values.shape))


def whole(view: View, memory: Memory) -> Array:
    out = np.empty(view.shape, view.dtype.carrier)
    view.read_into(Box.whole(view.shape), out, memory.leaf)
    return out


def exact(generator: torch.Generator, *shape: int) -> Tensor:
    """Values whose products float32 sums without rounding, in whatever order."""
    return torch.randint(-15, 16, shape, generator=generator) / 16.0


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_box_is_what_torch_says(data: st.DataObject) -> None:
    """Each step by torch itself, with products that no order of summation changes."""
    rows, rank, columns = (data.draw(st.integers(1, 9)) for _ in range(3))
    weight, factor, product = (data.draw(st.sampled_from(FLOATS)) for _ in range(3))
    alpha = data.draw(st.sampled_from([1.0, 4.0, 0.5, 1 / 3, 16 / 7, 32 / 8**0.5]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    w = torch.randn(rows, columns, generator=generator).to(torch_dtype(weight))
    b = exact(generator, rows, rank).to(torch_dtype(factor))
    a = exact(generator, rank, columns).to(torch_dtype(factor))
    memory = Memory()
    view = addmm(memory, (w, b, a), alpha, product, data)
    assert (view.shape, view.dtype) == ((rows, columns), weight)
    assert not moves_only(view)
    kind = torch_dtype(product)
    wanted = w.clone()
    wanted += (b.to(kind) @ a.to(kind)) * alpha
    box = data.draw(boxes(view.shape))
    out = np.full(box.sizes[::-1], 0xA5, weight.carrier).T
    view.read_into(box, out, memory.leaf)
    np.testing.assert_array_equal(out, bits(wanted, weight)[box.slices()])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_sum_of_views_is_what_torch_says(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    one, other = (data.draw(st.sampled_from(FLOATS)) for _ in range(2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    w = torch.randn(shape, generator=generator).to(torch_dtype(one))
    delta = torch.randn(shape, generator=generator).to(torch_dtype(other))
    memory = Memory()
    view = Add(stored(memory, w, data), stored(memory, delta, data))
    assert (view.shape, view.dtype) == (shape, one)
    assert not moves_only(view)
    wanted = (w.float() + delta.float()).to(w.dtype)
    box = data.draw(boxes(shape))
    out = np.full(box.sizes[::-1], 0xA5, one.carrier).T
    view.read_into(box, out, memory.leaf)
    np.testing.assert_array_equal(out, bits(wanted, one)[box.slices()])


def test_nothing_leaves_every_bit_as_it_is() -> None:
    values = torch.tensor([[0.0, -0.0, 1.0, -1.5], [torch.inf, -torch.inf, 1e-40, 3e38]])
    for dtype in FLOATS:
        memory = Memory()
        w = values.to(torch_dtype(dtype))
        for nothing in FLOATS:
            found = whole(Add(stored(memory, w), Nothing((2, 4), nothing)), memory)
            np.testing.assert_array_equal(found, bits(w, dtype))
            found = whole(Add(Nothing((2, 4), dtype), stored(memory, w)), memory)
            np.testing.assert_array_equal(found, bits(w, dtype))


def test_sums_that_are_none() -> None:
    memory = Memory()
    view = stored(memory, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"add of \(2, 3\) and \(3, 2\)"):
        Add(view, Permute(view, (1, 0)))
    with pytest.raises(ValueError, match="add to I32"):
        Add(view, Stored(memory.add(BY_NAME["I32"], (2, 3), [Box.whole((2, 3))])))


def test_blocks_are_joined() -> None:
    """More rows and columns than are calculated at a time; random values, summed exactly."""
    generator = torch.Generator().manual_seed(1)
    rows, rank, columns = 600, 5, 9001
    w = (torch.randn(rows, columns, generator=generator) / 16).bfloat16()
    b, a = (torch.randn(n, m, generator=generator) / 16 for n, m in ((rows, rank), (rank, columns)))
    memory = Memory()
    view = addmm(memory, (w, b, a), 2.0, F32)
    product = (b.double() @ a.double()).float()
    found = whole(view, memory)
    np.testing.assert_array_equal(found, bits((w.float() + product * 2.0).bfloat16(), BF16))
    # Sums by float32 differ only where the exact value lies almost between two of bfloat16.
    plain = (w.float() + (b @ a) * 2.0).bfloat16()
    served = torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
    assert (served != plain).float().mean() < 1e-3
    torch.testing.assert_close(served, plain, rtol=2**-7, atol=1e-6)


def test_bits_do_not_depend_on_the_box() -> None:
    generator = torch.Generator().manual_seed(2)
    w, b, a = (torch.randn(*s, generator=generator) for s in ((300, 70), (300, 33), (33, 70)))
    memory = Memory()
    view = addmm(memory, [t.bfloat16() for t in (w, b, a)], 4.0, BF16)
    everything = whole(view, memory)
    for rows, columns in itertools.product(range(0, 300, 37), (1, 13, 70)):
        box = Box((rows, 70 - columns), (min(37, 300 - rows), columns))
        out = np.empty(box.sizes, np.uint16)
        view.read_into(box, out, memory.leaf)
        np.testing.assert_array_equal(out, everything[box.slices()])


def test_only_the_rows_and_columns_wanted_are_read() -> None:
    memory = Memory()
    zeros = (torch.zeros(8, 6), torch.zeros(8, 2), torch.zeros(2, 6))
    w, b, a = (stored(memory, values) for values in zeros)
    view = Select(Unflatten(Addmm(w, b, a, 1.0, F32), 0, (4, 2)), 0, 2)
    asked: dict[int, Box] = {}

    def leaf(tensor: object, box: Box, out: Array) -> None:
        asked[id(tensor)] = box
        out[...] = 0

    view.read_into(Box((1, 2), (1, 3)), np.empty((1, 3), np.uint32), leaf)
    assert [asked[id(view.tensor)] for view in (w, b, a) if isinstance(view, Stored)] == [
        Box((5, 2), (1, 3)),
        Box((5, 0), (1, 2)),
        Box((0, 2), (2, 3)),
    ]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_weights(shape: tuple[int, int]) -> None:
    memory = Memory()
    sizes = (shape, (shape[0], 2), (2, shape[1]))
    view = addmm(memory, [torch.zeros(size) for size in sizes], 1.0, F32)
    assert whole(view, memory).shape == shape


def test_infinities_and_nans_come_out_as_in_torch() -> None:
    w = torch.tensor([[3e38, 1.0, float("inf"), -1.0]])
    b, a = torch.tensor([[3e38]]), torch.tensor([[1.0, float("nan"), -1.0, 2.0]])
    memory = Memory()
    view = addmm(memory, [t.bfloat16() for t in (w, b, a)], 1.0, BF16)
    found = torch.from_numpy(whole(view, memory).view(np.int16)).view(torch.bfloat16)
    wanted = w.bfloat16() + b.bfloat16() @ a.bfloat16()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert found.isinf().any()
    assert found.isnan().any()


@pytest.mark.parametrize(
    ("shapes", "dtypes"),
    [
        (((4, 3), (4, 2), (2, 4)), (F32, F32, F32, F32)),
        (((4, 3), (3, 2), (2, 3)), (F32, F32, F32, F32)),
        (((4, 3), (4, 2), (1, 3)), (F32, F32, F32, F32)),
        (((4, 3, 1), (4, 2), (2, 3)), (F32, F32, F32, F32)),
        (((12,), (4, 2), (2, 3)), (F32, F32, F32, F32)),
        (((4, 3), (4, 2), (2, 3)), (BY_NAME["F8_E4M3"], F32, F32, F32)),
        (((4, 3), (4, 2), (2, 3)), (F32, BY_NAME["I32"], F32, F32)),
        (((4, 3), (4, 2), (2, 3)), (F32, F32, F32, BY_NAME["F64"])),
    ],
)
def test_what_does_not_fit_is_refused(
    shapes: tuple[tuple[int, ...], ...], dtypes: tuple[DType, ...]
) -> None:
    memory = Memory()
    w, b, a = (
        Stored(memory.add(dtype, shape, [Box.whole(shape)]))
        for shape, dtype in zip(shapes, dtypes, strict=False)
    )
    with pytest.raises(ValueError, match="addmm of"):
        Addmm(w, b, a, 1.0, dtypes[3])


def test_factors_may_be_views() -> None:
    """A transposed product, as that of an embedding."""
    generator = torch.Generator().manual_seed(3)
    w, a, b = exact(generator, 5, 4), exact(generator, 2, 7), exact(generator, 4, 2)
    memory = Memory()
    right = Permute(stored(memory, b), (1, 0))
    left = Permute(Narrow(stored(memory, a), 1, 1, 5), (1, 0))
    found = whole(Addmm(stored(memory, w), left, right, 2.0, F32), memory)
    np.testing.assert_array_equal(found, bits(w + 2.0 * (b @ a[:, 1:6]).T, F32))
