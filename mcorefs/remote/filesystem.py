"""One of fsspec's file systems: asked patiently, its failures in our words.

Every operation runs on fsspec's event loop, may be tried again after a transient failure, and ends
within the deadline: a read that waits for ever hangs whoever reads the mount.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from mcorefs.errors import CheckpointError, McorefsError, ReadFault
from mcorefs.files import FileIdentity

if TYPE_CHECKING:
    from fsspec.asyn import AsyncFileSystem

DEADLINE = 60.0
"""Seconds after which an operation that still fails is given up."""
DEADLINE_VARIABLE = "MCOREFS_REMOTE_DEADLINE"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_CONNECTIONS = 64
_GRACE = 10.0
"""Seconds beyond the deadline after which the event loop itself is taken to be stuck."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """What is at a name."""

    is_dir: bool
    identity: FileIdentity | None
    """None of a directory, and where a listing does not say."""


DIRECTORY = Entry(True, None)


class ChangedError(Exception):
    """An object is not the version that was asked for."""


_connected: dict[tuple[int, str], FileSystem] = {}


def connect(protocol: str) -> FileSystem:
    """The file system of that name, for the process that calls: a fork has no connections, and no
    thread that serves them. What it inherited is kept, since to close it would write to it.

    Raises CheckpointError where fsspec has no such file system, or it cannot be set up.
    """
    key = os.getpid(), protocol
    found = _connected.get(key)
    return _connected.setdefault(key, FileSystem(protocol)) if found is None else found


class FileSystem:
    """One of fsspec's file systems, with its connections: of one process only.

    URLs are as `RemotePath` writes them. Methods raise FileNotFoundError, NotADirectoryError or
    ReadFault, the last no later than the deadline. Thread-safe.
    """

    def __init__(self, protocol: str) -> None:
        self._fs = _file_system(protocol)
        from fsspec.asyn import get_loop

        self._listing, self._describing = _LISTING.get(protocol, {}), _DESCRIBING.get(protocol, {})
        self._exact = _EXACT.get(protocol, {})
        self._loop = get_loop()

    def list(self, url: str) -> dict[str, Entry]:
        """What is in the directory `url`, by name."""
        return self._wait(self._patiently(url, lambda: self._list(url)))

    def entry(self, url: str) -> Entry:
        """What is at `url`."""
        return self._wait(self._patiently(url, lambda: self._entry(url)))

    def start_read(
        self, url: str, start: int, end: int, identity: FileIdentity | None
    ) -> Future[bytes]:
        """Bytes [start, end) of the object `url` while it is `identity`; ChangedError if it is
        another by now."""
        reading = self._patiently(url, lambda: self._read(url, start, end, identity))
        return asyncio.run_coroutine_threadsafe(reading, self._loop)

    # -- on the event loop -----------------------------------------------------------------------

    async def _list(self, url: str) -> dict[str, Entry]:
        path = self._path(url)
        found: dict[str, Entry] = {}
        for info in await self._fs._ls(path, detail=True, **self._listing):
            name = str(info["name"])
            if name == path and info["type"] != "directory":
                raise NotADirectoryError(errno.ENOTDIR, "is not a directory", url)
            name = name.rstrip("/")
            if name != path:  # else an object that stands for the directory
                found[name.rpartition("/")[2]] = _entry_of(info)
        return found

    async def _entry(self, url: str) -> Entry:
        return _entry_of(await self._fs._info(self._path(url), **self._describing))

    async def _read(self, url: str, start: int, end: int, identity: FileIdentity | None) -> bytes:
        path = self._path(url)
        if hasattr(self._fs, "_call_s3"):
            data = await self._read_s3(path, start, end, identity)
        else:
            data = await self._fs._cat_file(path, start=start, end=end, **self._exact)
            if identity is not None:
                # Asked afterwards: as long as the object is the same, the bytes were its own.
                now = _entry_of(await self._fs._info(path, **self._describing)).identity
                if now is None or not same_object(now, identity):
                    raise ChangedError
        if len(data) > end - start:
            raise _fault(url, "the server does not serve ranges of files")
        if len(data) < end - start:
            raise OSError(errno.EIO, f"{len(data)} bytes came instead of {end - start}")
        return data

    async def _read_s3(
        self, path: str, start: int, end: int, identity: FileIdentity | None
    ) -> bytes:
        """One request, which the store itself refuses for another version."""
        bucket, key, _ = self._fs.split_path(path)
        wanted = {} if identity is None else {"IfMatch": f'"{identity.version}"'}
        try:
            response = await self._fs._call_s3(
                "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **wanted
            )
        except OSError as problem:
            if problem.errno == errno.EINVAL and "pre-condition" in str(problem):
                raise ChangedError from None
            raise
        async with response["Body"] as body:
            return bytes(await body.read())

    async def _patiently(self, url: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of `attempt`, made again after transient failures until the deadline."""
        limit = deadline()
        pause = _FIRST_PAUSE
        last: Exception | None = None
        try:
            async with asyncio.timeout(limit):
                while True:
                    try:
                        return await attempt()
                    except Exception as problem:
                        if _is_final(problem):
                            raise
                        last = problem
                    await asyncio.sleep(pause * (0.5 + random.random()))
                    pause = min(2 * pause, _LONGEST_PAUSE)
        except (FileNotFoundError, NotADirectoryError, ChangedError, McorefsError):
            raise
        except TimeoutError:
            why = f" ({_said(last)})" if last is not None else ""
            raise _fault(url, f"no answer within {limit:g} s{why}") from None
        except Exception as problem:
            raise _fault(url, _said(problem)) from None

    def _path(self, url: str) -> str:
        return str(self._fs._strip_protocol(url)).rstrip("/")

    def _wait(self, operation: Coroutine[Any, Any, T]) -> T:
        return wait(asyncio.run_coroutine_threadsafe(operation, self._loop))


def wait(future: Future[T]) -> T:
    """The result of an operation that has a deadline. Raises what it raised."""
    try:
        return future.result(deadline() + _GRACE)
    except TimeoutError:
        raise ReadFault("fsspec's event loop is stuck") from None


def deadline() -> float:
    """Seconds, as the environment says."""
    try:
        return max(0.1, float(os.environ.get(DEADLINE_VARIABLE, DEADLINE)))
    except ValueError:
        return DEADLINE


def same_object(one: FileIdentity, other: FileIdentity) -> bool:
    """Whether two looks at an object saw the same version; listings round its time differently."""
    return (one.size, one.version) == (other.size, other.version)


# -- fsspec --------------------------------------------------------------------------------------

_EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "msc": "msc",
    "http": "remote",
    "https": "remote",
}
_VERSIONS = ("ETag", "etag", "e_tag", "generation", "blob_id", "xet_hash", "sha256", "checksum")
"""What file systems call a thing that changes with an object's bytes, the surest first."""
_LISTING: Mapping[str, dict[str, object]] = {"hf": {"refresh": True}}
"""Arguments without which what was known before is answered again."""
_DESCRIBING: Mapping[str, dict[str, object]] = {"hf": {"refresh": True, "expand_info": True}}
"""The same for one object, and those without which nothing tells its version."""
_EXACT: Mapping[str, dict[str, object]] = {"hf": {"cache_type": "none"}}
"""Arguments without which more is fetched than what is asked for."""
_TIMES = ("LastModified", "last_modified", "Last-Modified", "mtime", "updated", "created")


def _file_system(protocol: str) -> AsyncFileSystem:
    try:
        import fsspec
        from fsspec.asyn import AsyncFileSystem
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
    except ImportError:
        extra = _EXTRAS.get(protocol, "remote")
        raise CheckpointError(
            f"to read {protocol}://, install what it needs: pip install 'mcorefs[{extra}]'"
        ) from None
    try:
        # Listings are kept by RemotePath, which knows for how long.
        found = fsspec.filesystem(protocol, use_listings_cache=False, **_options(protocol))
    except (ImportError, ValueError) as problem:
        raise CheckpointError(_what_to_install(protocol, problem)) from None
    except Exception as problem:
        raise CheckpointError(f"{protocol}:// cannot be opened: {_said(problem)}") from None
    # What msc does asynchronously it does in threads that a fork does not have.
    if isinstance(found, AsyncFileSystem) and protocol != "msc":
        return found
    return AsyncFileSystemWrapper(found)


def _options(protocol: str) -> dict[str, object]:
    """What is to be different from fsspec's defaults, where its configuration does not say."""
    from fsspec.config import conf

    if protocol not in ("s3", "s3a"):
        return {}
    stated = conf.get(protocol, {}).get("config_kwargs", {})
    return {"config_kwargs": {"max_pool_connections": _CONNECTIONS, **stated}}


def _what_to_install(protocol: str, problem: Exception) -> str:
    from fsspec.registry import known_implementations

    if protocol in _EXTRAS:
        needed = f"pip install 'mcorefs[{_EXTRAS[protocol]}]'"
    elif protocol in known_implementations:
        needed = str(known_implementations[protocol].get("err", problem))
    else:
        return f"{protocol}:// is no file system that fsspec knows"
    return f"to read {protocol}://, install what it needs: {needed}"


def _entry_of(info: Mapping[str, object]) -> Entry:
    # Over http a directory is a page of links.
    if info["type"] == "directory" or info.get("mimetype") == "text/html":
        return DIRECTORY
    size = info.get("size")
    if type(size) is not int or size < 0:
        return Entry(False, None)
    mtime_ns = next((_nanoseconds(info[key]) for key in _TIMES if info.get(key)), 0)
    named = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    version = named.removeprefix("W/").strip('"') or str(mtime_ns)
    return Entry(False, FileIdentity(size, mtime_ns, 0, version))


def _moment(text: str) -> datetime:
    """Raises ValueError."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return parsedate_to_datetime(text)


def _nanoseconds(moment: object) -> int:
    try:
        if isinstance(moment, str):
            moment = _moment(moment)
        if isinstance(moment, datetime):
            moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        return int(float(moment) * 1e6) * 1000  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0


# -- failures ------------------------------------------------------------------------------------

_FINAL = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    ChangedError,
    McorefsError,
    ImportError,
    TypeError,
    ValueError,
    AttributeError,
    NotImplementedError,
)
_FINAL_CODES = (errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENAMETOOLONG, errno.ENOSYS)
_TRANSIENT_STATUS = (408, 425, 429)
_SECRET = re.compile(r"(?<=://)[^/\s@]*@|\?[^\s'\"<>)]*")
"""In a URL: who asks, and what signs the request."""


def _is_final(problem: Exception) -> bool:
    """Whether trying again is of no use."""
    if isinstance(problem, _FINAL):
        return True
    if isinstance(problem, OSError) and problem.errno in _FINAL_CODES:
        return True
    if "Credential" in type(problem).__name__:
        return True
    answer = getattr(problem, "response", None)
    said = (getattr(problem, "status", None), getattr(answer, "status_code", None))
    status = next((status for status in said if status), getattr(problem, "code", None))
    return isinstance(status, int) and 400 <= status < 500 and status not in _TRANSIENT_STATUS


def _fault(url: str, why: str) -> ReadFault:
    """Its `strerror` is for those who name the place themselves."""
    fault = ReadFault(f"{url}: {why}")
    fault.strerror = why
    return fault


def _said(problem: Exception | None) -> str:
    """What went wrong, in the words of whoever said it but without secrets."""
    kind = "access denied" if isinstance(problem, PermissionError) else type(problem).__name__
    text = _SECRET.sub("", " ".join(str(problem).split()))
    return f"{kind}: {text[:300]}" if text else kind
