"""Ranges of objects, read in blocks: many at a time, each kept for the reads around it.

A request to an object store costs tens of milliseconds however few its bytes, and a connection
carries some tens of MB/s. So an object is cut into blocks of a few MiB: what lies close together
(the head of an archive, its tensor, the next archive) comes with one request, and blocks are asked
for side by side. A block is fetched once however many threads want it; what is kept of them has a
budget.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import CancelledError, Future
from functools import partial
from itertools import islice

from mcorefs.errors import ReadFault
from mcorefs.files import FileIdentity
from mcorefs.remote.filesystem import ChangedError, connect, wait

BLOCK = 4 << 20
IN_FLIGHT = 16
"""Most blocks that one read waits for at a time, and most that are fetched ahead."""
_Key = tuple[str, int]
"""(URL, number of the block)."""


class Objects:
    """Objects by URL, each of which is read only while it is what `identities` says.

    Blocks of `budget` bytes are kept or on their way, whatever the number of readers: only what
    they wait for at the same time may be more, at most half of it for each.
    Thread-safe, and at home in whichever process reads: what a fork inherits is connected anew.
    """

    def __init__(
        self,
        identities: Mapping[str, FileIdentity],
        budget: int = IN_FLIGHT * BLOCK,
        block_bytes: int = BLOCK,
    ) -> None:
        self._identities = identities
        self._budget, self._block_bytes = budget, block_bytes
        self._in_flight = max(1, min(IN_FLIGHT, budget // (2 * block_bytes)))
        self._kept: OrderedDict[_Key, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._coming: dict[_Key, Future[bytes]] = {}
        self._closed = False
        self._lock = threading.Lock()
        self._process = os.getpid()

    def read_into(self, url: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of `url` from `offset` on. Raises ReadFault if it cannot."""
        identity = self._identities.get(url)
        if identity is None or not 0 <= offset <= offset + len(out) <= identity.size:
            size = "no" if identity is None else identity.size
            raise ReadFault(f"{url}: wanted {len(out)} bytes at {offset}, it has {size} bytes")
        if not out:
            return
        size = self._block_bytes
        last = (offset + len(out) - 1) // size
        numbers = iter(range(offset // size, last + 1))
        blocks = deque((n, self._block(url, n)) for n in islice(numbers, self._in_flight))
        while blocks:
            number, block = blocks.popleft()
            data = block if isinstance(block, bytes) else self._wait(url, block)
            start = number * size
            low, high = max(offset, start), min(offset + len(out), start + len(data))
            out[low - offset : high - offset] = memoryview(data)[low - start : high - start]
            blocks.extend((n, self._block(url, n)) for n in islice(numbers, 1))

    @property
    def kept(self) -> int:
        """How many blocks are at hand."""
        return len(self._kept)

    @property
    def pieces_ahead(self) -> int:
        """How much there is room for ahead of a reader, in pieces of a block or two."""
        return min(IN_FLIGHT, self._budget // (4 * self._block_bytes))

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Begin to fetch what (URL, offset, bytes) of `ranges` will be read soon, as far as there
        is room for it. What of it lies outside of an object is passed over."""
        for url, offset, nbytes in ranges:
            end = min(offset + nbytes, self._identities[url].size)
            for number in range(max(offset, 0) // self._block_bytes, -(-end // self._block_bytes)):
                if len(self._coming) >= self._in_flight or self._closed:
                    return
                self._block(url, number)

    def close(self) -> None:
        """Forget all blocks; later reads are refused, and those in progress may be."""
        with self._lock:
            self._closed = True
            self._kept.clear()
            self._kept_bytes = 0
            coming = list(self._coming.values())
        for future in coming:
            future.cancel()

    def _block(self, url: str, number: int) -> bytes | Future[bytes]:
        """A block of `url`, or who brings it."""
        key = url, number
        if self._process != os.getpid():
            self._begin_again()
        system = connect(url.partition("://")[0])
        with self._lock:
            if self._closed:
                raise ReadFault(f"{url}: the checkpoint has been closed")
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            future = self._coming.get(key)
            if future is not None:
                return future
            identity = self._identities[url]
            start = number * self._block_bytes
            end = min(start + self._block_bytes, identity.size)
            future = self._coming[key] = system.start_read(url, start, end, identity)
            self._make_room()
        future.add_done_callback(partial(self._arrived, key))
        return future

    def _arrived(self, key: _Key, future: Future[bytes]) -> None:
        """Called by the event loop; a block that failed is fetched again when it is wanted."""
        with self._lock:
            if self._coming.get(key) is future:
                del self._coming[key]
            if self._closed or future.cancelled() or future.exception() is not None:
                return
            self._kept[key] = data = future.result()
            self._kept_bytes += len(data)
            self._make_room()

    def _make_room(self) -> None:
        """What is on its way needs room too. Called with the lock held."""
        room = self._budget - len(self._coming) * self._block_bytes
        while self._kept and self._kept_bytes > room:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])

    def _wait(self, url: str, future: Future[bytes]) -> bytes:
        try:
            return wait(future)
        except ChangedError:
            raise ReadFault(
                f"{url} was replaced after the checkpoint was opened; open it again to read the "
                "new one"
            ) from None
        except FileNotFoundError:
            raise ReadFault(
                f"{url} is not there any more; it was when the checkpoint was opened"
            ) from None
        except CancelledError:
            raise ReadFault(f"{url}: the checkpoint has been closed") from None
        except ReadFault as fault:
            raise ReadFault(str(fault)) from None  # of this thread alone
        except OSError as problem:
            raise ReadFault(f"{url}: {problem.strerror or problem}") from None

    def _begin_again(self) -> None:
        """In a process that was forked: what was on its way will never arrive, and a lock that
        another thread held will never be let go."""
        self._lock = threading.Lock()
        self._coming = {}
        self._process = os.getpid()
