"""Where a tree is mounted: a directory, or a descriptor of a mount that somebody else has made."""

from __future__ import annotations

import fcntl
import os
import re
import select
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mcorefs.errors import MountError
from mcorefs.mount.binding import LIBFUSE3, Binding, check_fuse
from mcorefs.mount.mountpoint import check_mountpoint, locate, mounted
from mcorefs.mount.options import MountOptions

_DEVICE = os.makedev(10, 229)  # Linux:Documentation/admin-guide/devices.txt
_DESCRIPTOR = re.compile(r"/dev/fd/(\d+)")
_TAKES_DESCRIPTORS = (3, 3)
"""The first libfuse that serves "/dev/fd/N" (libfuse:ChangeLog.rst)."""


def descriptor_in(mnt: Path) -> int | None:
    """N if `mnt` is "/dev/fd/N", as programs that mount for others name what they hand over."""
    match = _DESCRIPTOR.fullmatch(str(mnt))
    return None if match is None else int(match[1])


def check_place(mnt: Path | None, options: MountOptions) -> Path | None:
    """`mnt` as mountinfo spells it. With `options.fuse_fd` it is where that is mounted, or None if
    that cannot be seen from here.

    Raises MountError, saying what to do, if nothing can be served there.
    """
    if options.fuse_fd is None:
        if mnt is None:
            raise MountError("a mount point is missing: name an empty directory")
        check_fuse(options.allow_other)
        check_mountpoint(mnt)
        return locate(mnt)
    _check_descriptor(options.fuse_fd)
    if mnt is None:
        return None
    entry = mounted(mnt)  # not touched: until it is served, it does not answer
    if entry is None or not entry.fstype.startswith("fuse"):
        raise MountError(
            f"{mnt} is not where it is mounted: with --fuse-fd name the mount point of that "
            "descriptor, or none if it cannot be seen from here"
        )
    return entry.mountpoint


@contextmanager
def claimed(path: Path | None, options: MountOptions) -> Iterator[Callable[[], None]]:
    """Nobody else of this program mounts at `path` in the block, or until the function given is
    called: a second mount would hide the first. Raises MountError."""
    fd = None if path is None or options.fuse_fd is not None else _locked(path)
    is_held = fd is not None

    def release() -> None:
        nonlocal is_held
        if fd is not None and is_held:
            is_held = False
            fcntl.flock(fd, fcntl.LOCK_UN)  # whoever was forked has the same lock

    try:
        if fd is not None and path is not None:
            check_mountpoint(path)
        yield release
    finally:
        release()
        if fd is not None:
            os.close(fd)


def _locked(path: Path) -> int | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None  # it need not be readable
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise MountError(
            f"{path}: another process is about to mount there; is one of them started twice? "
            "Name another directory"
        ) from None
    except OSError:  # a file system without locks
        os.close(fd)
        return None
    return fd


def check_binding(binding: Binding, options: MountOptions) -> None:
    """Raise MountError if this libfuse cannot serve a descriptor that it is to serve."""
    takes = binding.flavour is LIBFUSE3 and binding.version >= _TAKES_DESCRIPTORS
    if options.fuse_fd is not None and not takes:
        major, minor = binding.version
        raise MountError(
            f"--fuse-fd needs libfuse 3.3 or later, and this is {major}.{minor}: "
            "apt-get install fuse3"
        )


def _check_descriptor(fd: int) -> None:
    try:
        found = os.fstat(fd)
    except OSError:
        raise MountError(
            f"descriptor {fd} is not open: whoever opened /dev/fuse must let it be inherited"
        ) from None
    if not stat.S_ISCHR(found.st_mode) or found.st_rdev != _DEVICE:
        name = os.readlink(f"/proc/self/fd/{fd}")
        raise MountError(f"descriptor {fd} is {name}, not /dev/fuse")
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        raise MountError(
            f"descriptor {fd} is /dev/fuse, but nobody has mounted it, or the mount is gone: "
            f"whoever hands it over must call mount(2) with fd={fd} first"
        )
