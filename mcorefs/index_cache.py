"""Indexes of checkpoints, kept on disk so that the next to open one need not make it again.

What a format makes of a directory depends on what lies in it and on the format, nothing else. So an
index is kept under the names, sizes, inodes and times (mtime and ctime, which no program can set)
of every file below the directory and of every file of this program, and used only while all of them
are what they were. What was changed less than SETTLED before it was looked at is not kept: it could
change once more without a trace. Everything that is made of an index (the model's names, its
config, the tokenizer) is made anew each time.

A file here is data: JSON and numbers behind their checksum. One that is not this user's own, or is
not whole, is not read. The shards that it names are looked for in the directory only, and each
tensor's chunks are proved to tile it again before any is read.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mcorefs.boxes import Box
from mcorefs.dtypes import BY_NAME
from mcorefs.files import FileIdentity
from mcorefs.formats import Checkpoint, Format, WeightsFrom
from mcorefs.index import MAX_DIMS, Chunk, Span, StoredTensor, remembered_tensor

MAX_BYTES = 256 << 20
"""Of all indexes that are kept; the one last used longest ago goes first."""
MAX_FILES = 100_000
"""In a directory, of which more are not looked at one by one."""
SETTLED = 2_000_000_000
"""Nanoseconds: the coarsest clock of a file system, twice."""
MAGIC = b"mcorefs index 1\n"
_KINDS = ("raw", "torch_zip", "zip_record")
_DIGEST = 32
_FIXED = 6
"""Numbers of a chunk beside its offsets, sizes and strides."""
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class _State:
    """A directory as it is."""

    digest: bytes
    files: dict[str, FileIdentity]
    """By name from the directory."""
    changed_ns: int
    """When the last of them was."""


def index(format_: Format, path: Path, weights: WeightsFrom) -> Checkpoint:
    """`format_.index(path, weights)`, or what it was when nothing was different."""
    if type(path) is not type(Path()):  # behind a URL, in an archive
        return format_.index(path, weights)
    now = time.time_ns()
    state = _state(path, f"{format_.name} {weights} {path}")
    if state is None:
        return format_.index(path, weights)
    place = directory() / (blake2b(os.fsencode(path), digest_size=16).hexdigest() + f".{weights}")
    remembered = _recalled(place, path, state)
    if remembered is not None:
        return remembered
    made = format_.index(path, weights)
    again = _state(path, f"{format_.name} {weights} {path}")
    if again is not None and again.digest == state.digest and state.changed_ns < now - SETTLED:
        with suppress(OSError, ValueError, OverflowError):
            _keep(place, _encoded(made, state))
    return made


def directory() -> Path:
    """Where indexes are kept (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "mcorefs" / "index"


def _state(path: Path, asked: str) -> _State | None:
    """None where files are too many, or links, whose targets may change unseen."""
    digest = blake2b(MAGIC + os.fsencode(asked), digest_size=_DIGEST)
    files: dict[str, FileIdentity] = {}
    changed = 0
    program = Path(__file__).parent
    try:
        for name, status in sorted(_below(str(program), ""), key=lambda item: item[0]):
            if name.endswith(".py"):
                digest.update(_line(name, status))
        for name, status in sorted(_below(str(path), ""), key=lambda item: item[0]):
            digest.update(_line(name, status))
            files[name] = FileIdentity.of(status)
            changed = max(changed, status.st_mtime_ns, status.st_ctime_ns)
    except OSError:
        return None
    return _State(digest.digest(), files, changed)


def _line(name: str, status: os.stat_result) -> bytes:
    numbers = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    return os.fsencode(name) + b"\0%d %d %d %d %d\n" % numbers


def _below(path: str, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    """(name, status) of every file below `path`. Raises OSError if one is no regular file."""
    with os.scandir(path) as entries:
        for count, entry in enumerate(entries):
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                yield from _below(entry.path, f"{prefix}{entry.name}/")
            elif stat.S_ISREG(status.st_mode) and count < MAX_FILES:
                yield prefix + entry.name, status
            else:
                raise OSError(f"{entry.path} is not looked at")


def _encoded(made: Checkpoint, state: _State) -> bytes:
    """Raises ValueError where an index holds what is not kept here."""
    root = os.path.join(str(made.path), "")
    names = [path.removeprefix(root) for path in made.files]
    if {root + name: state.files[name] for name in names if name in state.files} != made.files:
        raise ValueError("it has files from elsewhere")
    numbers = {path: number for number, path in enumerate(made.files)}
    tensors, rows = [], []
    for fqn, tensor in made.tensors.items():
        of_tensor = [_numbers(chunk, numbers) for chunk in tensor.chunks]
        tensors.append([fqn, tensor.fqn, tensor.dtype.name, tensor.shape, len(of_tensor)])
        rows.append(np.array(of_tensor, "<i8").tobytes())
    described = {
        "path": str(made.path),
        "format": made.format,
        "args": made.args,
        "args_source": made.args_source,
        "skipped": made.skipped,
        "fc1_ranks": made.fc1_ranks,
        "remarks": made.remarks,
        "files": names,
        "tensors": tensors,
    }
    text = json.dumps(described)
    if repr(json.loads(text)["args"]) != repr(made.args):
        raise ValueError("JSON cannot express its args")
    header = text.encode()
    header += b" " * (-len(header) % 8)
    body = state.digest + len(header).to_bytes(8, "little") + header + b"".join(rows)
    return MAGIC + blake2b(body, digest_size=_DIGEST).digest() + body


def _numbers(chunk: Chunk, files: dict[str, int]) -> tuple[int, ...]:
    box, span = chunk.box, chunk.span
    if span.encoding is not None:
        raise ValueError("it is compressed")
    strides = (0,) * len(box.sizes) if span.strides is None else span.strides
    where = (files[span.path], span.offset, span.nbytes, _KINDS.index(span.kind), span.skip)
    return (*where, span.strides is not None, *box.offsets, *box.sizes, *strides)


def _recalled(place: Path, path: Path, state: _State) -> Checkpoint | None:
    """What was kept, if it is ours, whole, and of `state`."""
    try:
        data = _read(place)
        start = len(MAGIC) + _DIGEST
        body = memoryview(data)[start:]
        digest = blake2b(body, digest_size=_DIGEST).digest()
        if not (data.startswith(MAGIC) and data[len(MAGIC) : start] == digest):
            return None
        if body[:_DIGEST] != state.digest:
            return None
        found = _decoded(body[_DIGEST:], path, state)
        os.utime(place)  # the least used goes first
        return found
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _read(place: Path) -> bytes:
    """Raises OSError unless it is a file of this user's that nobody else can write."""
    fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not _is_ours(status):
            raise OSError(f"{place} is not this user's own")
        if status.st_size > MAX_BYTES:
            raise OSError(f"{place} is too large")
        return file.read()


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _decoded(body: memoryview, path: Path, state: _State) -> Checkpoint:
    size = int.from_bytes(body[:8], "little")
    described = json.loads(bytes(body[8 : 8 + size]))
    if described["path"] != str(path):
        raise ValueError("it is of another directory")
    numbers = np.frombuffer(body[8 + size :], "<i8")
    names = described["files"]
    files = {os.path.join(str(path), name): state.files[name] for name in names}
    paths = list(files)
    tensors: dict[str, StoredTensor] = {}
    at = 0
    for key, fqn, dtype, shape, count in described["tensors"]:
        if len(shape) > MAX_DIMS or any(type(n) is not int or n < 0 for n in (count, *shape)):
            raise ValueError("a shape is impossible")
        width = _FIXED + 3 * len(shape)
        rows = numbers[at : at + count * width].reshape(count, width)
        at += count * width
        of_tensor = partial(_chunks, rows, paths)
        tensors[key] = remembered_tensor(fqn, BY_NAME[dtype], tuple(shape), of_tensor)
    if at != len(numbers):
        raise ValueError("there are numbers of no tensor")
    return Checkpoint(
        described["format"],
        path,
        tensors,
        described["args"],
        described["args_source"],
        files,
        described["skipped"],
        described["fc1_ranks"],
        tuple(described["remarks"]),
    )


def _chunks(rows: Numbers, paths: list[str]) -> tuple[Chunk, ...]:
    ndim = (rows.shape[1] - _FIXED) // 3
    first, second = _FIXED + ndim, _FIXED + 2 * ndim
    made = []
    for file, offset, nbytes, kind, skip, has_strides, *rest in rows.tolist():
        numbers = tuple(rest)
        span = Span(
            paths[file],
            offset,
            nbytes,
            _KINDS[kind],  # type: ignore[arg-type]
            skip,
            numbers[second - _FIXED :] if has_strides else None,
        )
        box = Box(numbers[:ndim], numbers[first - _FIXED : second - _FIXED])
        made.append(Chunk(box, span))
    return tuple(made)


def _keep(place: Path, data: bytes) -> None:
    """Write `data` to `place`, all at once, and make room. Raises OSError if it cannot."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(os.lstat(place.parent)):
        raise OSError(f"{place.parent} is not this user's own")
    fd, name = tempfile.mkstemp(dir=place.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.replace(name, place)
    except BaseException:
        os.unlink(name)
        raise
    _make_room(place.parent)


def _make_room(kept: Path) -> None:
    with os.scandir(kept) as entries:
        files = sorted(
            ((entry.stat(follow_symlinks=False), entry.path) for entry in entries),
            key=lambda item: item[0].st_mtime_ns,
        )
    excess = sum(status.st_size for status, _ in files) - MAX_BYTES
    for status, path in files:
        if excess <= 0:
            return
        os.unlink(path)
        excess -= status.st_size
