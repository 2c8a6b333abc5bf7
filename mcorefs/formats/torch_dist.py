"""`torch_dist`: what megatron-core's dist_checkpointing writes.

    iter_0000100/metadata.json      {"sharded_backend": "torch_dist", ...}
    iter_0000100/.metadata          pickle: fqn -> dtype, shape, chunks; (fqn, offset) -> file range
    iter_0000100/__R_W.distcp       entries, each a whole `torch.save` archive of one chunk
    iter_0000100/common.pt          training args and the like (megatron-core up to 0.18), or
                                    the entry `common_state/shard_0_1` (from 0.19)

Layout facts: Megatron-LM:megatron/core/dist_checkpointing/{core,serialization}.py and
strategies/torch.py; pytorch:torch/distributed/checkpoint/{metadata,filesystem}.py.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from mcorefs.boxes import Box, Shape
from mcorefs.dtypes import DType
from mcorefs.errors import CheckpointError
from mcorefs.formats.base import Checkpoint, reading, refusal, training_args
from mcorefs.index import Chunk, Span, StoredTensor, stored_tensor
from mcorefs.storage import FileIdentity, regular_file
from mcorefs.torchzip import load_object
from mcorefs.unpickle import (
    Attributes,
    Inert,
    Metadata,
    MetadataIndex,
    TensorProperties,
    loads,
)

COMMON_STATE = "common_state/shard_0_1"
"""ShardedObject("common_state", shape (1,), offset (0,)).unique_key, since megatron-core 0.19."""

_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


class TorchDist:
    """Format `torch_dist`."""

    name = "torch_dist"

    def detect(self, path: Path) -> bool:
        try:
            if not ((path / "metadata.json").is_file() and (path / ".metadata").is_file()):
                return False
            with (path / "metadata.json").open("rb") as file:
                described = json.loads(file.read(1 << 16))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(described, dict) and described.get("sharded_backend") == self.name

    def index(self, path: Path) -> Checkpoint:
        metadata = _read_metadata(path / ".metadata")
        storage = _StorageTable(path, metadata)
        problems: list[str] = []
        tensors: dict[str, StoredTensor] = {}
        skipped: Counter[str] = Counter()
        for fqn, entry in _entries(metadata):
            if (kind := _kind(fqn, entry)) != "model":
                skipped[kind] += 1
                continue
            tensor, problem = _tensor(fqn, entry, storage)
            if tensor is not None:
                tensors[fqn] = tensor
            problems.extend([problem] if problem else [])
        files = storage.check_files(tensors.values(), problems)
        if problems:
            raise refusal(path, problems)
        if not tensors:
            raise CheckpointError(_no_weights(path, skipped))
        args, source = _args(path, storage)
        return Checkpoint(self.name, path, tensors, args, source, files, dict(skipped))


def _read_metadata(path: Path) -> Metadata:
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise CheckpointError(f"{path}: {problem.strerror}") from None
    found = loads(data, str(path))
    if not isinstance(found, Metadata):
        kind = str(getattr(found, "name", found))
        raise CheckpointError(f"{path}: expected torch's checkpoint Metadata, found {kind:.80}")
    return found


def _entries(metadata: Metadata) -> Iterator[tuple[str, object]]:
    entries = getattr(metadata, "state_dict_metadata", None)
    if not isinstance(entries, dict):
        raise CheckpointError(".metadata has no state_dict_metadata: it is damaged")
    for fqn, entry in entries.items():
        if not isinstance(fqn, str):
            raise CheckpointError(f".metadata names an entry {fqn!r:.80}, which is not a string")
        yield fqn, entry


def _kind(fqn: str, entry: object) -> str:
    """Which kind of entry `fqn` is; only "model" entries are weights."""
    if _OPTIMIZER.match(fqn):
        return "optimizer"
    if "_extra_state" in fqn:
        return "_extra_state"
    if "/shard_" in fqn or isinstance(entry, Inert) or fqn.startswith("rng_state"):
        return "object"
    return "model"


def _tensor(
    fqn: str, entry: object, storage: _StorageTable
) -> tuple[StoredTensor | None, str | None]:
    """The tensor that `.metadata` describes, or what is wrong with it."""
    properties = getattr(entry, "properties", None)
    dtype = properties.dtype if isinstance(properties, TensorProperties) else None
    if not isinstance(dtype, DType):
        return None, f"{fqn}: its dtype {getattr(dtype, 'name', dtype)!s:.60} is not one we know"
    shape = _shape(getattr(entry, "size", None))
    described = getattr(entry, "chunks", None)
    if shape is None or not isinstance(described, list):
        return None, f"{fqn}: .metadata gives no shape or no chunks"
    chunks = []
    for chunk in described:
        offsets = _shape(getattr(chunk, "offsets", None))
        sizes = _shape(getattr(chunk, "sizes", None))
        if offsets is None or sizes is None:
            return None, f"{fqn}: a chunk has no offsets or no sizes"
        if 0 in sizes:
            continue
        span = storage.span(fqn, offsets)
        if isinstance(span, str):
            return None, f"{fqn}: chunk at {list(offsets)}: {span}"
        chunks.append(Chunk(Box(offsets, sizes), span))
    return stored_tensor(fqn, dtype, shape, tuple(chunks))


class _StorageTable:
    """Where each chunk lies: the `storage_data` of `.metadata`, joined on (fqn, offset)."""

    def __init__(self, root: Path, metadata: Metadata) -> None:
        self.root = root
        self._ranges: dict[tuple[str, Shape | None], Attributes] = {}
        self._paths: dict[str, str] = {}
        data = getattr(metadata, "storage_data", None)
        if not isinstance(data, dict):
            raise CheckpointError(f"{root}/.metadata has no storage_data: it is damaged")
        for index, info in data.items():
            if isinstance(index, MetadataIndex) and isinstance(info, Attributes):
                fqn, offset = index.__dict__.get("fqn"), index.__dict__.get("offset")
                self._ranges[fqn, offset] = info  # type: ignore[index]

    def span(self, fqn: str, offset: Shape | None) -> Span | str:
        """The archive that holds the chunk of `fqn` at `offset`, or what is wrong with it."""
        info = self._ranges.get((fqn, offset))
        if info is None:
            return "no shard file holds it, so the checkpoint was not saved completely"
        name, start, nbytes = (
            info.__dict__.get(key) for key in ("relative_path", "offset", "length")
        )
        if not (isinstance(name, str) and type(start) is int and type(nbytes) is int):
            return "its place on disk is not given"
        if info.__dict__.get("transform_descriptors"):
            return "it is stored compressed (transform_descriptors), which cannot be read lazily"
        if start < 0 or nbytes <= 0:
            return f"its place on disk is impossible (offset {start}, length {nbytes})"
        if name not in self._paths:
            if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
                return f"its file name {name!r:.80} is not that of a file in the checkpoint"
            self._paths[name] = str(self.root / name)
        return Span(self._paths[name], start, nbytes, "torch_zip")

    def check_files(self, tensors: object, problems: list[str]) -> Mapping[str, FileIdentity]:
        """The files that hold `tensors`; each missing or short one is added to `problems`."""
        ends: dict[str, int] = {}
        for tensor in tensors:  # type: ignore[attr-defined]
            for chunk in tensor.chunks:
                end = chunk.span.offset + chunk.span.nbytes
                if end > ends.get(chunk.span.path, 0):
                    ends[chunk.span.path] = end
        files: dict[str, FileIdentity] = {}
        for path, end in sorted(ends.items()):
            identity, why = regular_file(path)
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


def _args(path: Path, storage: _StorageTable) -> tuple[Mapping[str, object], str]:
    """The training args as plain values, and where they were found."""
    common = path / "common.pt"
    if common.is_file():
        source, state = str(common), _load_range(str(common), 0, common.stat().st_size)
    else:
        span = storage.span(COMMON_STATE, None)
        if isinstance(span, str):
            span = storage.span(COMMON_STATE, (0,))
        if isinstance(span, str):
            return {}, f"{path} has neither common.pt nor a {COMMON_STATE} entry"
        source = f"{COMMON_STATE} in {span.path}"
        state = _load_range(span.path, span.offset, span.nbytes)
        if isinstance(state, list) and state:
            state = state[0]
    return training_args(state, source)


def _load_range(path: str, offset: int, nbytes: int) -> object:
    """The object in the `torch.save` archive at [offset, offset + nbytes) of `path`."""
    with reading(path, offset) as pread:
        return load_object(pread, nbytes, path)


def _shape(value: object) -> Shape | None:
    if isinstance(value, tuple) and all(type(n) is int for n in value):
        return value
    return None


def _no_weights(path: Path, skipped: Mapping[str, int]) -> str:
    held = ", ".join(f"{count} {kind}" for kind, count in skipped.items()) or "no"
    return (
        f"{path} holds no model weights ({held} entries). If the run saved Hugging Face "
        "safetensors beside it (ms-swift save_safetensors with no_save_optim), use those; "
        "if it holds only an optimizer, pass the directory of the model."
    )
