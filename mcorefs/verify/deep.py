"""Checking a checkpoint against itself: numbers are finite, copies of one tensor are equal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from mcorefs.boxes import Box, Shape
from mcorefs.dtypes import DType
from mcorefs.errors import ReadFault
from mcorefs.formats.base import Replica
from mcorefs.mapping.plan import HfTensor
from mcorefs.patience import READ_TIMEOUT, attended
from mcorefs.reader import Reader
from mcorefs.verify.findings import PIECE, Difference, Findings, OnProgress, threads
from mcorefs.views import Stored

_SPECIAL = {
    "BF16": 0x7F80,
    "F16": 0x7C00,
    "F32": 0x7F80_0000,
    "F64": 0x7FF0_0000_0000_0000,
    "F8_E5M2": 0x7C,
    "F8_E4M3": 0x7F,  # this one has no infinity and one NaN
}
"""Bits that are all set in NaN and infinity, and in nothing else."""
_AHEAD = 64
"""Tensors handed to the threads at a time."""


def check_finite(
    tensors: Sequence[HfTensor], reader: Reader, on_progress: OnProgress = lambda count: None
) -> Findings:
    """Look for NaN and infinity in every tensor; all that can be served is read once."""
    with ThreadPoolExecutor(threads()) as pool:
        found = pool.map(lambda tensor: _not_finite(tensor, reader, on_progress), tensors)
        differences = tuple(difference for difference in found if difference is not None)
    total = sum(tensor.nbytes for tensor in tensors)
    return Findings(len(tensors) - len(differences), total, differences)


def check_replicas(
    replicas: Iterable[Replica],
    reader: Reader,
    on_progress: OnProgress = lambda count: None,
    read_timeout: float | None = READ_TIMEOUT,
) -> Findings:
    """Compare every copy of a tensor with the one that is served, byte for byte."""
    sound = total = 0
    differences: list[Difference] = []
    left = iter(replicas)
    with ThreadPoolExecutor(threads()) as pool:
        while some := attended(lambda: list(islice(left, _AHEAD)), read_timeout):
            for replica, problem in zip(
                some, pool.map(lambda one: _disagree(one, reader, on_progress), some), strict=True
            ):
                total += 2 * math.prod(replica.first.shape) * replica.first.dtype.itemsize
                sound += problem is None
                if problem is not None:
                    differences.append(Difference(replica.name, problem))
    return Findings(sound, total, tuple(differences))


def _not_finite(tensor: HfTensor, reader: Reader, on_progress: OnProgress) -> Difference | None:
    mask = _SPECIAL.get(tensor.dtype.name)
    if mask is None:
        return None  # integers
    size = tensor.dtype.itemsize
    count, first = 0, -1
    buffer = memoryview(bytearray(min(PIECE, tensor.nbytes)))
    try:
        for start in range(0, tensor.nbytes, PIECE):
            part = buffer[: min(PIECE, tensor.nbytes - start)]
            reader.read_tensor(tensor.view, start, part)
            special = np.frombuffer(part, tensor.dtype.carrier) & mask == mask
            if special.any():
                first = start // size + int(special.argmax()) if first < 0 else first
                count += int(np.count_nonzero(special))
            on_progress(len(part))
    except ReadFault as fault:
        return Difference(tensor.name, f"cannot be read: {fault}")
    if not count:
        return None
    where = _index(first, tensor.shape)
    return Difference(
        tensor.name, f"has {count:,} elements that are NaN or infinite, first at {where}"
    )


def _disagree(replica: Replica, reader: Reader, on_progress: OnProgress) -> str | None:
    """How two copies differ; None if they are equal."""
    one, other = replica.first, replica.other
    ranks = f"in {replica.first_rank} and in {replica.other_rank}"
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        kinds = (f"{tensor.dtype.torch} {list(tensor.shape)}" for tensor in (one, other))
        return f"differs {ranks}: {' and '.join(kinds)}"
    count, first = 0, -1
    try:
        for box, start in _slabs(one.shape, one.dtype):
            pieces = [reader.read_box(Stored(tensor), box).reshape(-1) for tensor in (one, other)]
            unequal = pieces[0] != pieces[1]
            if unequal.any():
                first = start + int(unequal.argmax()) if first < 0 else first
                count += int(np.count_nonzero(unequal))
            on_progress(sum(piece.nbytes for piece in pieces))
    except ReadFault as fault:
        return f"cannot be compared {ranks}: {fault}"
    if not count:
        return None
    whole = math.prod(one.shape)
    where = _index(first, one.shape)
    return f"differs {ranks}: in {count:,} of {whole:,} elements, first at {where}"


def _slabs(shape: Shape, dtype: DType) -> Iterator[tuple[Box, int]]:
    """Boxes of about PIECE bytes that follow each other in `shape`, each with its first element."""
    if 0 in shape:
        return
    row = math.prod(shape[1:])
    rows = max(1, PIECE // (row * dtype.itemsize))
    if not shape:
        yield Box((), ()), 0
        return
    rest = (0,) * (len(shape) - 1)
    for start in range(0, shape[0], rows):
        yield Box((start, *rest), (min(rows, shape[0] - start), *shape[1:])), start * row


def _index(element: int, shape: Shape) -> list[int]:
    return [int(i) for i in np.unravel_index(element, shape)] if shape else []
