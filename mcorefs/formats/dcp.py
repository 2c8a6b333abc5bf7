"""A `torch.distributed.checkpoint` directory: what `torch_dist` and the FSDP formats share.

    .metadata           pickle: fqn -> dtype, shape, chunks; (fqn, offset) -> range of a file
    __R_W.distcp        entries, each a whole `torch.save` archive of one chunk

Layout facts: pytorch:torch/distributed/checkpoint/{metadata,filesystem}.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mcorefs.boxes import Box, Shape
from mcorefs.dtypes import DType
from mcorefs.errors import CheckpointError
from mcorefs.formats.base import reading
from mcorefs.index import Chunk, Span, StoredTensor, stored_tensor
from mcorefs.storage import FileIdentity, regular_file
from mcorefs.torchzip import load_object
from mcorefs.unpickle import Attributes, Metadata, MetadataIndex, TensorProperties, describe, loads


def read_metadata(path: Path) -> Metadata:
    """The `.metadata` file at `path`, as data."""
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise CheckpointError(f"{path}: {problem.strerror}") from None
    found = loads(data, str(path))
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
        if not isinstance(fqn, str):
            raise CheckpointError(f".metadata names an entry by a {describe(fqn)}, not by a string")
        yield fqn, entry


class StorageTable:
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
                if isinstance(fqn, str) and (offset is None or _shape(offset) is not None):
                    self._ranges[fqn, offset] = info

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

    def check_files(
        self, tensors: Iterable[StoredTensor], problems: list[str]
    ) -> Mapping[str, FileIdentity]:
        """The files that hold `tensors`; each missing or short one is added to `problems`."""
        ends: dict[str, int] = {}
        for tensor in tensors:
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


def read_tensor(
    fqn: str, entry: object, storage: StorageTable
) -> tuple[StoredTensor | None, str | None]:
    """The tensor that `.metadata` describes, or what is wrong with it."""
    properties = getattr(entry, "properties", None)
    dtype = properties.dtype if isinstance(properties, TensorProperties) else None
    if not isinstance(dtype, DType):
        return None, f"{fqn}: its dtype {describe(dtype)} is not one we know"
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


def load_range(path: str, offset: int, nbytes: int) -> object:
    """The object in the `torch.save` archive at [offset, offset + nbytes) of `path`."""
    with reading(path, offset) as pread:
        return load_object(pread, nbytes, path)


def _shape(value: object) -> Shape | None:
    if isinstance(value, tuple) and len(value) <= 64 and all(type(n) is int for n in value):
        return value
    return None
