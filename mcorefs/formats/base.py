"""What every on-disk format gives to the layers above, and how one is added.

A format is one file in this folder that implements `Format`, and one line in
`mcorefs/formats/__init__.py`. It reads metadata only, never tensor data, and knows no model family.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar, runtime_checkable

from mcorefs.errors import CheckpointError, ReadFault
from mcorefs.index import MAX_BYTES, StoredTensor
from mcorefs.patience import again
from mcorefs.remote import is_url
from mcorefs.storage import FileIdentity, regular_file
from mcorefs.tar import member_at, open_archive
from mcorefs.torchzip import Pread
from mcorefs.unpickle import Attributes, plain

MAX_SHOWN = 50
"""Problems listed one by one before the rest are only counted."""
REMOTE_READERS = 32
"""Remote files looked at side by side, which costs little but waiting."""
REMOTE_BLOCK = 256 << 10
"""Bytes fetched at once of a remote file of which only the ends of archives are read."""

T = TypeVar("T")
R = TypeVar("R")

WeightsFrom = Literal["model", "optimizer"]
"""Which weights: the model's own, or the main parameters that its optimizer keeps in float32."""


@dataclass(frozen=True)
class Checkpoint:
    """One iteration of a training run, as its format describes it."""

    format: str
    path: Path
    """The directory that holds the shard files."""
    tensors: Mapping[str, StoredTensor]
    """Model tensors by fqn; optimizer, rng and `_extra_state` entries are not among them."""
    args: Mapping[str, object]
    """The training arguments as plain values; empty where the checkpoint records none."""
    args_source: str
    """Where `args` were found, or why there are none, in words for the user."""
    files: Mapping[str, FileIdentity]
    """The shard files that hold `tensors`, as they were when the index was made."""
    skipped: Mapping[str, int]
    """How many entries of each kind were left aside, e.g. {"optimizer": 1200}."""
    fc1_ranks: Mapping[str, int] = field(default_factory=dict)
    """Fqns of those linear_fc1 whose rows are the gate, then the up rows of each of so many
    tensor-parallel ranks in turn; all others have all gate rows first, or are not gated."""
    remarks: tuple[str, ...] = ()
    """What the user should know."""


class Format(Protocol):
    """Reads one on-disk format. Stateless."""

    name: str

    def detect(self, path: Path) -> bool:
        """Whether `path` is one complete iteration in this format. Cheap: looks at names only."""
        ...

    def index(self, path: Path, weights: WeightsFrom = "model") -> Checkpoint:
        """The checkpoint in `path`. Raises CheckpointError with every problem found, also where
        the `weights` asked for are not stored in a way that can be read."""
        ...


@dataclass(frozen=True)
class Replica:
    """Two copies of one tensor, which different ranks saved: equal, if training was sound."""

    name: str
    first: StoredTensor
    """The copy that is served."""
    first_rank: str
    other: StoredTensor
    other_rank: str


@runtime_checkable
class KeepsReplicas(Protocol):
    """A format that stores some tensors more than once."""

    def replicas(self, path: Path) -> Iterator[Replica]:
        """Every copy in `path` beside the one that is served. Reads no tensor data."""
        ...


def refusal(path: Path, problems: Sequence[str]) -> CheckpointError:
    """The error that reports all `problems` of the checkpoint at `path`."""
    shown = "".join(f"\n  - {problem}" for problem in problems[:MAX_SHOWN])
    more = len(problems) - MAX_SHOWN
    rest = f"\n  ... and {more} more" if more > 0 else ""
    return CheckpointError(f"{path} cannot be opened:{shown}{rest}")


def training_args(state: object, source: str) -> tuple[Mapping[str, object], str]:
    """The training args in a saved state dict as plain values, and where they were found."""
    args = state.get("args") if isinstance(state, dict) else None
    if not isinstance(args, Attributes):
        return {}, f"{source} holds no training args"
    try:
        return {str(name): plain(value) for name, value in args.__dict__.items()}, source
    except CheckpointError as problem:
        raise CheckpointError(f"{source}: {problem}") from None


def side_by_side(path: Path, read: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`read` of each item, in their order; where they lie at a remote `path`, many at a time."""
    if not is_url(str(path)):
        return [read(item) for item in items]
    with ThreadPoolExecutor(REMOTE_READERS) as pool:
        return list(pool.map(read, items))


@contextmanager
def reading(path: str, offset: int = 0, identity: FileIdentity | None = None) -> Iterator[Pread]:
    """`pread` on the file at `path`, counted from `offset`; it raises where it comes short.

    `identity` is what it is known to be; a remote file is asked for it otherwise.
    """
    if is_url(path):
        yield _reading_remote(path, offset, identity)
        return
    first, end = 0, MAX_BYTES
    try:
        if (member := member_at(path)) is not None:
            first, end = member.range
            fd = open_archive(member)
        else:
            # O_NONBLOCK: a FIFO must not wait for a writer; then reading it fails.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = again(lambda: os.open(path, flags))
    except OSError as problem:
        raise CheckpointError(f"{path}: {problem.strerror}") from None

    def pread(start: int, count: int) -> bytes:
        try:
            at = first + offset + start
            data = again(lambda: os.pread(fd, max(min(count, end - at), 0), at))
        except (OSError, OverflowError) as problem:
            raise CheckpointError(f"{path}: {problem}") from None
        if len(data) < count:
            raise CheckpointError(
                f"{path} is cut short: wanted {count} bytes at {offset + start}, got {len(data)}"
            )
        return data

    try:
        yield pread
    finally:
        os.close(fd)


def _reading_remote(path: str, offset: int, identity: FileIdentity | None) -> Pread:
    from mcorefs.remote.objects import Objects

    if identity is None:
        identity, why = regular_file(path)
        if identity is None:
            raise CheckpointError(f"{path}: {why}")
    objects = Objects({path: identity}, block_bytes=REMOTE_BLOCK)

    def pread(start: int, count: int) -> bytes:
        out = bytearray(count)
        try:
            objects.read_into(path, offset + start, memoryview(out))
        except ReadFault as fault:
            raise CheckpointError(str(fault)) from None
        return bytes(out)

    return pread
