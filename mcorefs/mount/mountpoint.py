"""Mount points: what is mounted where, and whether a directory can take a mount.

Everything that can be learnt from /proc/self/mountinfo is learnt there: touching a mount whose
daemon hangs would hang us too.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mcorefs.errors import MountError

FSTYPE = "fuse.mcorefs"
_MOUNTINFO = Path("/proc/self/mountinfo")
_OCTAL = re.compile(rb"\\([0-7]{3})")
_MAX_LINKS = 40
_ANSWERS_WITHIN = 5.0


@dataclass(frozen=True)
class MountEntry:
    """One line of mountinfo."""

    mountpoint: Path
    device: str
    """major:minor, as in /sys/class/bdi."""
    fstype: str
    source: str
    options: frozenset[str]

    @property
    def ours(self) -> bool:
        return self.fstype == FSTYPE


def mounted(mnt: Path) -> MountEntry | None:
    """The uppermost mount at exactly `mnt` (symlinks followed), without touching the mount."""
    here = entries_at(locate(mnt))
    return here[-1] if here else None


def entries_at(mountpoint: Path) -> list[MountEntry]:
    """The mounts stacked at `mountpoint`, uppermost last."""
    entries = parse_mountinfo(_MOUNTINFO.read_bytes())
    return [entry for entry in entries if entry.mountpoint == mountpoint]


def parse_mountinfo(text: bytes) -> list[MountEntry]:
    """Every entry of a mountinfo file, in its order (proc_pid_mountinfo(5))."""
    entries = []
    for line in text.splitlines():
        before, separator, after = line.partition(b" - ")
        left, right = before.split(b" "), after.split(b" ")
        if not separator or len(left) < 6 or len(right) < 2:
            continue
        options = left[5].split(b",") + (right[2].split(b",") if len(right) > 2 else [])
        entries.append(
            MountEntry(
                mountpoint=Path(_unescape(left[4])),
                device=left[2].decode(),
                fstype=_unescape(right[0]),
                source=_unescape(right[1]),
                options=frozenset(_unescape(option) for option in options if option),
            )
        )
    return entries


def locate(mnt: Path) -> Path:
    """`mnt` as mountinfo spells it: absolute, symlinks followed, the last part never opened
    if it is a mount point."""
    path = Path(os.path.abspath(mnt))
    points = {entry.mountpoint for entry in parse_mountinfo(_MOUNTINFO.read_bytes())}
    for _ in range(_MAX_LINKS):
        if path in points:
            return path
        path = Path(os.path.realpath(path.parent)) / path.name
        if path in points or not os.path.islink(path):
            return path
        path = Path(os.path.abspath(path.parent / os.readlink(path)))
    raise MountError(f"{mnt}: too many levels of symbolic links")


class Health(Enum):
    """What a mount does when it is asked something."""

    LIVE = 0
    DEAD = 1
    """It has lost its daemon ("Transport endpoint is not connected")."""
    SILENT = 2
    """It does not answer: its daemon is stopped, or cannot even die, because storage that hangs
    holds one of its threads in the kernel. What touches it hangs too."""


def health(mountpoint: Path) -> Health:
    """Asked by a process of its own, which is left behind if it hangs."""
    child = os.fork()
    if child == 0:
        try:
            os.statvfs(mountpoint)  # never answered from the kernel's caches, as stat is
            os._exit(Health.LIVE.value)
        except OSError as error:
            is_dead = error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
            os._exit((Health.DEAD if is_dead else Health.LIVE).value)
        finally:
            os._exit(Health.LIVE.value)
    deadline = time.monotonic() + _ANSWERS_WITHIN
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return Health(os.waitstatus_to_exitcode(status))
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return Health.SILENT


def check_mountpoint(mnt: Path) -> None:
    """Raise MountError, saying what to do, unless `mnt` is an empty directory we may mount on."""
    path = locate(mnt)
    if path == Path("/"):
        raise MountError(f"{mnt} is the root directory: mount on an empty directory instead")
    if (entry := mounted(path)) is not None:
        raise MountError(_taken(mnt, entry))
    try:
        if not path.is_dir():
            if path.exists():
                raise MountError(f"{mnt} is not a directory: mount on an empty directory instead")
            raise MountError(f"{mnt} does not exist. Create it with: mkdir -p {mnt}")
        inside = next(os.scandir(path), None)
    except OSError as error:
        raise MountError(f"{mnt} cannot be looked into: {error.strerror}") from error
    if inside is not None:
        raise MountError(
            f"{mnt} is not empty (it has {inside.name!r}), and a mount would hide what is in it:"
            " mount on an empty directory instead"
        )
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        raise MountError(
            f"{mnt} is not writable for this user (uid {os.geteuid()}), so it cannot be mounted on:"
            " mount on a directory of your own instead"
        )


def _taken(mnt: Path, entry: MountEntry) -> str:
    remedy = f"mcorefs umount {mnt}" if entry.ours else f"umount {mnt}"
    state = health(entry.mountpoint) if entry.fstype.startswith("fuse") else Health.LIVE
    if state is Health.SILENT:
        return (
            f"{mnt} holds a {entry.fstype} mount that does not answer. If it should be taken away,"
            f" whoever uses it: {remedy} --force"
        )
    if state is Health.DEAD:
        return (
            f"{mnt} holds a dead {entry.fstype} mount: its daemon is gone (Transport endpoint is"
            f" not connected). Remove it with: mcorefs umount {mnt}"
        )
    return (
        f"{mnt} is already a mount point ({entry.fstype} from {entry.source}): mount somewhere"
        f" else, or first remove it with: {remedy}"
    )


def _unescape(field: bytes) -> str:
    # The kernel writes blank, tab, newline and backslash as \ooo.
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))
