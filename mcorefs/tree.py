"""VirtualTree: the Hugging Face model directory that mcorefs presents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mcorefs.files import BytesFile, VirtualFile
from mcorefs.layout import INDEX, lay_out
from mcorefs.mapping.config import dump
from mcorefs.model import Model
from mcorefs.reader import Reader, SafetensorsFile
from mcorefs.storage import Storage


@dataclass(frozen=True)
class VirtualTree:
    """Files by relative posix path ("config.json", "additional_chat_templates/tool.jinja").

    Directories exist because files lie in them. Immutable once built.
    """

    files: Mapping[str, VirtualFile]
    mtime_ns: int
    """Modification time shown for every file: that of the checkpoint, equal on every machine."""
    source: str = ""
    """Names, sizes and times of the shard files behind it: the same text, the same bytes."""


def build(model: Model, shard_size: int | str, cache_bytes: int) -> tuple[VirtualTree, Reader]:
    """The tree of `model`, and the reader behind its tensor files. Reads no tensor data."""
    storage = Storage(model.checkpoint.files)
    reader = Reader(storage, cache_bytes)
    layouts, index = lay_out(model.tensors, shard_size)
    files: dict[str, VirtualFile] = {
        "config.json": BytesFile(dump(model.config)),
        "generation_config.json": BytesFile(model.generation_config),
    }
    for name, data in model.tokenizer.files.items():
        files[name] = BytesFile(data)
    for name, layout in layouts.items():
        files[name] = SafetensorsFile(layout, reader)
    if index is not None:
        files[INDEX] = BytesFile(index)
    shards = model.checkpoint.files
    mtime_ns = max(identity.mtime_ns for identity in shards.values())
    source = "".join(
        f"{path} {identity.size} {identity.mtime_ns}\n" for path, identity in sorted(shards.items())
    )
    return VirtualTree(dict(sorted(files.items())), mtime_ns, source), reader
