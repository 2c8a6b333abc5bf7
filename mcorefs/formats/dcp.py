"""A `torch.distributed.checkpoint` directory: what `torch_dist` and the FSDP formats share.

    .metadata           pickle: fqn -> dtype, shape, chunks; (fqn, offset) -> range of a file
    __R_W.distcp        entries, each a whole `torch.save` archive of one chunk
    metadata.json       which of megatron-core's backends wrote it; not in all of these formats

Layout facts: pytorch:torch/distributed/checkpoint/{metadata,filesystem}.py.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mcorefs.boxes import Box, Shape
from mcorefs.dtypes import DType
from mcorefs.errors import CheckpointError, NoWeightsError
from mcorefs.formats.base import WeightsFrom, reading, training_args
from mcorefs.formats.main_params import Choice, Described, choose, model_name
from mcorefs.index import Chunk, Span, StoredTensor, stored_tensor
from mcorefs.pickle_objects import Without
from mcorefs.records import MetadataIndex, StorageInfo, TensorProperties
from mcorefs.remote import is_url
from mcorefs.storage import (
    FileIdentity,
    is_file,
    is_file_name,
    is_there,
    read_file,
    read_start,
    regular_file,
)
from mcorefs.torchzip import load_object
from mcorefs.unpickle import (
    Inert,
    Metadata,
    describe,
    loads,
)

PLANS = "all_local_plans"
"""What every rank was to write: a second copy of it all, and the last of the attributes
(Megatron-LM:megatron/core/dist_checkpointing/strategies/state_dict_saver.py)."""
MAX_METADATA = 2 << 30
"""Bytes of `.metadata`: that of a run of 671B parameters has some hundred million."""

BYTES = "torch.distributed.checkpoint.metadata.BytesStorageMetadata"
_OPTIMIZER = re.compile(r"(chained_\d+\.)*optim\w*\.")
_OBJECTS = ("rng_state", "rerun_state_machine")


@dataclass(frozen=True)
class Contents:
    """What a directory holds."""

    tensors: Mapping[str, StoredTensor]
    """By fqn of the model, also those that are its main parameters."""
    storage: StorageTable
    files: Mapping[str, FileIdentity]
    """Those that hold `tensors`."""
    skipped: Mapping[str, int]
    """How many entries of each other kind there are."""
    sharded_objects: int
    """How many entries are megatron-core's ShardedObject, which only `torch_dist` writes."""
    remarks: tuple[str, ...]


def read_directory(
    path: Path, weights: WeightsFrom, also: Collection[str], problems: list[str]
) -> Contents:
    """The weights in the checkpoint directory `path`; whatever is wrong is added to `problems`.

    `also`: fqns of entries that are no weights but whose place is wanted. Raises NoWeightsError.
    """
    metadata = read_metadata(path / ".metadata", partial(_is_needless, weights))
    model: dict[str, object] = {}
    optimizer: dict[str, object] = {}
    skipped: Counter[str] = Counter()
    sharded_objects = 0
    for fqn, entry in entries(metadata):
        is_object = isinstance(entry, Inert) and entry.name == BYTES
        if (kind := kind_of(fqn, is_object)) == "model":
            model[fqn] = entry
            continue
        skipped[kind] += 1
        sharded_objects += "/shard_" in fqn
        if kind == "optimizer" and weights == "optimizer":
            optimizer[fqn] = entry
    remarks: tuple[str, ...] = ()
    taken = {fqn: fqn for fqn in model}
    if weights == "optimizer":
        choice = _main_params(model, optimizer)
        taken |= choice.main_params
        problems += choice.problems
        remarks = choice.remarks
    storage = StorageTable(path, metadata, {*taken.values(), *also})
    tensors: dict[str, StoredTensor] = {}
    for name, fqn in taken.items():
        tensor, problem = read_tensor(fqn, model[fqn] if fqn == name else optimizer[fqn], storage)
        if tensor is not None:
            tensors[name] = tensor if fqn == name else replace(tensor, fqn=name)
        problems.extend([problem] if problem else [])
    files = storage.check_files(problems)
    if not model:
        raise NoWeightsError(f"{path} cannot be opened: {_no_weights(skipped)}")
    return Contents(tensors, storage, files, dict(skipped), sharded_objects, remarks)


def _main_params(model: Mapping[str, object], optimizer: Mapping[str, object]) -> Choice:
    """Which main parameters to take for what the model holds."""

    def described(fqn: str, entry: object) -> Described:
        dtype = getattr(getattr(entry, "properties", None), "dtype", None)
        return Described(fqn, describe(dtype), _shape(getattr(entry, "size", None)))

    mains = {
        name: described(fqn, entry)
        for fqn, entry in optimizer.items()
        if (name := model_name(fqn)) is not None
    }
    return choose((described(*item) for item in model.items()), mains, optimizer)


def _no_weights(skipped: Mapping[str, int]) -> str:
    held = ", ".join(f"{count} {kind}" for kind, count in skipped.items()) or "no"
    return (
        f"it holds no model weights ({held} entries). If the run saved Hugging Face safetensors "
        "beside it (ms-swift save_safetensors with no_save_optim), use those; if it holds only an "
        "optimizer, pass the directory of the model"
    )


def kind_of(fqn: str, is_object: bool) -> str:
    """Which kind of entry `fqn` is; only "model" entries are weights."""
    if _OPTIMIZER.match(fqn):
        return "optimizer"
    if "_extra_state" in fqn:
        return "_extra_state"
    if is_object or "/shard_" in fqn or fqn.startswith(_OBJECTS):
        return "object"
    return "model"


def sharded_backend(path: Path) -> str | None:
    """The backend that `metadata.json` in `path` names: None without such a file, "" where it
    cannot be read (Megatron-LM:megatron/core/dist_checkpointing/core.py)."""
    file = path / "metadata.json"
    if not is_there(file):
        return None
    if not is_file(file):
        return ""
    try:
        described = json.loads(read_start(file, 1 << 16))
    except (OSError, ValueError, RecursionError):
        return ""
    named = described.get("sharded_backend") if isinstance(described, dict) else None
    return named if isinstance(named, str) else ""


def _is_needless(weights: WeightsFrom, fqn: str) -> bool:
    """Whether neither `fqn` nor its place is looked at, whatever kind of entry it is."""
    return "_extra_state" in fqn or (weights == "model" and _OPTIMIZER.match(fqn) is not None)


def read_metadata(path: Path, without: Without) -> Metadata:
    """The `.metadata` file at `path`, as data; of what `without` is true of, only the names."""
    try:
        is_remote = is_url(str(path))  # which is fetched in many pieces at once, and has its limit
        data = path.read_bytes() if is_remote else read_file(path, MAX_METADATA)
    except OSError as problem:
        raise CheckpointError(f"{path}: {problem.strerror}") from None
    found = loads(data, str(path), until=PLANS, without=without)
    if not isinstance(found, Metadata):
        raise CheckpointError(
            f"{path}: expected torch's checkpoint Metadata, found {describe(found)}"
        )
    return found


def entries(metadata: Metadata) -> Iterator[tuple[str, object]]:
    """(fqn, entry) for everything the checkpoint holds."""
    found = getattr(metadata, "state_dict_metadata", None)
    if not isinstance(found, dict):
        raise CheckpointError(".metadata has no state_dict_metadata: it is damaged")
    for fqn, entry in found.items():
        if not (isinstance(fqn, str) and fqn.isprintable()):
            raise CheckpointError(f".metadata names an entry {describe(fqn)}: it is damaged")
        yield fqn, entry


class StorageTable:
    """Where each chunk of the `wanted` fqns lies: `storage_data` of `.metadata`, which is joined to
    the chunks on (fqn, offset)."""

    def __init__(self, root: Path, metadata: Metadata, wanted: Container[object]) -> None:
        self.root = root
        self._ranges: dict[tuple[str, Shape | None], StorageInfo] = {}
        self._paths: dict[str, str] = {}
        self._ends: dict[str, int] = {}
        self._taken: dict[tuple[str, int], tuple[str, Shape | None]] = {}
        """Which chunk begins there: ranks write alike, and one read in the place of another would
        look whole."""
        data = getattr(metadata, "storage_data", None)
        if not isinstance(data, dict):
            raise CheckpointError(f"{root}/.metadata has no storage_data: it is damaged")
        for index, info in data.items():
            if isinstance(index, MetadataIndex) and isinstance(info, StorageInfo):
                fqn = index.fqn
                if isinstance(fqn, str) and fqn in wanted:
                    self._ranges[fqn, _shape(index.offset)] = info

    def bytes_entry(self, fqn: str) -> Span | None:
        """The archive that holds the object `fqn`, if the checkpoint has it.

        Raises CheckpointError if its place is not known or not possible.
        """
        places: tuple[Shape | None, ...] = (None, (0,))
        held = [place for place in places if (fqn, place) in self._ranges]
        if not held:
            return None
        span = self.span(fqn, held[0])
        if isinstance(span, str):
            raise CheckpointError(f"{fqn}: {span}")
        return span

    def span(self, fqn: str, offset: Shape | None) -> Span | str:
        """The archive that holds the chunk of `fqn` at `offset`, or what is wrong with it."""
        info = self._ranges.get((fqn, offset))
        if info is None:
            return "no shard file holds it, so the checkpoint was not saved completely"
        name, start, nbytes = info.relative_path, info.offset, info.length
        if not (isinstance(name, str) and type(start) is int and type(nbytes) is int):
            return "its place on disk is not given"
        if info.transform_descriptors:
            return "it is stored compressed (transform_descriptors), which cannot be read lazily"
        if start < 0 or nbytes <= 0:
            return f"its place on disk is impossible (offset {start}, length {nbytes})"
        if self._taken.setdefault((name, start), (fqn, offset)) != (fqn, offset):
            return f"its place on disk (byte {start} of {name!r:.80}) is that of another chunk"
        if name not in self._paths:
            if not is_file_name(name):
                return f"its file name {name!r:.80} is not that of a file in the checkpoint"
            self._paths[name] = str(self.root / name)
        path = self._paths[name]
        if start + nbytes > self._ends.get(path, 0):
            self._ends[path] = start + nbytes
        return Span(path, start, nbytes, "torch_zip")

    def check_files(self, problems: list[str]) -> Mapping[str, FileIdentity]:
        """The files of all spans asked for; each missing or short one is added to `problems`."""
        files: dict[str, FileIdentity] = {}
        for path, end in sorted(self._ends.items()):
            identity, why = regular_file(self.root / os.path.basename(path))
            if identity is None:
                problems.append(f"shard file {path}: {why}")
            elif identity.size < end:
                problems.append(
                    f"shard file {path} is cut short: it has {identity.size} bytes, "
                    f".metadata needs {end}; copy it again"
                )
            else:
                files[path] = identity
        return files


def read_tensor(
    fqn: str, entry: object, storage: StorageTable
) -> tuple[StoredTensor | None, str | None]:
    """The tensor that `.metadata` describes, or what is wrong with it."""
    if isinstance(entry, Inert):
        return None, f"{fqn}: .metadata describes it as {describe(entry)}, which is not known"
    properties = getattr(entry, "properties", None)
    dtype = properties.dtype if isinstance(properties, TensorProperties) else None
    if not isinstance(dtype, DType):
        return None, f"{fqn}: its dtype {describe(dtype)} is not one we know"
    shape = _shape(getattr(entry, "size", None))
    described = getattr(entry, "chunks", None)
    if shape is None or not isinstance(described, list):
        return None, f"{fqn}: .metadata gives no shape or no chunks"
    chunks: list[Chunk] = []
    faults: list[str] = []
    for chunk in described:
        offsets = _shape(getattr(chunk, "offsets", None))
        sizes = _shape(getattr(chunk, "sizes", None))
        if offsets is None or sizes is None or len(offsets) != len(sizes):
            faults.append("a chunk's offsets or sizes are not given, or do not fit each other")
        elif 0 not in sizes:
            span = storage.span(fqn, offsets)
            if isinstance(span, Span) and span.nbytes < math.prod(sizes) * dtype.itemsize:
                span = (
                    f"{span.nbytes} bytes on disk cannot hold {list(sizes)} of {dtype.torch}: "
                    ".metadata is damaged, or the tensor is stored quantised"
                )
            if isinstance(span, str):
                faults.append(f"chunk at {list(offsets)}: {span}")
            else:
                chunks.append(Chunk(Box(offsets, sizes), span))
    if faults:
        more = f" (and {len(faults) - 1} more of its chunks)" if len(faults) > 1 else ""
        return None, f"{fqn}: {faults[0]}{more}"
    return stored_tensor(fqn, dtype, shape, tuple(chunks))


def read_args(
    state_of: Callable[[], tuple[object, str]], problems: list[str]
) -> tuple[Mapping[str, object], str]:
    """The training args as plain values, and where they were found.

    `state_of` answers (the state that holds them, where it is), or (None, why there is none).
    """
    try:
        state, source = state_of()
        return ({}, source) if state is None else training_args(state, source)
    except CheckpointError as problem:
        problems.append(str(problem))
        return {}, "the training args cannot be read"


def common_file(path: Path) -> tuple[object, str] | None:
    """What `common.pt` in `path` holds, and its name; None without such a file."""
    common = path / "common.pt"
    if not is_there(common):
        return None
    return load_range(str(common), 0, common.lstat().st_size), str(common)


def load_range(path: str, offset: int, nbytes: int) -> object:
    """The object in the `torch.save` archive at [offset, offset + nbytes) of `path`.

    Raises CheckpointError where the file is not a regular one or does not reach so far.
    """
    identity, why = regular_file(path)
    if identity is None:
        raise CheckpointError(f"{path}: {why}")
    if identity.size < offset + nbytes:
        raise CheckpointError(
            f"{path} is cut short: it has {identity.size} bytes, {offset + nbytes} are needed"
        )
    with reading(path, offset, identity) as pread:
        return load_object(pread, nbytes, path)


def _shape(value: object) -> Shape | None:
    """`value` where it is a tuple of integers (as torch.Size is unpickled)."""
    if type(value) is not tuple or len(value) > 64:
        return None
    for number in value:
        if type(number) is not int:
            return None
    return value
