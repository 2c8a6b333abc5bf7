"""Files inside an uncompressed tar archive, read where they lie: what NeMo 1 calls `.nemo`.

A file in an archive has a name like that of any other, `/data/x.nemo/model_weights/.metadata`, and
is found by it: `ArchivePath` for names and small files, `member_at` for ranges of large ones. The
system itself says of such a name that a file is not a directory.

An archive is a stranger's. It is never unpacked, and refused if it holds anything but files and
directories (links, sparse files, devices), a name that leads out of it or comes twice, or a
member that the archive is too short for.

Layout facts: POSIX pax (ustar header, extended headers `x` and `g`), GNU tar's long names `L` and
base-256 numbers; NeMo:nemo/core/connectors/save_restore_connector.py _make_nemo_file_from_folder.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import IO, Any

from mcorefs.errors import CheckpointError

SUFFIX = ".nemo"
MAX_MEMBERS = 1 << 20
_BLOCK = 512
_MAX_EXTENDED = 1 << 16
"""Bytes of an extended header, or of a long name."""
_MAX_DEPTH = 32
_ARCHIVE = re.compile(rf"{re.escape(SUFFIX)}(?=/|$)")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a FIFO",
    b"S": "a sparse file",
}


@dataclass(frozen=True, slots=True)
class Member:
    """Bytes [start, start + nbytes) of the file `archive`, which had this status."""

    archive: str
    status: os.stat_result
    start: int
    nbytes: int

    @property
    def range(self) -> tuple[int, int]:
        return self.start, self.start + self.nbytes


@dataclass(frozen=True, slots=True)
class _Index:
    files: Mapping[str, tuple[int, int]]
    """(start, bytes) by name, without a leading "./"."""
    directories: Mapping[str, list[str]]
    """What is in each directory; "" is the archive itself."""


def archive_path(path: Path) -> Path:
    """`path`, as one that can be looked into if it is an archive or leads into one."""
    for match in _ARCHIVE.finditer(text := str(path)):
        if os.path.isfile(archive := text[: match.end()]):
            return ArchivePath(os.path.realpath(archive) + text[match.end() :])
    return path


def member_at(path: str) -> Member | None:
    """The file in an archive that `path` names; None if there is no such archive or file in it.

    Raises CheckpointError if the archive cannot be used.
    """
    place = _split(path)
    if place is None:
        return None
    archive, name, status = place
    found = _index_of(archive, status).files.get(name)
    return None if found is None else Member(archive, status, *found)


def _split(path: str) -> tuple[str, str, os.stat_result] | None:
    """(archive, name in it, status of the archive), if `path` leads into one."""
    for match in _ARCHIVE.finditer(path):
        try:
            status = os.lstat(path[: match.end()])
        except (OSError, ValueError):
            return None
        if stat.S_ISREG(status.st_mode):
            return path[: match.end()], path[match.end() + 1 :], status
    return None


class ArchivePath(PosixPath):
    """A Path that may lead into an archive; elsewhere it is any other."""

    __slots__ = ()

    def _held(self) -> tuple[_Index, str, os.stat_result] | None:
        place = _split(str(self))
        if place is None:
            return None
        return _index_of(place[0], place[2]), place[1], place[2]

    def exists(self, *args: Any, **kwargs: Any) -> bool:
        if (held := self._held()) is None:
            return super().exists(*args, **kwargs)
        return held[1] in held[0].files or held[1] in held[0].directories

    def is_file(self, *args: Any, **kwargs: Any) -> bool:
        held = self._held()
        return super().is_file(*args, **kwargs) if held is None else held[1] in held[0].files

    def is_dir(self, *args: Any, **kwargs: Any) -> bool:
        held = self._held()
        return super().is_dir(*args, **kwargs) if held is None else held[1] in held[0].directories

    def is_symlink(self) -> bool:
        return self._held() is None and super().is_symlink()

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        if (held := self._held()) is None:
            return super().stat(follow_symlinks=follow_symlinks)
        index, name, status = held
        if name in index.files:
            mode, nbytes = stat.S_IFREG | 0o444, index.files[name][1]
        elif name in index.directories:
            mode, nbytes = stat.S_IFDIR | 0o555, 0
        else:
            raise self._none()
        times = (status.st_atime, status.st_mtime, status.st_ctime)
        return os.stat_result((mode, status.st_ino, status.st_dev, 1, 0, 0, nbytes, *times))

    def lstat(self) -> os.stat_result:
        return self.stat(follow_symlinks=False)

    def iterdir(self) -> Iterator[ArchivePath]:  # type: ignore[override]
        if (held := self._held()) is None:
            yield from super().iterdir()
            return
        names = held[0].directories.get(held[1])
        if names is None:
            raise self._none()
        yield from (self / name for name in names)

    def glob(self, pattern: str, **kwargs: Any) -> Iterator[ArchivePath]:  # type: ignore[override]
        if (held := self._held()) is None:
            yield from super().glob(pattern, **kwargs)
            return
        first, _, rest = pattern.partition("/")
        for name in held[0].directories.get(held[1], ()):
            if fnmatchcase(name, first):
                yield from (self / name).glob(rest) if rest else (self / name,)

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:  # type: ignore[override]
        if self._held() is None:
            return super().open(mode, *args, **kwargs)
        member = member_at(str(self))
        if member is None:
            raise self._none()
        stream = io.BufferedReader(_Part(member))
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding="utf-8")

    def _none(self) -> OSError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))


class _Part(io.RawIOBase):
    """The bytes of a member, as a file opened for reading."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._at = 0
        self._fd = open_archive(member)

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int:
        view = memoryview(out)[: self._member.nbytes - self._at]
        count = os.preadv(self._fd, [view], self._member.start + self._at) if len(view) else 0
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def open_archive(member: Member) -> int:
    """A descriptor of the archive of `member`. Raises OSError, also if it was replaced since."""
    fd = os.open(member.archive, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if _version(os.fstat(fd)) != _version(member.status):
        os.close(fd)
        raise OSError(errno.ESTALE, "it was replaced while it was being opened", member.archive)
    return fd


def _version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


# -- what an archive holds -----------------------------------------------------------------------


def _index_of(archive: str, status: os.stat_result) -> _Index:
    return _read(archive, *_version(status))


@lru_cache(maxsize=4)
def _read(archive: str, nbytes: int, mtime_ns: int, inode: int) -> _Index:
    """What lies where in the file `archive`, by its headers alone."""
    try:
        fd = os.open(archive, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as problem:
        raise CheckpointError(f"{archive} cannot be opened: {problem.strerror}") from None
    try:
        if _version(os.fstat(fd)) != (nbytes, mtime_ns, inode):
            raise CheckpointError(f"{archive} was replaced while it was being opened")
        return _index(_Headers(archive, fd, nbytes))
    except OSError as problem:
        raise CheckpointError(f"{archive} cannot be read: {problem.strerror}") from None
    finally:
        os.close(fd)


def _index(headers: _Headers) -> _Index:
    files: dict[str, tuple[int, int]] = {}
    directories: dict[str, list[str]] = {"": []}
    for name, is_directory, start, nbytes in headers:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or len(parts) > _MAX_DEPTH:
            raise headers.problem(f"a member is called {name!r:.120}, which leads out of it")
        if not name.isprintable() or (not parts and not is_directory):
            raise headers.problem(f"a member is called {name!a:.120}")
        whole = "/".join(parts)
        if whole in files or (whole in directories and not is_directory):
            raise headers.problem(f"{name!r:.120} comes twice")
        for depth in range(len(parts)):
            above, here = "/".join(parts[:depth]), "/".join(parts[: depth + 1])
            if above in files:
                raise headers.problem(f"{above!r:.120} is both a file and a directory")
            if here not in directories and here not in files:
                directories[above].append(parts[depth])
                if is_directory or depth + 1 < len(parts):
                    directories[here] = []
        if not is_directory:
            files[whole] = start, nbytes
    return _Index(files, directories)


class _Headers:
    """The headers of an archive, one after the other, with what each member is called."""

    def __init__(self, path: str, fd: int, nbytes: int) -> None:
        self._path, self._fd, self._nbytes = path, fd, nbytes

    def problem(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is not an archive that can be opened: {what}")

    def __iter__(self) -> Iterator[tuple[str, bool, int, int]]:
        """(name, whether it is a directory, first byte, bytes) of each member."""
        self._refuse_compressed()
        at = count = 0
        said: dict[str, str] = {}
        while (header := self._data(at, _BLOCK, "its end")).strip(b"\0"):
            count += 1
            if count > MAX_MEMBERS:
                raise self.problem(f"it has more than {MAX_MEMBERS} members")
            self._check(header, at)
            kind = header[156:157]
            start, nbytes = at + _BLOCK, self._number(header[124:136])
            if kind in (b"x", b"g", b"L"):
                self._describe(said, kind, self._extended(start, nbytes))
            else:
                name = said["path"] if "path" in said else _name(header)
                nbytes = self._stated(said.get("size"), nbytes)
                if kind not in (b"0", b"\0", b"5") or (kind == b"5" and nbytes):
                    raise self.problem(f"{name!r:.120} is {_KINDS.get(kind, f'of type {kind!r}')}")
                if start + nbytes > self._nbytes:
                    raise self.problem(
                        f"it has {self._nbytes} bytes, but {name!r:.120} ends at byte "
                        f"{start + nbytes}: it was not copied completely"
                    )
                yield name, kind == b"5", start, nbytes
                said = {}
            at = start + -(-nbytes // _BLOCK) * _BLOCK
        if said:
            raise self.problem("it ends behind an extended header")

    def _refuse_compressed(self) -> None:
        begin = os.pread(self._fd, 6, 0)
        for magic, name in _COMPRESSED.items():
            if begin.startswith(magic):
                raise CheckpointError(
                    f"{self._path} is compressed with {name}, so nothing in it can be read in "
                    f"place; unpack it and pass the directory: mkdir DIR && tar -xf {self._path} "
                    "-C DIR"
                )

    def _data(self, at: int, nbytes: int, what: str) -> bytes:
        data = os.pread(self._fd, nbytes, at)
        if len(data) < nbytes:
            raise self.problem(
                f"{what} should be at byte {at}, but it has only {self._nbytes}: it was not copied "
                "completely, or it is no tar archive"
            )
        return data

    def _check(self, header: bytes, at: int) -> None:
        without = header[:148] + b" " * 8 + header[156:]
        if header[257:262] != b"ustar" or sum(without) != self._number(header[148:156]):
            raise self.problem(f"at byte {at} is no header of a tar archive")

    def _number(self, field: bytes) -> int:
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.split(b"\0")[0].strip(b" ")
        if not re.fullmatch(rb"[0-7]*", digits):
            raise self.problem(f"a header has {field!r} for a number")
        return int(digits or b"0", 8)

    def _stated(self, said: str | None, nbytes: int) -> int:
        """The size that an extended header gives, where one does."""
        if said is None:
            return nbytes
        if not re.fullmatch(r"[0-9]{1,18}", said):
            raise self.problem(f"a member has {said!r:.40} bytes")
        return int(said)

    def _extended(self, start: int, nbytes: int) -> bytes:
        if nbytes > _MAX_EXTENDED:
            raise self.problem(f"an extended header has {nbytes} bytes")
        return self._data(start, nbytes, "an extended header")

    def _describe(self, said: dict[str, str], kind: bytes, data: bytes) -> None:
        """Add to what is `said` of the next member what an extended header says of it."""
        found = {"path": _text(data)} if kind == b"L" else self._records(data)
        if kind == b"g":
            if found:
                raise self.problem("a global header names its members")
        elif found.keys() & said.keys() or found.get("path") == "":
            # Readers differ in which they believe.
            raise self.problem("extended headers give a member two names or sizes, or none")
        else:
            said |= found

    def _records(self, data: bytes) -> dict[str, str]:
        """Records "LENGTH KEY=VALUE\\n" of an extended header, those that matter."""
        found: dict[str, str] = {}
        while data:
            match = re.match(rb"([1-9][0-9]{0,5}) ([^=]+)=", data)
            length = int(match[1]) if match else 0
            if match is None or not match.end() < length <= len(data):
                raise self.problem("an extended header is damaged")
            key, value = _text(match[2]), data[match.end() : length - 1]
            if key.startswith("GNU.sparse"):
                raise self.problem("it holds a sparse file")
            if key in ("path", "size", "linkpath"):
                found[key] = _text(value)
            data = data[length:]
        return found


def _name(header: bytes) -> str:
    """The name in a header; only POSIX's, not GNU's, is in two parts."""
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    """Up to the first zero byte; what is no UTF-8 becomes a name that is refused."""
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")
