"""The one seam to libfuse: which library, through which Python binding, or why none.

mfusepy drives libfuse 3 (1 MiB requests), fusepy drives libfuse 2 (128 KiB requests). Both have
the same API. Nothing of libfuse is loaded before `load_binding` is called.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

from mcorefs.errors import MountError

CHOICE_VARIABLE = "MCOREFS_FUSE"
_PATH_VARIABLE = "FUSE_LIBRARY_PATH"
_FUSE_DEVICE = Path("/dev/fuse")
_FUSE_CONF = Path("/etc/fuse.conf")


@dataclass(frozen=True)
class Flavour:
    """One way to reach libfuse. `sonames` are tried in order, newest first."""

    name: str
    major: int
    module: str
    package: str
    sonames: tuple[str, ...]
    mounter: str
    """The program that the library runs to mount for users, and to unmount when it dies."""


LIBFUSE3 = Flavour(
    "libfuse3", 3, "mfusepy", "mfusepy", ("libfuse3.so.4", "libfuse3.so.3"), "fusermount3"
)
LIBFUSE2 = Flavour("libfuse2", 2, "fuse", "fusepy", ("libfuse.so.2",), "fusermount")
_FLAVOURS = (LIBFUSE3, LIBFUSE2)


@dataclass(frozen=True)
class Binding:
    """A loaded libfuse: the binding's FUSE class, and the library's version."""

    flavour: Flavour
    version: tuple[int, int]
    fuse_class: type


def load_binding() -> Binding:
    """Load libfuse 3 if it is there, else libfuse 2; MCOREFS_FUSE forces one of them.

    Raises MountError that says why each could not be loaded.
    """
    failures: list[str] = []
    for flavour in may_load():
        try:
            return _load(flavour)
        except (ImportError, OSError, AttributeError, _UnusableError) as error:
            failures.append(f"{flavour.name} through {flavour.package}: {error}")
    raise MountError(
        "no FUSE library can be loaded"
        + "".join(f"\n  - {failure}" for failure in failures)
        + "\n"
        + advice("apt-get install fuse3")
    )


def check_fuse(allow_other: bool) -> None:
    """Raise MountError if this user cannot mount with FUSE here; loads no library."""
    if not _FUSE_DEVICE.exists():
        raise MountError(
            f"{_FUSE_DEVICE} is missing, so nothing can be mounted here.\n"
            + advice("modprobe fuse (in a container: --device /dev/fuse --cap-add SYS_ADMIN)")
        )
    # fusermount, though setuid root, opens it with the rights of its caller.
    try:
        os.close(os.open(_FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise MountError(
            f"{_FUSE_DEVICE} cannot be opened: {error.strerror}.\n"
            + advice(
                f"chmod 666 {_FUSE_DEVICE} as root"
                " (in a container: --device /dev/fuse --cap-add SYS_ADMIN; where SELinux or "
                "AppArmor is used, also --security-opt label=disable or apparmor=unconfined)"
            )
        ) from error
    if os.geteuid() == 0:
        return
    if fusermount() is None:
        raise MountError(
            "neither fusermount3 nor fusermount is in PATH, and a user who is not root cannot"
            " mount without it.\n" + advice("apt-get install fuse3")
        )
    if allow_other and not _conf_allows_other():
        raise MountError(
            f"allow_other was asked for by a user who is not root, but {_FUSE_CONF} has no line"
            " 'user_allow_other': have root add that line, or mount without allow_other"
        )


def fusermount() -> str | None:
    """The fusermount program, which mounts and unmounts for users who are not root."""
    return shutil.which("fusermount3") or shutil.which("fusermount")


class _UnusableError(Exception):
    """A library or binding loaded but is not the expected one."""


def may_load() -> tuple[Flavour, ...]:
    """The flavours that `load_binding` tries, in order. Raises MountError if none is known."""
    choice = os.environ.get(CHOICE_VARIABLE, "")
    if not choice:
        return _FLAVOURS
    chosen = tuple(flavour for flavour in _FLAVOURS if flavour.name == choice)
    if not chosen:
        names = " or ".join(flavour.name for flavour in _FLAVOURS)
        raise MountError(f"{CHOICE_VARIABLE} is {choice!r}, expected {names}, or unset")
    return chosen


def _load(flavour: Flavour) -> Binding:
    path, version = _find_library(flavour)
    # Both bindings read the variable when they are imported, and mfusepy would pick libfuse 2
    # where both are installed. It is put back, so that the other binding is not misled by it.
    with _environment(_PATH_VARIABLE, path):
        module = importlib.import_module(flavour.module)
    loaded = _version(cast(ctypes.CDLL, _attribute(module, "_libfuse", flavour)))
    if loaded[0] != flavour.major:
        raise _UnusableError(f"module {flavour.module} is already in use with libfuse {loaded[0]}")
    return Binding(flavour, version, cast(type, _attribute(module, "FUSE", flavour)))


def _find_library(flavour: Flavour) -> tuple[str, tuple[int, int]]:
    given = os.environ.get(_PATH_VARIABLE)
    failures: list[str] = []
    for path in (given,) if given else flavour.sonames:
        try:
            version = _version(ctypes.CDLL(path))
        except OSError as error:
            failures.append(str(error))
            continue
        if version[0] == flavour.major:
            return path, version
        failures.append(f"{path} is libfuse {version[0]}.{version[1]}")
    raise _UnusableError("; ".join(failures))


def _version(library: ctypes.CDLL) -> tuple[int, int]:
    number = int(library.fuse_version())
    return divmod(number, 10) if number < 100 else divmod(number, 100)


def _attribute(module: ModuleType, name: str, flavour: Flavour) -> object:
    try:
        return cast(object, getattr(module, name))
    except AttributeError:
        # The package fuse-python also calls its module `fuse`.
        where = getattr(module, "__file__", "?")
        raise _UnusableError(
            f"module {flavour.module} ({where}) is not that of {flavour.package}"
        ) from None


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _conf_allows_other() -> bool:
    try:
        lines = _FUSE_CONF.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def advice(remedy: str) -> str:
    """What to do to be able to mount, and what there is instead."""
    return (
        f"To mount: {remedy}\n"
        "Without FUSE: `mcorefs materialize` writes real files, and `mcorefs.open()` reads tensors"
        " in Python"
    )
