"""Taking a mount away, and naming who keeps it busy."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mcorefs.errors import MountError
from mcorefs.mount.binding import fusermount
from mcorefs.mount.mountpoint import Health, MountEntry, entries_at, health, locate, mounted

_MNT_FORCE, _MNT_DETACH = 1, 2
_UMOUNT_NOFOLLOW = 8
_GONE_WITHIN = 10.0
_NAMED_HOLDERS = 5


def unmount(mnt: Path, force: bool = False) -> None:
    """Remove the mcorefs mount at `mnt`, and return when it is gone.

    A dead mount is detached at once. `force` detaches a busy one too: it disappears from the
    directory tree, and its daemon ends when the last user has closed its files; of one that does
    not answer, those who wait for it get an error.
    Raises MountError if `mnt` is no mcorefs mount, is busy or does not answer.
    """
    entry = mounted(mnt)
    if entry is None:
        raise MountError(f"{mnt} is not a mount point: nothing to unmount")
    if not entry.ours:
        raise MountError(
            f"{mnt} is a {entry.fstype} mount from {entry.source}, not one of mcorefs:"
            f" remove it with umount or fusermount3 -u"
        )
    path = entry.mountpoint
    stacked = len(entries_at(path))
    state = health(path)
    if state is Health.SILENT:
        if not force:
            raise MountError(
                f"{mnt} does not answer: its daemon is stopped, or waits for storage that does not "
                f"answer. To take it away all the same: mcorefs umount --force {mnt}"
            )
        _abort(entry, path)
    _detach(path, lazily=force or state is Health.DEAD)
    deadline = time.monotonic() + _GONE_WITHIN
    while len(entries_at(path)) >= stacked:
        if time.monotonic() > deadline:
            raise MountError(f"{mnt} is still mounted {_GONE_WITHIN:.0f} s after unmounting it")
        time.sleep(0.01)


def take_away(path: Path, device: str) -> None:
    """Detach the mount with this device number, if libfuse has left it at `path`: it has not the
    right to where the process has given that up, but fusermount has."""
    if any(entry.ours and entry.device == device for entry in entries_at(path)[-1:]):
        _detach(path, lazily=True)


def _detach(path: Path, lazily: bool) -> None:
    reason = _umount2(path, lazily)
    if reason == errno.EPERM:
        _run_fusermount(path, lazily)
    elif reason == errno.EBUSY:
        raise MountError(_busy(path))
    # EINVAL: auto_unmount or another umount was faster.
    elif reason not in (0, errno.EINVAL):
        raise MountError(f"{path} cannot be unmounted: {os.strerror(reason)}")


def _abort(entry: MountEntry, path: Path) -> None:
    """End the connection to a daemon that does not answer: who waits for it gets ECONNABORTED."""
    number = entry.device.partition(":")[2]
    with suppress(OSError):  # only there where fusectl is mounted
        Path(f"/sys/fs/fuse/connections/{number}/abort").write_text("1")
        return
    _umount2(path, lazily=True, forcibly=True)


def _umount2(path: Path, lazily: bool, forcibly: bool = False) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazily else 0) | (_MNT_FORCE if forcibly else 0)
    return 0 if libc.umount2(os.fsencode(path), flags) == 0 else ctypes.get_errno()


def _run_fusermount(path: Path, lazily: bool) -> None:
    program = fusermount()
    if program is None:
        raise MountError(
            f"{path} cannot be unmounted: this user is not root, and neither fusermount3 nor"
            " fusermount is in PATH (apt-get install fuse3)"
        )
    command = [program, "-u", *(["-z"] if lazily else []), "--", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0 or not entries_at(path):
        return
    if "busy" in done.stderr:
        raise MountError(_busy(path))
    raise MountError(f"{path} cannot be unmounted: {done.stderr.strip()}")


def _busy(path: Path) -> str:
    holders = list(_holders(path))
    more = len(holders) - _NAMED_HOLDERS
    named = ", ".join(holders[:_NAMED_HOLDERS]) + (f" and {more} more" if more > 0 else "")
    who = f"in use by {named}" if holders else "in use (by whom cannot be seen from here)"
    return (
        f"{path} is {who}. End them, or detach it all the same with: mcorefs umount --force {path}"
    )


def _holders(path: Path) -> Iterator[str]:
    """Processes with a working directory, open file or mapping below `path`, by their links in
    /proc only: nothing below the mount is touched."""
    point = str(locate(path))
    for process in sorted(Path("/proc").glob("[0-9]*")):
        with suppress(OSError):
            if any(used == point or used.startswith(f"{point}/") for used in _used(process)):
                yield f"pid {process.name} ({(process / 'comm').read_text().strip()})"


def _used(process: Path) -> Iterator[str]:
    for link in (process / "cwd", process / "root", *(process / "fd").iterdir()):
        with suppress(OSError):
            yield os.readlink(link)
    for line in (process / "maps").read_text(errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            yield fields[5]
