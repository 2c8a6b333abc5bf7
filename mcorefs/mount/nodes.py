"""The inode table of a tree: everything but file contents, computed once before mounting."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mcorefs.errors import MountError
from mcorefs.files import VirtualFile
from mcorefs.tree import VirtualTree

PREFERRED_IO = 1 << 20
"""st_blksize: cp, tar and Python's buffered reads ask for this much at a time."""
BLOCK = 4096
ROOT_INODE = 1
_NAME_MAX = 255


@dataclass(frozen=True)
class Node:
    """One file or directory. `file` is None for a directory, `children` empty for a file."""

    inode: int
    path: str
    """Absolute within the mount: "/", "/config.json"."""
    attributes: Mapping[str, int]
    file: VirtualFile | None = None
    children: Mapping[str, Node] = field(default_factory=dict)
    target: str = ""
    """Of a symbolic link; "" of anything else."""


class Nodes(Protocol):
    """What a mount shows. Nodes are found again by handle, which is the inode number."""

    @property
    def total_bytes(self) -> int: ...

    @property
    def count(self) -> int: ...

    def at(self, path: str) -> Node | None:
        """The node at an absolute path ("/", "/config.json"). Raises OSError."""
        ...

    def of(self, handle: int) -> Node | None:
        """The node that was opened. Raises OSError."""
        ...

    def inside(self, directory: Node) -> Mapping[str, Node]:
        """What the directory lists. Raises OSError."""
        ...


@dataclass(frozen=True)
class NodeTable:
    """All nodes of a tree, by inode number and by absolute path ("/", "/config.json").

    Inode numbers depend on the set of paths only, so they agree between mounts and machines.
    """

    by_inode: Sequence[Node | None]
    by_path: Mapping[str, Node]
    first: int = 0
    """What every inode number is larger by than its place in `by_inode`."""

    @property
    def total_bytes(self) -> int:
        return sum(node.file.size for node in self.by_path.values() if node.file is not None)

    @property
    def count(self) -> int:
        return len(self.by_path)

    def at(self, path: str) -> Node | None:
        return self.by_path.get(path)

    def of(self, handle: int) -> Node | None:
        place = handle - self.first
        return self.by_inode[place] if 0 <= place < len(self.by_inode) else None

    def inside(self, directory: Node) -> Mapping[str, Node]:
        return directory.children


def build_nodes(tree: VirtualTree, first: int = 0) -> NodeTable:
    """The table of `tree`, owned by the calling user; inode numbers begin after `first`.

    Raises MountError if a path cannot be a file name here.
    """
    for path in tree.files:
        _check_path(path)
    directories = {parent for path in tree.files for parent in _parents(path)} | {""}
    if clashes := sorted(directories & tree.files.keys()):
        raise MountError(f"the tree has {clashes[0]!r} both as a file and as a directory")
    inodes = {"": ROOT_INODE}
    for path in sorted((directories | tree.files.keys()) - {""}):
        inodes[path] = ROOT_INODE + len(inodes)

    nodes: dict[str, Node] = {}
    children: dict[str, dict[str, Node]] = {directory: {} for directory in directories}
    # Reverse order of paths makes every child before its parent.
    for path in sorted(inodes, reverse=True):
        if path in tree.files:
            file = tree.files[path]
            inode = first + inodes[path]
            mode = stat.S_IFREG | 0o444
            node = Node(
                inode, f"/{path}", attributes(inode, mode, 1, file.size, tree.mtime_ns), file
            )
        else:
            inside = dict(sorted(children[path].items()))
            subdirectories = sum(child.file is None for child in inside.values())
            inode, mode = first + inodes[path], stat.S_IFDIR | 0o555
            about = attributes(inode, mode, 2 + subdirectories, 0, tree.mtime_ns)
            node = Node(inode, f"/{path}", about, None, inside)
        nodes[path] = node
        if path:
            parent, _, name = path.rpartition("/")
            children[parent][name] = node

    by_inode: list[Node | None] = [None] * (ROOT_INODE + len(nodes))
    for node in nodes.values():
        by_inode[node.inode - first] = node
    return NodeTable(by_inode, {node.path: node for node in nodes.values()}, first)


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _check_path(path: str) -> None:
    for name in path.split("/"):
        if name in ("", ".", "..") or "\0" in name or len(os.fsencode(name)) > _NAME_MAX:
            raise MountError(
                f"the tree's path {path!r} cannot be shown: expected names of 1 to {_NAME_MAX}"
                " bytes joined by '/', none of them '.' or '..'"
            )


def attributes(inode: int, mode: int, links: int, size: int, mtime_ns: int) -> dict[str, int]:
    """What stat says of a node that the calling user owns."""
    return {
        "st_ino": inode,
        "st_mode": mode,
        "st_nlink": links,
        "st_uid": os.geteuid(),
        "st_gid": os.getegid(),
        "st_size": size,
        "st_blksize": PREFERRED_IO,
        "st_blocks": -(-size // 512),
        "st_atime": mtime_ns,
        "st_mtime": mtime_ns,
        "st_ctime": mtime_ns,
    }
