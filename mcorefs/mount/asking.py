"""Asking a mount how it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from mcorefs.errors import MountError
from mcorefs.mount.mountpoint import Health, health, mounted
from mcorefs.mount.status import PATH, Value


def ask(mnt: Path) -> Mapping[str, Value]:
    """What the mount at `mnt` says of itself. Raises MountError if it is none, or says nothing."""
    entry = mounted(mnt)
    if entry is None:
        raise MountError(f"{mnt} is not a mount point")
    if not entry.fstype.startswith("fuse"):
        raise MountError(f"{mnt} is a {entry.fstype} mount from {entry.source}, not one of mcorefs")
    state = health(entry.mountpoint)
    if state is Health.DEAD:
        raise MountError(
            f"{mnt} is a dead mount: its daemon is gone. Remove it with: mcorefs umount {mnt}"
        )
    if state is Health.SILENT:
        raise MountError(
            f"{mnt} does not answer: its daemon is stopped, or waits for storage that does not "
            f"answer. To take it away all the same: mcorefs umount --force {mnt}"
        )
    try:
        return cast(Mapping[str, Value], json.loads((entry.mountpoint / PATH).read_bytes()))
    except FileNotFoundError:
        raise MountError(f"{mnt} is a {entry.fstype} mount, but not one of mcorefs") from None
    except (OSError, ValueError) as error:
        raise MountError(f"{mnt} does not say how it is: {error}") from error
