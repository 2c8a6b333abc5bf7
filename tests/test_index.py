"""What a format may build: tilings of every kind; and what it is refused, in linear time."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcorefs.boxes import Box, Shape
from mcorefs.dtypes import BF16, F32
from mcorefs.index import (
    MAX_SCAN,
    MIN_GRID,
    Chunk,
    Span,
    StoredTensor,
    _Grid,
    stored_tensor,
)
from tests.tilings import boxes, part, pinwheel, raw_chunks, shapes, tilings


def built(shape: Shape, tiles: list[Box]) -> StoredTensor:
    tensor, problem = stored_tensor("t", BF16, shape, raw_chunks(tiles, 2))
    assert tensor is not None, problem
    return tensor


def refusal(shape: Shape, chunks: tuple[Chunk, ...]) -> str:
    tensor, problem = stored_tensor("some.fqn", BF16, shape, chunks)
    assert tensor is None
    assert problem is not None
    assert problem.startswith("some.fqn: ")
    assert len(problem) < 1000
    return problem


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


@settings(deadline=None)
@given(st.data(), shapes())
def test_every_tiling_is_accepted_and_a_lookup_finds_exactly_the_overlaps(
    data: st.DataObject, shape: Shape
) -> None:
    tiles = data.draw(tilings(shape))
    box = data.draw(boxes(shape))
    found = {chunk.box: part for chunk, part in built(shape, tiles).overlapping(box)}
    assert found == {tile: part for tile in tiles if (part := tile.intersect(box))}


@settings(deadline=None)
@given(st.data(), shapes(min_dims=1))
def test_a_tiling_with_one_tile_changed_is_refused(data: st.DataObject, shape: Shape) -> None:
    tiles = data.draw(tilings(shape))
    victim = data.draw(st.integers(0, len(tiles) - 1))
    axis = data.draw(st.integers(0, len(shape) - 1))
    step = data.draw(st.sampled_from([-1, 1]))
    box = tiles[victim]
    changed = data.draw(
        st.sampled_from(
            [
                [],
                [box, box],
                [part(box, {axis: (step, box.sizes[axis])})],
                [part(box, {axis: (0, box.sizes[axis] + step)})],
            ]
        )
    )
    refusal(shape, raw_chunks([*tiles[:victim], *changed, *tiles[victim + 1 :]], 2))


def test_gaps_hidden_by_overlaps_of_the_same_volume_are_found() -> None:
    assert "overlap" in refusal((4,), raw_chunks([Box((0,), (2,)), Box((1,), (2,))], 2))
    wheel = pinwheel(Box.whole((5, 5)), 0, 1)
    moved = [*wheel[:4], Box((0, 1), (3, 3))]
    assert "overlap" in refusal((5, 5), raw_chunks(moved, 2))
    assert "at [0, 1] of size [3, 3]" in refusal((5, 5), raw_chunks(moved, 2))


def test_scalars_and_empty_tensors() -> None:
    scalar = built((), [Box((), ())])
    assert [part for _, part in scalar.overlapping(Box((), ()))] == [Box((), ())]
    assert "gap" in refusal((), ())
    assert "overlap" in refusal((), raw_chunks([Box((), ())] * 2, 2))
    empty = built((3, 0, 2), [])
    assert list(empty.overlapping(Box.whole((3, 0, 2)))) == []
    assert built((3, 0), [Box((0, 0), (3, 0))]).chunks == ()
    assert "outside" in refusal((3, 0), raw_chunks([Box((0, 0), (3, 1))], 2))


@pytest.mark.parametrize(
    "shape",
    [
        (-1,),
        (2, -3),
        (1 << 63,),
        (1 << 62,),
        (1 << 40, 1 << 40),
        (0, 1 << 62),
        (0, 1 << 40, 1 << 40),
        (10**5000,),
        (-(10**5000),),
        (1,) * 9,
    ],
    ids=lambda shape: f"{len(shape)}d-{max(n.bit_length() for n in shape)}bits",
)
def test_impossible_shapes_are_refused(shape: Shape) -> None:
    assert "not possible" in refusal(shape, ())
    assert "not possible" in refusal(shape, (Chunk(Box.whole(shape), Span("f", 0, 2)),))


def test_impossible_chunks_are_refused() -> None:
    def chunk(offsets: Shape, sizes: Shape, span: Span | None = None) -> tuple[Chunk, ...]:
        return (Chunk(Box(offsets, sizes), span or Span("f", 0, 1 << 40)),)

    for offsets, sizes in [
        ((-1, 0), (4, 3)),
        ((0, 0), (-4, -3)),
        ((0, 0), (5, 3)),
        ((0,), (12,)),
        ((0, 0, 0), (4, 3, 1)),
        ((0, 0), (12,)),
        ((10**5000, 0), (4, 3)),
        ((0, 0), (10**5000, 10**5000)),
    ]:
        assert "outside" in refusal((4, 3), chunk(offsets, sizes))
    for span in [
        Span("f", -1, 24),
        Span("f", 0, -1),
        Span("f", -1, 99, "torch_zip"),
        Span("f", 0, 99, skip=-2),
        Span("f", 0, 99, strides=(3,)),
        Span("f", 0, 99, strides=(3, -1)),
        Span("f", 0, 99, "zip_record", strides=(-3, 1)),
    ]:
        assert "impossible place" in refusal((4, 3), chunk((0, 0), (4, 3), span))
    for span, need in [
        (Span("f", 0, 23), 24),
        (Span("f", 0, 24, skip=1), 25),
        (Span("f", 0, 29, "zip_record", strides=(4, 1)), 30),
        (Span("f", 0, 19, "zip_record", skip=2, strides=(0, 4)), 20),
    ]:
        assert f"needs {need} bytes" in refusal((4, 3), chunk((0, 0), (4, 3), span))
        enough = chunk((0, 0), (4, 3), replace(span, nbytes=need))
        assert stored_tensor("t", BF16, (4, 3), enough)[0] is not None


def test_dtype_counts_in_the_size_of_spans() -> None:
    chunks = raw_chunks([Box.whole((3,))], 2)
    assert stored_tensor("t", BF16, (3,), chunks)[0] is not None
    assert stored_tensor("t", F32, (3,), chunks)[0] is None


def grid(shape: Shape, cuts: Shape) -> list[Box]:
    sizes = tuple(n // c for n, c in zip(shape, cuts, strict=True))
    return [
        Box(tuple(i * n for i, n in zip(index, sizes, strict=True)), sizes)
        for index in itertools.product(*map(range, cuts))
    ]


@st.composite
def uneven_grids(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    """More than MIN_GRID chunks, in any order."""
    lengths = draw(st.lists(st.lists(st.integers(1, 5), min_size=6, max_size=7), max_size=2))
    lengths.insert(draw(st.integers(0, len(lengths))), [1, 2, 3, 1, 2, 3] * 6)
    axes = [list(zip(itertools.accumulate([0, *part]), part, strict=False)) for part in lengths]
    tiles = [Box(*map(tuple, zip(*cell, strict=True))) for cell in itertools.product(*axes)]
    return tuple(map(sum, lengths)), draw(st.permutations(tiles))


@settings(deadline=None, max_examples=50)
@given(st.data(), uneven_grids())
def test_a_grid_is_proved_and_searched_as_any_other_tiling(
    data: st.DataObject, made: tuple[Shape, list[Box]]
) -> None:
    shape, tiles = made
    tensor = built(shape, tiles)
    assert isinstance(tensor._cut[1], _Grid)
    box = data.draw(boxes(shape))
    found = {chunk.box: held for chunk, held in tensor.overlapping(box)}
    expected = {tile: tile.intersect(box) for tile in tiles}
    assert found == {tile: held for tile, held in expected.items() if held is not None}
    one, other = data.draw(st.tuples(*[st.integers(0, len(tiles) - 1)] * 2))
    axis = data.draw(st.integers(0, len(shape) - 1))
    victim = tiles[one]
    for changed in (
        [],
        [victim, victim],
        [part(victim, {axis: (1, victim.sizes[axis])})],
        [part(victim, {axis: (0, victim.sizes[axis] + 1)})],
        [tiles[other]] if one != other else [],
    ):
        refusal(shape, raw_chunks([*tiles[:one], *changed, *tiles[one + 1 :]], 2))


def test_numbers_beyond_64_bits_are_no_grid() -> None:
    tiles = [Box((i, 0), (1, 1)) for i in range(2 * MIN_GRID)]
    for wrong in (Box((1 << 64, 0), (1, 1)), Box((0, 0), (1, 1 << 64)), Box((0,), (1,))):
        assert "outside" in refusal((2 * MIN_GRID, 1), raw_chunks([*tiles[1:], wrong], 2))
    spans = [*raw_chunks(tiles[1:], 2), Chunk(tiles[0], Span("f", -1, 2, "torch_zip"))]
    assert "impossible place" in refusal((2 * MIN_GRID, 1), tuple(spans))


@pytest.mark.parametrize("cuts", [(100_000, 1), (1, 100_000), (60, 128, 13), (10, 100, 100)])
def test_lookup_among_many_chunks_does_not_scan(
    cuts: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = tuple(2 * n for n in cuts)
    tiles = grid(shape, cuts)
    with at_most(10):
        tensor = built(shape, tiles)
    asked: list[Box] = []
    intersect = Box.intersect

    def counted(one: Box, other: Box) -> Box | None:
        asked.append(one)
        return intersect(one, other)

    monkeypatch.setattr(Box, "intersect", counted)
    for wanted in (tiles[0], tiles[len(tiles) // 3], tiles[-1]):
        asked.clear()
        assert [chunk.box for chunk, _ in tensor.overlapping(wanted)] == [wanted]
        assert len(asked) <= 2 ** len(cuts)


def _spiral(turns: int) -> tuple[Shape, list[Box]]:
    """Each cut takes one chunk off: top row, left column, next row, next column, ..."""
    tiles = [Box((turns, turns), (1, 1))]
    for i in range(turns):
        tiles.append(Box((i, i), (1, turns + 1 - i)))
        tiles.append(Box((i + 1, i), (turns - i, 1)))
    return (turns + 1, turns + 1), tiles


def _all_alike(n: int) -> tuple[Shape, list[Box]]:
    return (n, n), [Box((0, 0), (1, n))] * n


def _staircase(n: int) -> tuple[Shape, list[Box]]:
    """Each overlaps the next on the first axis, so that no cut is possible."""
    return (n + 1, 2), [Box((i, 0), (2, 1)) for i in range(n)] + [Box((0, 1), (2, 1))]


@pytest.mark.parametrize("make", [_spiral, _all_alike, _staircase])
def test_tilings_made_to_be_slow_are_refused_in_time(
    make: Callable[[int], tuple[Shape, list[Box]]],
) -> None:
    shape, tiles = make(20_000)
    assert sum(tile.volume for tile in tiles) == math.prod(shape)
    with at_most(20):
        assert "overlap or interlock" in refusal(shape, raw_chunks(tiles, 2))


def test_interlocking_chunks_up_to_the_limit_are_found() -> None:
    turns = MAX_SCAN // 2
    shape, tiles = _spiral(turns)
    np.random.default_rng(0).shuffle(tiles)
    tensor = built(shape, tiles)
    box = Box((turns // 2, turns // 2), (2, 2))
    found = {chunk.box: part for chunk, part in tensor.overlapping(box)}
    assert found == {tile: part for tile in tiles if (part := tile.intersect(box))}
