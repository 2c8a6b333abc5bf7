"""Mounting a VirtualTree with FUSE, read-only. Importing this loads no libfuse."""

from mcorefs.mount.asking import ask
from mcorefs.mount.binding import check_fuse
from mcorefs.mount.daemon import mounting, serve
from mcorefs.mount.living import Living
from mcorefs.mount.mountpoint import MountEntry, check_mountpoint, mounted
from mcorefs.mount.options import READ_AHEAD_KIB, MountOptions
from mcorefs.mount.place import check_place, descriptor_in
from mcorefs.mount.unmounting import unmount

__all__ = [
    "READ_AHEAD_KIB",
    "Living",
    "MountEntry",
    "MountOptions",
    "ask",
    "check_fuse",
    "check_mountpoint",
    "check_place",
    "descriptor_in",
    "mounted",
    "mounting",
    "serve",
    "unmount",
]
