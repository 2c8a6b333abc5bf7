"""Comparing a checkpoint with an existing Hugging Face directory, tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mcorefs.boxes import Shape
from mcorefs.dtypes import DType
from mcorefs.errors import CheckpointError, ReadFault
from mcorefs.layout import INDEX
from mcorefs.mapping.plan import HfTensor
from mcorefs.reader import Reader

PIECE = 8 << 20
"""Bytes compared at a time by each thread."""
_THREADS = 4
IGNORED_KEYS = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "architectures")
"""Keys of config.json that may differ between two descriptions of one model."""

OnProgress = Callable[[int], None]


@dataclass(frozen=True)
class Difference:
    """What is wrong with one tensor (or file), in words."""

    name: str
    problem: str


@dataclass(frozen=True)
class Verdict:
    """How a checkpoint and a directory compare. Equal: no differences."""

    equal: int
    """Tensors that are equal in name, dtype, shape and every byte."""
    total_bytes: int
    """Bytes compared."""
    differences: tuple[Difference, ...]
    config: tuple[Difference, ...]
    """Keys of config.json that both state, differently: they decide nothing here."""


@dataclass(frozen=True)
class _Real:
    """A tensor in a real safetensors file."""

    path: Path
    offset: int
    nbytes: int
    dtype: str
    shape: Shape


def verify(
    tensors: Sequence[HfTensor],
    config: Mapping[str, object],
    reader: Reader,
    directory: Path,
    on_progress: OnProgress = lambda count: None,
) -> Verdict:
    """Compare `tensors` with those in the safetensors files of `directory`.

    Raises CheckpointError if the directory holds no valid safetensors files, ReadFault if a shard
    cannot be read. In memory are a few pieces of PIECE bytes.
    """
    real = _real_tensors(directory)
    ours = {tensor.name: tensor for tensor in tensors}
    differences = [
        *(Difference(name, f"is not in {directory}") for name in ours if name not in real),
        *(Difference(name, "is not in the checkpoint") for name in real if name not in ours),
    ]
    both = []
    for name in (name for name in ours if name in real):
        if problem := _described(ours[name], real[name]):
            differences.append(Difference(name, problem))
        else:
            both.append(name)

    def compare(name: str) -> Difference | None:
        problem = _compare(ours[name], real[name], reader, on_progress)
        return Difference(name, problem) if problem else None

    with ThreadPoolExecutor(_THREADS) as pool:
        found = [difference for difference in pool.map(compare, both) if difference is not None]
    return Verdict(
        len(both) - len(found),
        sum(ours[name].nbytes for name in both),
        (*differences, *found),
        tuple(_config_differences(config, directory)),
    )


def _described(ours: HfTensor, real: _Real) -> str | None:
    if ours.shape != real.shape:
        return f"has shape {list(ours.shape)} in the checkpoint, {list(real.shape)} there"
    if ours.dtype.name != real.dtype:
        return f"is {ours.dtype.name} in the checkpoint, {real.dtype} there (--dtype casts)"
    return None


def _compare(ours: HfTensor, real: _Real, reader: Reader, on_progress: OnProgress) -> str | None:
    """How many elements differ, and where the first of them is; None if all are equal."""
    differing, first = 0, -1
    size = ours.dtype.itemsize
    step = PIECE // size * size
    with real.path.open("rb", buffering=0) as file:
        for start in range(0, ours.nbytes, step):
            count = min(step, ours.nbytes - start)
            have, want = bytearray(count), bytearray(count)
            reader.read_tensor(ours.view, start, memoryview(have))
            file.seek(real.offset + start)
            if file.readinto(want) != count:
                raise ReadFault(f"{real.path} ends before tensor {ours.name} does")
            on_progress(count)
            if have == want:
                continue
            unequal = _elements(have, ours.dtype) != _elements(want, ours.dtype)
            if first < 0:
                first = start // size + int(unequal.argmax())
            differing += int(np.count_nonzero(unequal))
    if not differing:
        return None
    index = [int(i) for i in np.unravel_index(first, ours.shape)] if ours.shape else []
    return f"differs in {differing:,} of {ours.nbytes // size:,} elements, first at {index}"


def _elements(data: bytearray, dtype: DType) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    return np.frombuffer(data, dtype.carrier)


def _real_tensors(directory: Path) -> dict[str, _Real]:
    found: dict[str, _Real] = {}
    for path in _files(directory):
        for tensor_name, tensor in _header(path):
            if tensor_name in found:
                raise CheckpointError(
                    f"{tensor_name} is both in {found[tensor_name].path} and in {path}"
                )
            found[tensor_name] = tensor
    return found


def _files(directory: Path) -> list[Path]:
    """The model's safetensors files: those of the index, else all there are."""
    try:
        index = json.loads((directory / INDEX).read_bytes())
        named = sorted({str(name) for name in index["weight_map"].values()})
    except FileNotFoundError:
        paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(
                f"{directory} holds no *.safetensors file: pass a Hugging Face model directory"
            ) from None
        return paths
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{directory / INDEX} cannot be read: {problem!r}") from None
    for name in named:
        if "/" in name or name in ("", ".", "..") or "\0" in name:
            raise CheckpointError(f"{directory / INDEX} names a file {name!r}: not a plain name")
    return [directory / name for name in named]


def _header(path: Path) -> Iterator[tuple[str, _Real]]:
    """The tensors of a file whose header the safetensors library accepts."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # reads and validates the header, no data
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError) as problem:
        raise CheckpointError(f"{path} is not a valid safetensors file: {problem}") from None
    for name, tensor in header.items():
        if name != "__metadata__":
            start, end = tensor["data_offsets"]
            yield (
                name,
                _Real(
                    path, 8 + length + start, end - start, tensor["dtype"], tuple(tensor["shape"])
                ),
            )


def _config_differences(config: Mapping[str, object], directory: Path) -> Iterator[Difference]:
    try:
        stated = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return
    if not isinstance(stated, dict):
        return
    for key in sorted(config.keys() & stated.keys() - set(IGNORED_KEYS)):
        if config[key] != stated[key]:
            here, there = json.dumps(config[key]), json.dumps(stated[key])
            yield Difference(key, f"is {here} from the checkpoint, {there} there")
