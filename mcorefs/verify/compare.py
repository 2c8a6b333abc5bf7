"""Comparing a checkpoint with an existing Hugging Face directory, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mcorefs.deadline import Deadline
from mcorefs.dtypes import DType
from mcorefs.errors import CheckpointError
from mcorefs.formats.base import refusal
from mcorefs.formats.huggingface import Weights, read_weights
from mcorefs.index import StoredTensor
from mcorefs.mapping.plan import HfTensor
from mcorefs.patience import READ_TIMEOUT, patiently
from mcorefs.reader import Reader
from mcorefs.storage import Storage, read_file
from mcorefs.verify.findings import PIECE, Difference, OnProgress, threads

IGNORED_KEYS = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "architectures")
"""Keys of config.json that may differ between two descriptions of one model."""


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


def verify(
    tensors: Sequence[HfTensor],
    config: Mapping[str, object],
    reader: Reader,
    directory: Path,
    on_progress: OnProgress = lambda count: None,
    read_timeout: float | None = READ_TIMEOUT,
) -> Verdict:
    """Compare `tensors` with those in the safetensors files of `directory`.

    Raises CheckpointError if the directory holds no valid safetensors files, ReadFault if a shard
    cannot be read. In memory are a few pieces of PIECE bytes.
    """
    weights = patiently(lambda: _real_weights(directory), read_timeout)
    storage = Storage(weights.files, deadline=Deadline.of(read_timeout))
    real, unknown = weights.tensors, weights.unknown
    ours = {tensor.name: tensor for tensor in tensors}
    there = {*real, *unknown}
    differences = [
        *(Difference(name, f"is not in {directory}") for name in ours if name not in there),
        *(Difference(name, f"is {unknown[name]} there") for name in ours if name in unknown),
        *(Difference(name, "is not in the checkpoint") for name in there if name not in ours),
    ]
    both = []
    for name in (name for name in ours if name in real):
        if problem := _described(ours[name], real[name]):
            differences.append(Difference(name, problem))
        else:
            both.append(name)

    def compare(name: str) -> Difference | None:
        problem = _compare(ours[name], real[name], reader, storage, on_progress)
        return Difference(name, problem) if problem else None

    with ThreadPoolExecutor(threads()) as pool:
        found = [difference for difference in pool.map(compare, both) if difference is not None]
    storage.close()
    return Verdict(
        len(both) - len(found),
        sum(ours[name].nbytes for name in both),
        (*differences, *found),
        patiently(lambda: tuple(_config_differences(config, directory)), read_timeout),
    )


def _described(ours: HfTensor, real: StoredTensor) -> str | None:
    if ours.shape != real.shape:
        return f"has shape {list(ours.shape)} in the checkpoint, {list(real.shape)} there"
    if ours.dtype != real.dtype:
        return f"is {ours.dtype.name} in the checkpoint, {real.dtype.name} there (--dtype casts)"
    return None


def _compare(
    ours: HfTensor,
    real: StoredTensor,
    reader: Reader,
    storage: Storage,
    on_progress: OnProgress,
) -> str | None:
    """How many elements differ, and where the first of them is; None if all are equal."""
    if not real.chunks:
        return None  # no elements
    span = real.chunks[0].span
    differing, first = 0, -1
    size = ours.dtype.itemsize
    step = PIECE // size * size
    for start in range(0, ours.nbytes, step):
        count = min(step, ours.nbytes - start)
        have, want = bytearray(count), bytearray(count)
        reader.read_tensor(ours.view, start, memoryview(have))
        storage.read_into(span.path, span.offset + start, memoryview(want))
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


def _real_weights(directory: Path) -> Weights:
    problems: list[str] = []
    weights = read_weights(directory, problems, Path.resolve)
    if problems:
        raise refusal(directory, problems)
    if not weights.files:
        raise CheckpointError(
            f"{directory} holds no *.safetensors file: pass a Hugging Face model directory"
        )
    return weights


def _config_differences(config: Mapping[str, object], directory: Path) -> Iterator[Difference]:
    try:
        stated = json.loads(read_file(directory / "config.json", 16 << 20))
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(stated, dict):
        return
    for key in sorted(config.keys() & stated.keys() - set(IGNORED_KEYS)):
        if config[key] != stated[key]:
            here, there = json.dumps(config[key]), json.dumps(stated[key])
            yield Difference(key, f"is {here} from the checkpoint, {there} there")
