"""`zarr`: what megatron-core's dist_checkpointing wrote up to 0.15, one zarr array per tensor.

    iter_0000100/metadata.json          {"sharded_backend": "zarr", ...}, written last
    iter_0000100/FQN/.zarray            JSON: shape, dtype, shape of a chunk, compressor
    iter_0000100/FQN/1.0.3              the elements of one chunk, without header
    iter_0000100/KEY/shard_0.1_2.2.pt   a ShardedObject: no weights
    iter_0000100/common.pt              training args and the like

Chunks at the edge are stored whole, with padding. Megatron compresses nothing, so its chunks are
read in place; those that someone has compressed since are decoded whole. There is no checksum.

Layout facts: Megatron-LM core_v0.15.3:megatron/core/dist_checkpointing/strategies/{zarr,common}.py
and mapping.py ShardedTensor.max_allowed_chunks; zarr-specs:docs/v2/v2.0.rst.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mcorefs.boxes import Box, Shape, row_major_strides
from mcorefs.dtypes import BY_TORCH, DType
from mcorefs.encoding import Encoding, encoding
from mcorefs.errors import CheckpointError, NoWeightsError
from mcorefs.formats.base import Checkpoint, WeightsFrom, reading, refusal
from mcorefs.formats.dcp import common_file, kind_of, read_args, sharded_backend
from mcorefs.formats.main_params import Described, choose, model_name
from mcorefs.index import MAX_BYTES, MAX_DIMS, Chunk, Span, StoredTensor, stored_tensor
from mcorefs.storage import FileIdentity, regular_file, sees

ARRAY = ".zarray"
_MAX_JSON = 1 << 16
_OVERHEAD = 1 << 16
"""Bytes by which a chunk may grow beyond its double when it is compressed: all of it is read."""
_CHUNK = re.compile(r"\d+(\.\d+)*")
_OBJECT = re.compile(r"shard_.*\.pt")
_DTYPES = {
    "bfloat16": "bfloat16",
    "<V2": "bfloat16",  # what zarr itself calls it; megatron-core puts the name in its place
    "|b1": "bool",
    "|u1": "uint8",
    "|i1": "int8",
    "<i2": "int16",
    "<i4": "int32",
    "<i8": "int64",
    "<f2": "float16",
    "<f4": "float32",
    "<f8": "float64",
}


@dataclass(frozen=True)
class _Array:
    """What `.zarray` says, as far as it matters."""

    dtype: DType
    shape: Shape
    chunk: Shape
    """Shape of every chunk, those at the edge too."""
    strides: Shape
    encoding: Encoding | None
    """None where chunks are stored as they are."""

    @property
    def grid(self) -> Shape:
        """How many chunks there are along each axis."""
        return tuple(-(-n // size) for n, size in zip(self.shape, self.chunk, strict=True))

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize


class Zarr:
    """Format `zarr`."""

    name = "zarr"

    def detect(self, path: Path) -> bool:
        return sees(lambda: sharded_backend(path) == self.name and any(path.glob(f"*/{ARRAY}")))

    def index(self, path: Path, weights: WeightsFrom = "model") -> Checkpoint:
        problems: list[str] = []
        skipped: Counter[str] = Counter()
        model, optimizer = _arrays(path, weights, skipped, problems)
        taken = {fqn: fqn for fqn in model}
        remarks: tuple[str, ...] = ()
        if weights == "optimizer":
            mains = {
                name: _described(fqn, array)
                for fqn, array in optimizer.items()
                if (name := model_name(fqn)) is not None
            }
            choice = choose((_described(*item) for item in model.items()), mains, optimizer)
            taken |= choice.main_params
            problems += choice.problems
            remarks = choice.remarks
        tensors: dict[str, StoredTensor] = {}
        files: dict[str, FileIdentity] = {}
        for name, fqn in taken.items():
            array = model[fqn] if fqn == name else optimizer[fqn]
            tensor = _tensor(fqn, array, path / fqn, files, problems)
            if tensor is not None:
                tensors[name] = tensor if fqn == name else replace(tensor, fqn=name)
        nothing = None, f"{path} has no common.pt"
        args, source = read_args(lambda: common_file(path) or nothing, problems)
        if problems:
            raise refusal(path, problems)
        if not tensors:
            raise NoWeightsError(
                f"{path} cannot be opened: it holds no model weights, only an optimizer; pass the "
                "directory of the model"
            )
        return Checkpoint(
            self.name, path, tensors, args, source, files, dict(skipped), remarks=remarks
        )


def _arrays(
    path: Path, weights: WeightsFrom, skipped: Counter[str], problems: list[str]
) -> tuple[dict[str, _Array], dict[str, _Array]]:
    """By fqn: (the arrays of the model, those of the optimizer if `weights` are its)."""
    model: dict[str, _Array] = {}
    optimizer: dict[str, _Array] = {}
    try:
        names = sorted(child.name for child in path.iterdir() if child.is_dir())
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from None
    for fqn in names:
        try:
            held = _names(path / fqn)
            if ARRAY not in held:
                _count_objects(fqn, held, skipped)
                continue
            kind = kind_of(fqn, is_object=False)
            if kind == "model":
                model[fqn] = _array(path / fqn / ARRAY)
                continue
            skipped[kind] += 1
            if kind == weights:
                optimizer[fqn] = _array(path / fqn / ARRAY)
        except CheckpointError as problem:
            problems.append(str(problem))
    return model, optimizer


def _names(directory: Path) -> set[str]:
    """What lies in the directory of one array or object."""
    if not directory.name.isprintable():
        raise CheckpointError(f"{directory.parent} holds {directory.name!a:.80}: it is damaged")
    if directory.is_symlink():
        raise CheckpointError(
            f"{directory} is a symbolic link; pass the directory that holds the arrays themselves"
        )
    try:
        return {child.name for child in directory.iterdir()}
    except OSError as problem:
        raise CheckpointError(f"{directory} cannot be read: {problem.strerror}") from None


def _count_objects(key: str, held: set[str], skipped: Counter[str]) -> None:
    if any(map(_CHUNK.fullmatch, held)):
        raise CheckpointError(f"{key}: it has chunks but no {ARRAY}; copy it again")
    if objects := sum(map(bool, map(_OBJECT.fullmatch, held))):
        skipped[kind_of(key, is_object=True)] += objects


def _described(fqn: str, array: _Array) -> Described:
    return Described(fqn, array.dtype.torch, array.shape)


# -- .zarray -------------------------------------------------------------------------------------


def _array(file: Path) -> _Array:
    """The array that the `.zarray` at `file` describes. Raises CheckpointError."""
    identity, why = regular_file(str(file))
    if identity is None or identity.size > _MAX_JSON:
        raise CheckpointError(f"{file} {why or 'is too large'}")
    with reading(str(file)) as pread:
        text = pread(0, identity.size)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{file} is no JSON: {problem!s:.200}") from None
    try:
        return _checked(found)
    except _NotReadableError as problem:
        raise CheckpointError(f"{file.parent.name}: {ARRAY} says that {problem}") from None


class _NotReadableError(Exception):
    """The end of a sentence that begins "it says that"."""


def _checked(found: object) -> _Array:
    if not isinstance(found, dict) or found.get("zarr_format") != 2:
        raise _NotReadableError("it is not of zarr's format 2, in which megatron-core writes")
    dtype = found.get("dtype")
    named = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    if named is None:
        raise _NotReadableError(f"its dtype is {dtype!r:.80}, which is not one we know")
    shape, chunk = _numbers(found, "shape"), _numbers(found, "chunks")
    if len(shape) != len(chunk) or 0 in chunk:
        raise _NotReadableError(f"it is {list(shape)} in chunks of {list(chunk)}")
    if math.prod(chunk) * BY_TORCH[named].itemsize >= MAX_BYTES:
        raise _NotReadableError(f"each chunk is {list(chunk)}, which is not possible")
    if found.get("filters"):
        raise _NotReadableError(f"its chunks went through filters {found['filters']!r:.80}")
    if found.get("dimension_separator", ".") != ".":
        raise _NotReadableError(
            "its chunks lie in directories of their own; megatron-core puts 0.1"
        )
    strides = {"C": row_major_strides(chunk), "F": row_major_strides(chunk[::-1])[::-1]}
    order = found.get("order")
    if not (isinstance(order, str) and order in strides):
        raise _NotReadableError(f"its order is {order!r:.80}, neither C nor F")
    encoded: Encoding | None = None
    if found.get("compressor") is not None:
        nbytes = math.prod(chunk) * BY_TORCH[named].itemsize
        encoded, why = encoding(found["compressor"], nbytes)
        if encoded is None:
            raise _NotReadableError(f"its chunks are compressed {why}")
    return _Array(BY_TORCH[named], shape, chunk, strides[order], encoded)


def _numbers(found: Mapping[object, object], key: str) -> Shape:
    """A list of sizes that can be those of an array."""
    values = found.get(key)
    if not isinstance(values, list) or len(values) > MAX_DIMS:
        raise _NotReadableError(f"its {key} is {values!r:.80}")
    if not all(type(value) is int and 0 <= value < MAX_BYTES for value in values):
        raise _NotReadableError(f"its {key} is {values!r:.80}, which is not possible")
    return tuple(values)


# -- chunks --------------------------------------------------------------------------------------


def _tensor(
    fqn: str, array: _Array, directory: Path, files: dict[str, FileIdentity], problems: list[str]
) -> StoredTensor | None:
    """The tensor; None, with what is wrong with its files in `problems`."""
    held = {child.name for child in directory.iterdir() if _CHUNK.fullmatch(child.name)}
    grid = array.grid
    count = math.prod(grid)
    if count > 2 * len(held) + 1000:  # however many: they need not be counted one by one
        problems.append(f"{fqn}: {ARRAY} says that it has {count} chunks, there are {len(held)}")
        return None
    chunks: list[Chunk] = []
    faults: list[str] = []
    for number in range(count):
        index = _index(number, grid)
        name = ".".join(map(str, index)) or "0"
        held.discard(name)
        chunk = _chunk(array, index, str(directory / name), files)
        if isinstance(chunk, Chunk):
            chunks.append(chunk)
        else:
            faults.append(chunk)
    if faults:
        more = f" (and {len(faults) - 1} more of its chunks)" if len(faults) > 1 else ""
        problems.append(f"{fqn}: {faults[0]}{more}")
    if held:
        problems.append(
            f"{fqn}: {directory / min(held)} is outside of shape {list(array.shape)} in chunks of "
            f"{list(array.chunk)}: it is left from another save"
        )
    tensor, why = None, None
    if not faults:
        tensor, why = stored_tensor(fqn, array.dtype, array.shape, tuple(chunks))
    problems.extend([why] if why else [])
    return tensor


def _index(number: int, grid: Shape) -> Shape:
    """The place in `grid` of a chunk counted in row-major order."""
    found: list[int] = []
    for size in reversed(grid):
        number, place = divmod(number, size)
        found.append(place)
    return tuple(reversed(found))


def _chunk(array: _Array, index: Shape, path: str, files: dict[str, FileIdentity]) -> Chunk | str:
    """The chunk in the file at `path`, or what is wrong with that."""
    identity, why = regular_file(path)
    if identity is None:
        return f"chunk file {path}: {why}; copy it again"
    if array.encoding is not None and identity.size > 2 * array.chunk_bytes + _OVERHEAD:
        return (
            f"chunk file {path} has {identity.size} bytes, which is too much for a chunk of "
            f"{array.chunk_bytes} bytes compressed"
        )
    if array.encoding is None and identity.size != array.chunk_bytes:
        longer = "cut short" if identity.size < array.chunk_bytes else "too long"
        return (
            f"chunk file {path} is {longer}: it has {identity.size} bytes, a chunk of "
            f"{list(array.chunk)} {array.dtype.torch} has {array.chunk_bytes}; copy it again"
        )
    files[path] = identity
    offsets = tuple(i * size for i, size in zip(index, array.chunk, strict=True))
    ends = (min(o + n, all_) for o, n, all_ in zip(offsets, array.chunk, array.shape, strict=True))
    sizes = tuple(end - offset for end, offset in zip(ends, offsets, strict=True))
    span = Span(path, 0, identity.size, strides=array.strides, encoding=array.encoding)
    return Chunk(Box(offsets, sizes), span)
