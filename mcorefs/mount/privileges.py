"""What the process that serves a mount may still do: read any file it could, and nothing more.

It needs no more than that of what root may do: libfuse asks fusermount to mount, as it does for
everybody where the mount is to go when the daemon dies, and fusermount gets its rights when it is
executed; so no_new_privs is not set, for a user's mount is taken away by fusermount too.
Supplementary groups stay, for a checkpoint may be readable through one of them only.
"""

from __future__ import annotations

import ctypes
import os
import shutil

from mcorefs.mount.binding import may_load
from mcorefs.mount.options import MountOptions

_CAP_DAC_READ_SEARCH, _CAP_SYS_ADMIN = 2, 21  # linux/capability.h
_VERSION_3 = 0x20080522
_PR_GET_SECUREBITS, _PR_GET_NO_NEW_PRIVS = 27, 39
_SECBIT_NOROOT = 1


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Words(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


_Data = _Words * 2


def keep_what_serving_needs(options: MountOptions) -> None:
    """Give up every capability but that to read any file, and that to mount if libfuse must do it
    itself. Capabilities belong to threads, so call this before there are others."""
    if os.geteuid() != 0:
        return  # has none, or was given those it has on purpose
    kept = 1 << _CAP_DAC_READ_SEARCH
    if options.fuse_fd is None and not (options.auto_unmount and _fusermount_has_rights()):
        kept |= 1 << _CAP_SYS_ADMIN
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(_VERSION_3, 0), _Data()
    if libc.capget(ctypes.byref(header), data) != 0:
        return  # a sandbox that has no such call
    for word in data:
        word.permitted &= kept
        word.effective &= word.permitted
        word.inheritable = 0
        kept >>= 32
    libc.capset(ctypes.byref(header), data)


def _fusermount_has_rights() -> bool:
    """Whether whatever libfuse will be loaded finds its fusermount, and root's rights come back
    when it is executed."""
    libc = ctypes.CDLL(None)
    if libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 0:
        return False
    if libc.prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0) & _SECBIT_NOROOT:
        return False
    return all(shutil.which(flavour.mounter) is not None for flavour in may_load())
