"""MountOptions: what a person may choose about a mount."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from mcorefs.errors import MountError

# libfuse takes options as one comma-separated string and /proc/mounts separates fields by blanks.
_FSNAME = re.compile(r"[A-Za-z0-9._:/@+=-]{1,64}")


READ_AHEAD_KIB = 4096


def _threads() -> int:
    """Two for each processor, so that one can wait for storage while another copies. More only
    take turns at the interpreter lock: 16 on two processors read a fifth slower than 4."""
    return max(4, min(16, 2 * len(os.sched_getaffinity(0))))


@dataclass(frozen=True)
class MountOptions:
    """How a tree is mounted; the defaults suit nearly everyone.

    A relative `log_file` is taken from the directory of the call, before the daemon leaves it.
    """

    fsname: str = "mcorefs"
    """Device name in /proc/mounts. transformers reads whole files, not mmap, where it is
    exactly "hf-mount"."""
    allow_other: bool = False
    """Let other users read: a private checkpoint becomes readable for everyone on the machine."""
    foreground: bool = False
    """Serve in the calling process until unmounted, instead of in a daemon."""
    log_file: Path | None = None
    """Where the daemon writes its log; nowhere if None. Foreground: the caller's own logging."""
    fuse_fd: int | None = None
    """A descriptor of /dev/fuse that somebody has mounted already, and will take away; kernel and
    access are then told by them what else is chosen here."""
    auto_unmount: bool = True
    """Have fusermount remove the mount if the daemon dies."""
    read_ahead_kib: int = READ_AHEAD_KIB
    """Kernel read-ahead on this mount; needs root, and is left at the kernel's default without."""
    threads: int = field(default_factory=_threads)
    """Reads computed at once."""

    def __post_init__(self) -> None:
        if not _FSNAME.fullmatch(self.fsname):
            raise MountError(
                f"file system name {self.fsname!r} cannot be used: expected 1 to 64 of letters,"
                " digits and ._:/@+=- (for example mcorefs or hf-mount)"
            )
