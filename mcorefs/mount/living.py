"""A run that still trains, as a directory of its iterations: they appear when they are published,
go when they are rotated away, and `latest` follows the newest.

An iteration is opened when somebody looks into it. Nothing here runs by itself: when somebody looks
at the mount, and it was not done within INTERVAL seconds, the run's directory is looked at.

No byte of one iteration may be taken for one of another, and the kernel keeps pages by what is the
same file for libfuse: one path. So a path is never used for two saves. An iteration that is saved
anew under its old name is shown as a link of that name to a directory `.NAME.N` of its own.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from mcorefs.activity import About, Activity
from mcorefs.deadline import Deadline, LateError
from mcorefs.errors import CheckpointError, McorefsError, ReadFault
from mcorefs.files import BytesFile, VirtualFile
from mcorefs.model import Options
from mcorefs.mount.nodes import ROOT_INODE, Node, NodeTable, attributes, build_nodes
from mcorefs.mount.operations import FaultLog
from mcorefs.patience import READ_TIMEOUT
from mcorefs.published import Published, Run
from mcorefs.reader import Reader, TileCache
from mcorefs.tree import Means, Opened, Source, VirtualTree, open_tree

LATEST = "latest"
ERROR_FILE = "MCOREFS_ERROR.txt"
INTERVAL = 1.0
"""Seconds for which what was found is believed, here and by the kernel."""
SCAN_WITHIN = 2.0
"""Seconds that somebody waits to see what is new; who comes later sees it."""
KEPT = 4
"""Iterations that stay open although nobody has a file of theirs open."""
MOST = 16
"""Iterations open at once, whoever uses them; one that is read again is opened again."""
OPEN_FILES = 8192
"""Shards open at once, if the system allows so many."""
RETRY = 10.0
"""Seconds after which an iteration that could not be opened is tried again."""
_BITS = 24
"""Of an inode number, for the files of one iteration; those above say which iteration."""
_ERROR = (1 << _BITS) - 1
_LINK = _ERROR - 1

Opener = Callable[[Published], Opened]


@dataclass
class _Save:
    """One save of one iteration: what its path shows never changes."""

    number: int
    published: Published
    shown: str
    """Its name in the mount."""
    directory: Node
    opening: threading.Lock = field(default_factory=threading.Lock)
    table: NodeTable | None = None
    reader: Reader | None = None
    about: About | None = None
    content: bytes | None = None
    """Of what it was when it was first opened, a digest: it must be the same ever after, for the
    kernel keeps pages, and handles are numbers."""
    error: Node | None = None
    retry_at: float = 0.0
    users: int = 0


class Living:
    """The nodes of a run (`nodes.Nodes`). Thread-safe."""

    def __init__(
        self, run: Run, opener: Opener, patience: float, activity: Activity | None = None
    ) -> None:
        """Raises CheckpointError if the run cannot be looked at."""
        self.activity = activity or Activity()
        self._run, self._open_tree = run, opener
        self._scans, self._opens = Deadline(min(SCAN_WITHIN, patience)), Deadline(patience)
        self._lock = threading.Lock()
        self._scanning = threading.Lock()
        self._saves: dict[int, _Save] = {}
        self._by_save: dict[Published, _Save] = {}
        self._opened: OrderedDict[int, _Save] = OrderedDict()
        self._found: tuple[Published, ...] = ()
        self._root = self._directory(ROOT_INODE, "", {}, time.time_ns())
        self._next_scan = time.monotonic() + INTERVAL
        self._failures = 0
        self._faults = FaultLog()
        self._scan()
        newest = self._found[-1].number if self._found else -2
        for name, number in run.late.items():
            if number > newest:
                raise CheckpointError(
                    f"{run.root / name}: its storage does not answer: nothing within {patience:g} "
                    "s; look at the file system, or give it longer (--read-timeout)"
                )

    @staticmethod
    def over(run: Run, options: Options) -> Living:
        """All iterations opened with `options`, sharing one budget of memory. Raises McorefsError
        if there is not so much, CheckpointError if the run cannot be looked at."""
        means = Means.of(options)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        most = OPEN_FILES if limit == resource.RLIM_INFINITY else min(limit, OPEN_FILES)
        max_open = max(16, min(means.max_open, (most - 256) // MOST))
        means = replace(
            means, cache=TileCache(means.cache_bytes, means.activity), max_open=max_open
        )

        # What opens an iteration while it is mounted is waited for by those who look.
        unhurried = replace(options, read_timeout=None)

        def opener(published: Published) -> Opened:
            return open_tree(published.path, unhurried, means)

        return Living(run, opener, options.read_timeout or READ_TIMEOUT, means.activity)

    @property
    def root(self) -> str:
        return str(self._run.root)

    def opened(self) -> list[About]:
        """What is open of it."""
        with self._lock:
            return [save.about for save in self._opened.values() if save.about is not None]

    @property
    def names(self) -> list[str]:
        """The iterations that can be opened, newest last."""
        return [published.name for published in self._found]

    def open_newest(self) -> Source | None:
        """What `latest` leads to, from now on open; None if nothing is published yet. Raises what
        opening it does, rather than showing an ERROR_FILE."""
        if not self._found:
            return None
        save = self._by_save[self._found[-1]]
        opened = self._open_tree(save.published)
        self._install(save, opened)
        return opened.source

    def newest_files(self) -> Mapping[str, VirtualFile]:
        """The files of the newest iteration by path in the mount; none if it is not open."""
        if not self._found:
            return {}
        save = self._by_save[self._found[-1]]
        nodes = save.table.by_path.values() if save.table is not None else ()
        return {save.shown + node.path: node.file for node in nodes if node.file is not None}

    # --- nodes.Nodes ---

    @property
    def total_bytes(self) -> int:
        tables = [save.table for save in list(self._opened.values())]
        return sum(table.total_bytes for table in tables if table is not None)

    @property
    def count(self) -> int:
        tables = [save.table for save in list(self._opened.values())]
        return sum((table.count for table in tables if table is not None), len(self._saves) + 1)

    def at(self, path: str) -> Node | None:
        self._refresh()
        name, _, rest = path.lstrip("/").partition("/")
        node = self._root.children.get(name) if name else self._root
        if node is None or not rest or node.target:
            return None if rest else node
        save = self._saves[node.inode >> _BITS]
        table = self._table(save)
        if table is not None:
            return table.at(f"/{rest}")
        return save.error if rest == ERROR_FILE else None

    def of(self, handle: int) -> Node | None:
        if handle == ROOT_INODE:
            self._refresh()
            return self._root
        save = self._saves[handle >> _BITS]
        if handle == save.directory.inode:
            return save.directory
        if handle & _ERROR == _ERROR:
            return save.error
        table = self._table(save)
        if table is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return table.of(handle)

    def inside(self, directory: Node) -> Mapping[str, Node]:
        if directory.inode == ROOT_INODE:
            return directory.children
        save = self._saves[directory.inode >> _BITS]
        if directory is not save.directory:
            return directory.children
        table = self._table(save)
        if table is None:
            return {ERROR_FILE: save.error} if save.error is not None else {}
        return table.by_path["/"].children

    def pin(self, handle: int) -> None:
        """A file is open: its iteration stays so, if it can, and can be read when it is deleted."""
        with self._lock:
            save = self._saves[handle >> _BITS]
            save.users += 1
            reader = save.reader if save.users == 1 else None
        if reader is not None:
            # On its own: opening files may take long, and nobody waits for it.
            hold = threading.Thread(target=self._hold, args=(save, reader), daemon=True)
            hold.start()

    def unpin(self, handle: int) -> None:
        with self._lock:
            save = self._saves[handle >> _BITS]
            save.users -= 1
            self._close_some()
            reader = save.reader if save.users == 0 else None
        if reader is not None:
            reader.let_go()  # what training deletes must free its space

    @staticmethod
    def _hold(save: _Save, reader: Reader) -> None:
        reader.hold()
        if save.users == 0:
            reader.let_go()

    # --- what there is ---

    def _refresh(self) -> None:
        if time.monotonic() < self._next_scan or not self._scanning.acquire(blocking=False):
            return
        try:
            # Even if nobody waits for it any more: what it finds is shown then.
            self._scans.run("scan", self._scan, lambda _: None)
            self._failures = 0
        except (LateError, CheckpointError, OSError) as problem:
            # A tracker that is being written is no complaint if the next look finds it whole.
            self._failures += 1
            if self._failures > 1:
                self._faults.report(f"{self._run.root} is shown as it was: {problem}", path="/")
        finally:
            self._next_scan = time.monotonic() + INTERVAL
            self._scanning.release()

    def _scan(self) -> None:
        self._show(self._run.scan())
        for name in self._run.late:
            self._faults.report(f"{name} is left as it was: its storage does not answer", path="/")

    def _show(self, found: Mapping[str, Published]) -> None:
        shown: dict[str, Node] = {}
        links: dict[str, Node] = {}
        for name, published in found.items():
            save = self._by_save.get(published) or self._new(published)
            shown[save.shown] = save.directory
            if save.shown != name:
                links[name] = self._link(save.number, name, save.shown)
        self._found = tuple(found.values())
        if self._found:
            links[LATEST] = self._link(0, LATEST, self._by_save[self._found[-1]].shown)
        children = {**shown, **links}
        if _outline(children) != _outline(self._root.children):
            self._root = self._directory(ROOT_INODE, "", children, time.time_ns())

    def _new(self, published: Published) -> _Save:
        number = len(self._saves) + 1
        taken = any(save.published.name == published.name for save in self._saves.values())
        shown = f".{published.name}.{number}" if taken else published.name
        inode = (number << _BITS) | ROOT_INODE
        mtime_ns = max((identity.mtime_ns for _, identity in published.mark), default=0)
        save = _Save(number, published, shown, self._directory(inode, shown, {}, mtime_ns))
        with self._lock:
            self._saves[number] = self._by_save[published] = save
        return save

    @staticmethod
    def _directory(inode: int, name: str, children: Mapping[str, Node], mtime_ns: int) -> Node:
        # One link: how many directories are in it is not known yet.
        about = attributes(inode, stat.S_IFDIR | 0o555, 1, 0, mtime_ns)
        return Node(inode, f"/{name}", about, None, children)

    @staticmethod
    def _link(number: int, name: str, target: str) -> Node:
        inode = (number << _BITS) | _LINK
        size = len(os.fsencode(target))
        about = attributes(inode, stat.S_IFLNK | 0o777, 1, size, time.time_ns())
        return Node(inode, f"/{name}", about, target=target)

    # --- opening ---

    def _table(self, save: _Save) -> NodeTable | None:
        """The nodes of an iteration, opened if need be; None if it cannot be, as `error` then says.
        Raises OSError if that takes too long."""
        with self._lock:
            if save.table is not None:
                self._opened.move_to_end(save.number)
                return save.table
        with save.opening:
            if save.table is not None or time.monotonic() < save.retry_at:
                return save.table
            what = str(save.published.path)
            try:
                return self._opens.run(what, lambda: self._open(save), lambda _: None)
            except LateError as problem:
                self._faults.report(
                    f"opening {what} fails, who asks gets EIO: {problem}", path=f"/{save.shown}"
                )
                raise OSError(errno.EIO, os.strerror(errno.EIO)) from None
            except (McorefsError, OSError) as problem:
                self._refuse(save, str(problem))
                return None

    def _open(self, save: _Save) -> NodeTable:
        """Even if nobody waits for it any more: the next who looks finds it open."""
        return self._install(save, self._open_tree(save.published))

    def _install(self, save: _Save, opened: Opened) -> NodeTable:
        content = _digest(opened.tree)
        if save.content not in (None, content):
            raise ReadFault(
                f"{save.published.path}, or its tokenizer, is not what it was when it was first "
                "opened; unmount and mount again"
            )
        table = build_nodes(opened.tree, save.number << _BITS)
        with self._lock:
            save.content, save.table, save.error = content, table, None
            save.reader, save.about = opened.reader, opened.tree.about
            self._opened[save.number] = save
            self._close_some(but=save)
        return table

    def _refuse(self, save: _Save, why: str) -> None:
        text = BytesFile(f"{why}\n".encode(errors="surrogateescape"))
        if save.error is None or save.error.file != text:
            message = f"{ERROR_FILE} in {save.shown}: {why.splitlines()[0]}"
            self._faults.report(message, path=f"/{save.shown}/{ERROR_FILE}")
        inode = (save.number << _BITS) | _ERROR
        about = attributes(inode, stat.S_IFREG | 0o444, 1, text.size, time.time_ns())
        save.error = Node(inode, f"/{save.shown}/{ERROR_FILE}", about, text)
        save.retry_at = time.monotonic() + RETRY

    def _close_some(self, but: _Save | None = None) -> None:
        """Forget those looked into longest ago, in use ones last. Called with the lock held."""
        for most, closes in ((KEPT, False), (MOST, True)):
            for number, save in list(self._opened.items()):
                if len(self._opened) <= most:
                    break
                if save is not but and (closes or save.users == 0):
                    del self._opened[number]
                    save.table = save.reader = (
                        None  # its files are closed when the last read has ended
                    )


def _digest(tree: VirtualTree) -> bytes:
    digest = hashlib.sha256(tree.source.encode(errors="surrogateescape"))
    for path, file in tree.files.items():
        digest.update(f"{path}\n{file.size}\n".encode(errors="surrogateescape"))
        if isinstance(file, BytesFile):
            digest.update(file.data)
    return digest.digest()


def _outline(children: Mapping[str, Node]) -> dict[str, tuple[int, str]]:
    return {name: (node.inode, node.target) for name, node in children.items()}
