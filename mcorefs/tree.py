"""VirtualTree: the Hugging Face model directory that mcorefs presents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mcorefs import passthrough
from mcorefs.activity import About, Activity
from mcorefs.deadline import Deadline
from mcorefs.errors import NoWeightsError
from mcorefs.files import BytesFile, VirtualFile
from mcorefs.formats import HUGGINGFACE
from mcorefs.layout import INDEX, lay_out
from mcorefs.locate import Location, locate
from mcorefs.mapping.config import dump
from mcorefs.memory import cache_budget, gc_paused
from mcorefs.model import Model, Options, load_at
from mcorefs.passthrough import WEIGHTS, Passthrough
from mcorefs.patience import patiently
from mcorefs.rate import NO_LIMIT, Rate
from mcorefs.reader import Reader, SafetensorsFile, TileCache
from mcorefs.remote.ahead import PIECE, AheadFile, ReadAhead
from mcorefs.storage import FileIdentity, Storage

Source = Model | Passthrough
"""What a tree is made of: a checkpoint to present, or a model directory to pass on."""


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
    about: About | None = field(default=None, compare=False)
    activity: Activity = field(default_factory=Activity, compare=False)
    """Of the reader behind it."""

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    @property
    def weights(self) -> dict[str, VirtualFile]:
        """The files that hold weights."""
        return {name: file for name, file in self.files.items() if name.endswith(WEIGHTS)}


@dataclass(frozen=True)
class Opened:
    """A path that a user gave, ready to be served."""

    source: Source
    tree: VirtualTree
    reader: Reader
    """Behind the tensors of `source` and the files of `tree`."""


@dataclass(frozen=True)
class Means:
    """What a tree is read with."""

    cache_bytes: int
    rate: Rate = NO_LIMIT
    deadline: Deadline | None = None
    max_open: int = 512
    """Files held open."""
    activity: Activity = field(default_factory=Activity)
    """Counts what is done with them."""
    cache: TileCache | None = None
    """One that several trees share, instead of one of `cache_bytes` for each."""

    @staticmethod
    def of(options: Options) -> Means:
        """As `options` say. Raises McorefsError if there is not so much memory."""
        rate = NO_LIMIT if options.max_read_rate is None else Rate(options.max_read_rate)
        deadline = Deadline.of(options.read_timeout)
        return Means(cache_budget(options.cache_bytes), rate, deadline)


def open_tree(path: Path, options: Options, means: Means | None = None) -> Opened:
    """The tree of whatever is at `path`. Reads no tensor data.

    Raises CheckpointError if it cannot be opened, MappingError with every problem of its mapping.
    """
    with gc_paused():
        return patiently(lambda: _open_tree(path, options, means), options.read_timeout)


def _open_tree(path: Path, options: Options, means: Means | None) -> Opened:
    source = source_at(locate(path, options.iteration, options.format), options)
    means = means or Means.of(options)
    tree, reader = build(source, options.shard_size, means)
    tree = replace(tree, about=_about(source), activity=means.activity)
    return Opened(source, tree, reader)


def _about(source: Source) -> About:
    location, family = source.location, source.config.get("model_type")
    return About(
        str(location.path),
        location.iteration,
        location.format.name,
        source.architecture,
        family if isinstance(family, str) else None,
    )


def source_at(location: Location, options: Options) -> Source:
    """What is at `location`, or what its trainer saved instead of weights."""
    if location.format is not HUGGINGFACE:
        try:
            return load_at(location, options)
        except NoWeightsError as error:
            location = passthrough.instead(location, error)
    return passthrough.read(location, options)


def build(source: Source, shard_size: int | str, means: Means | int) -> tuple[VirtualTree, Reader]:
    """The tree of `source`, and the reader behind it. Reads no tensor data.

    `means` may be just the bytes of the tile cache.
    """
    means = Means(means) if isinstance(means, int) else means
    if isinstance(source, Passthrough):
        storage, reader = _reader(source.identities, means)
        files = source.serve(storage, reader)
        return _tree(_ahead(files, storage), source.identities), reader
    storage, reader = _reader(source.checkpoint.files, means)
    layouts, index = lay_out(source.tensors, shard_size)
    files = {
        "config.json": BytesFile(dump(source.config)),
        "generation_config.json": BytesFile(source.generation_config),
    }
    for name, data in {**source.code, **source.tokenizer.files}.items():
        files[name] = BytesFile(data)
    for name, layout in layouts.items():
        files[name] = SafetensorsFile(layout, reader)
    if index is not None:
        files[INDEX] = BytesFile(index)
    return _tree(_ahead(files, storage), source.checkpoint.files), reader


def _reader(files: Mapping[str, FileIdentity], means: Means) -> tuple[Storage, Reader]:
    """What reads `files`. Where there are remote ones, half of the bytes for tiles is for blocks of
    them, and some for what is read ahead of readers."""
    cache_bytes = means.cache_bytes
    storage = Storage(
        files, means.max_open, cache_bytes // 2, means.rate, means.deadline, means.activity
    )
    if storage.is_remote:
        cache_bytes -= cache_bytes // 2 + storage.pieces_ahead * PIECE
    return storage, Reader(storage, means.cache or TileCache(cache_bytes, means.activity))


def _ahead(files: dict[str, VirtualFile], storage: Storage) -> dict[str, VirtualFile]:
    """`files`, in which readers are read ahead of where that is worth it."""
    if not storage.pieces_ahead:
        return files
    ahead = ReadAhead(storage.pieces_ahead)
    return {
        name: file if isinstance(file, BytesFile) else AheadFile(file, ahead)
        for name, file in files.items()
    }


def _tree(files: Mapping[str, VirtualFile], real: Mapping[str, FileIdentity]) -> VirtualTree:
    """`files`, which are made of the bytes of `real` files."""
    mtime_ns = max(identity.mtime_ns for identity in real.values())
    source = "".join(
        f"{path} {identity.size} {identity.mtime_ns} {identity.version}".rstrip() + "\n"
        for path, identity in sorted(real.items())
    )
    return VirtualTree(dict(sorted(files.items())), mtime_ns, source)
