"""RemotePath: names and small files behind a URL, with the interface of pathlib.

A directory is listed once for every `parse_path`, and what is in it is known from then on: looking
for a checkpoint asks some fifty questions about a few directories, each of which would otherwise
be a request or two. So one opening sees one state of what it looks at.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO, Generic, NoReturn, TypeVar

import numpy as np

from mcorefs.errors import ReadFault
from mcorefs.files import FileIdentity
from mcorefs.remote.filesystem import DIRECTORY, Entry, FileSystem, connect
from mcorefs.remote.objects import Objects

MAX_BYTES = 4 << 30
"""Of a file that is read whole."""
_SMALL, _LARGE = 256 << 10, 8 << 20
"""Bytes asked for at once: where a little is wanted of a file, and where all of it is."""
_NO_SUCH_FILE = os.strerror(errno.ENOENT)

T = TypeVar("T")


def remote_path(protocol: str, rest: str) -> RemotePath:
    """The path of the URL `protocol`://`rest`."""
    parts = [part for part in rest.split("/") if part]
    anchor = f"{protocol}://" + (parts[0] if parts else "")
    key = PurePosixPath(posixpath.normpath("/" + "/".join(parts[1:]))).relative_to("/")
    path = RemotePath(_Names(protocol), anchor, key)
    path.names.top = str(path)
    return path


class _Once(Generic[T]):
    """What was learnt, by URL. Threads that want the same wait for the one that asks."""

    def __init__(self) -> None:
        self._known: dict[str, Future[T]] = {}
        self._lock = threading.Lock()

    def get(self, url: str) -> T | None:
        """What is known of `url` by now."""
        known = self._known.get(url)
        return known.result() if known is not None and known.done() else None

    def learn(self, url: str, ask: Callable[[], T]) -> T:
        """What is known of `url`, by asking if need be; what cannot be learnt is asked again."""
        with self._lock:
            known = self._known.get(url)
            if known is None:
                mine = self._known[url] = Future[T]()
        if known is not None:
            return known.result()
        try:
            mine.set_result(ask())
        except BaseException as problem:
            with self._lock:
                del self._known[url]
            mine.set_exception(problem)
            raise
        return mine.result()


class _Names:
    """What is known of the names on one file system. Thread-safe."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self.top = ""
        """What the user named; nothing above it is listed only to learn about one name."""
        self._listed = _Once[Mapping[str, Entry]]()
        self._single, self._sized = _Once[Entry | None](), _Once[Entry]()
        self._contents = _Once[bytes]()
        self.fs  # noqa: B018 (raises CheckpointError)

    @property
    def fs(self) -> FileSystem:
        return connect(self.protocol)

    def entry(self, url: str) -> Entry | None:
        """What is at `url`; None if nothing is. Raises OSError if that cannot be learnt."""
        parent, _, name = url.rpartition("/")
        if (beside := self._listed.get(parent)) is not None:
            return beside.get(name)
        if self._listed.get(url) is not None:
            return DIRECTORY
        if url.startswith(f"{self.top}/"):
            above = self.entry(parent)
            is_inside = above is not None and above.is_dir
            return self.children(parent).get(name) if is_inside else None
        ask = self._top if url == self.top else partial(self._outside, url)
        return self._single.learn(url, ask)

    def _top(self) -> Entry | None:
        try:
            if self.protocol in ("http", "https"):  # to list a file would be to load it
                return self.fs.entry(self.top)
            return DIRECTORY if self.children(self.top) else None
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            return self.fs.entry(self.top)

    def _outside(self, url: str) -> Entry | None:
        """What is above the directory that was named may be another's, or not even be listable."""
        try:
            return self.fs.entry(url)
        except OSError:
            return None

    def children(self, url: str) -> Mapping[str, Entry]:
        """What is in the directory `url`. Raises OSError if it cannot be listed."""
        return self._listed.learn(url, lambda: self.fs.list(url))

    def content(self, url: str, identity: FileIdentity) -> bytes:
        """All of a small file, which is asked for once."""
        return self._contents.learn(url, lambda: _content(url, identity))

    def identity(self, url: str) -> FileIdentity:
        """That of the file at `url`. Raises OSError."""
        entry = self.entry(url)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, _NO_SUCH_FILE, url)
        if entry.is_dir:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), url)
        if entry.identity is None:  # its directory's listing did not say
            entry = self._sized.learn(url, lambda: self.fs.entry(url))
        if entry.identity is None:
            raise ReadFault(f"{url}: the server does not say how long it is")
        return entry.identity


class RemotePath(Path):
    """A Path, so that whatever looks at names and small files takes it; but none of this machine.

    It has what reading needs. All else of Path's, and all of `os`, is refused by `__fspath__`.
    """

    __slots__ = ("_anchor", "_key", "names")

    def __new__(cls, *args: object) -> RemotePath:
        return object.__new__(cls)

    def __init__(self, names: _Names, anchor: str, key: PurePosixPath) -> None:
        self.names, self._anchor, self._key = names, anchor, key

    def __str__(self) -> str:
        return self._anchor if self._key == PurePosixPath() else f"{self._anchor}/{self._key}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __fspath__(self) -> NoReturn:
        raise TypeError(f"{self} is no file of this machine")

    def __reduce__(self) -> tuple[object, ...]:
        """Another process looks for itself."""
        return remote_path, tuple(str(self).split("://", 1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: PurePath) -> bool:
        return str(self) < str(other)

    # -- names -----------------------------------------------------------------------------------

    def _at(self, key: PurePosixPath) -> RemotePath:
        return RemotePath(self.names, self._anchor, key)

    def __truediv__(self, name: str | os.PathLike[str]) -> RemotePath:
        joined = posixpath.normpath(f"/{self._key}/{os.fspath(name)}")
        return self._at(PurePosixPath(joined).relative_to("/"))

    @property
    def name(self) -> str:
        return self._key.name

    @property
    def suffix(self) -> str:
        return self._key.suffix

    @property
    def stem(self) -> str:
        return self._key.stem

    @property
    def parts(self) -> tuple[str, ...]:
        return (self._anchor, *self._key.parts)

    @property
    def parent(self) -> RemotePath:
        return self._at(self._key.parent)

    @property
    def parents(self) -> tuple[RemotePath, ...]:
        return tuple(map(self._at, self._key.parents))

    def with_name(self, name: str) -> RemotePath:
        return self._at(self._key.with_name(name))

    def is_relative_to(self, *other: str | os.PathLike[str]) -> bool:
        return any(str(place) == str(other[0]) for place in (self, *self.parents))

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> RemotePath:
        return self

    def resolve(self, strict: bool = False) -> RemotePath:
        return self

    # -- what is there ---------------------------------------------------------------------------

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self.names.entry(str(self)) is not None

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        entry = self.names.entry(str(self))
        return entry is not None and entry.is_dir

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        entry = self.names.entry(str(self))
        return entry is not None and not entry.is_dir

    def is_symlink(self) -> bool:
        return False

    def identity(self) -> FileIdentity:
        """What must stay the same about the file. Raises OSError."""
        return self.names.identity(str(self))

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Its kind, size and time."""
        if self.is_dir():
            return os.stat_result((stat.S_IFDIR | 0o555, 0, 0, 1, 0, 0, 0, 0, 0, 0))
        found = self.identity()
        moment = found.mtime_ns // 10**9
        mode = stat.S_IFREG | 0o444
        return os.stat_result((mode, 0, 0, 1, 0, 0, found.size, moment, moment, moment))

    def lstat(self) -> os.stat_result:
        return self.stat()

    def iterdir(self) -> Iterator[RemotePath]:  # type: ignore[override]
        for name in self.names.children(str(self)):
            yield self / name

    def glob(self, pattern: str) -> Iterator[RemotePath]:  # type: ignore[override]
        """What matches `pattern`, segment by segment; none may be "**"."""
        first, _, rest = pattern.partition("/")
        try:
            names = sorted(self.names.children(str(self)).items())
        except (FileNotFoundError, NotADirectoryError):
            return
        for name, entry in names:
            if not fnmatchcase(name, first):
                continue
            if not rest:
                yield self / name
            elif entry.is_dir:
                yield from (self / name).glob(rest)

    # -- small files -----------------------------------------------------------------------------

    def open(self, mode: str = "r", *args: object) -> BinaryIO:  # type: ignore[override]
        """The file, to be read; only "rb". It is of one version, or reading it fails."""
        if mode != "rb" or args:
            raise ValueError(f"{self} can only be read, as bytes")
        identity = self.identity()
        if identity.size <= _SMALL:
            return io.BytesIO(self.names.content(str(self), identity))
        return io.BufferedReader(_Reading(str(self), identity), _SMALL)

    def read_bytes(self) -> bytes:
        identity = self.identity()
        if identity.size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"has {identity.size} bytes", str(self))
        return _content(str(self), identity)


def _content(url: str, identity: FileIdentity) -> bytes:
    out = np.empty(identity.size, np.uint8)  # a length that is only said costs no memory
    Objects({url: identity}, block_bytes=_LARGE).read_into(url, 0, out.data)
    return out.tobytes()


class _Reading(io.RawIOBase):
    """A file that is read from front to back, or from places near each other."""

    def __init__(self, url: str, identity: FileIdentity) -> None:
        self._url, self._size = url, identity.size
        self._at = 0
        self._objects = Objects({url: identity}, block_bytes=_SMALL)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._at))
        self._objects.read_into(self._url, self._at, memoryview(buffer)[:count])
        self._at += count
        return count


def identity_of(path: str | Path) -> tuple[FileIdentity | None, str | None]:
    """Identity of the object at `path`, or why there is none: one of the two is None."""
    try:
        if isinstance(path, RemotePath):
            return path.identity(), None
        entry = connect(str(path).partition("://")[0]).entry(str(path))
        return entry.identity, None if entry.identity else "is not a regular file"
    except OSError as problem:
        return None, problem.strerror or "cannot be opened"
