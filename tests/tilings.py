"""Random tensors cut into chunks in every way that parallel training does, and in worse ways."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from mcorefs.boxes import Box, Shape
from mcorefs.index import Chunk, Span

MAX_SIDE = 6


@st.composite
def shapes(draw: st.DrawFn, min_dims: int = 0, max_dims: int = 4) -> Shape:
    return tuple(draw(st.lists(st.integers(1, MAX_SIDE), min_size=min_dims, max_size=max_dims)))


@st.composite
def boxes(draw: st.DrawFn, shape: Shape) -> Box:
    """A box in a tensor of `shape`, now and then an empty one."""
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(low for low, _ in ends), tuple(high - low for low, high in ends))


@st.composite
def tilings(draw: st.DrawFn, shape: Shape) -> list[Box]:
    """Boxes that cover a tensor of `shape` exactly, in any order: cuts within cuts, pinwheels."""
    if 0 in shape:
        return []
    return draw(st.permutations(_tiles(draw, Box.whole(shape), depth=4)))


def _tiles(draw: st.DrawFn, box: Box, depth: int) -> list[Box]:
    long = [axis for axis, n in enumerate(box.sizes) if n > 1]
    wide = [axis for axis, n in enumerate(box.sizes) if n > 2]
    kinds = ["whole"] + ["cut"] * bool(long) + ["pinwheel"] * (len(wide) > 1)
    kind = draw(st.sampled_from(kinds)) if depth else "whole"
    if kind == "whole":
        return [box]
    if kind == "cut":
        parts = _cut(draw, box, draw(st.sampled_from(long)))
    else:
        first, second, *_ = draw(st.permutations(wide))
        parts = pinwheel(box, first, second)
    return [tile for part in parts for tile in _tiles(draw, part, depth - 1)]


def _cut(draw: st.DrawFn, box: Box, axis: int) -> list[Box]:
    size = box.sizes[axis]
    at = draw(st.lists(st.integers(1, size - 1), unique=True, min_size=1, max_size=3))
    return [
        part(box, {axis: (low, high - low)})
        for low, high in itertools.pairwise([0, *sorted(at), size])
    ]


def pinwheel(box: Box, first: int, second: int) -> list[Box]:
    """Five boxes around a middle one: no straight cut separates any of them."""
    n, m = box.sizes[first], box.sizes[second]
    return [
        part(box, {first: rows, second: columns})
        for rows, columns in [
            ((0, 1), (0, m - 1)),
            ((0, n - 1), (m - 1, 1)),
            ((n - 1, 1), (1, m - 1)),
            ((1, n - 1), (0, 1)),
            ((1, n - 2), (1, m - 2)),
        ]
    ]


def part(box: Box, ranges: dict[int, tuple[int, int]]) -> Box:
    """`box` with (start within it, length) on some axes."""
    offsets, sizes = list(box.offsets), list(box.sizes)
    for axis, (start, length) in ranges.items():
        offsets[axis], sizes[axis] = box.offsets[axis] + start, length
    return Box(tuple(offsets), tuple(sizes))


def raw_chunks(tiles: list[Box], itemsize: int, path: str = "shard") -> tuple[Chunk, ...]:
    """The tiles one after another in one file."""
    chunks, at = [], 0
    for tile in tiles:
        chunks.append(Chunk(tile, Span(path, at, tile.volume * itemsize)))
        at += tile.volume * itemsize
    return tuple(chunks)
