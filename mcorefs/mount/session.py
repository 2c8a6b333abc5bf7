"""One libfuse session: mount a tree and answer requests until it is unmounted."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO, cast

from mcorefs.errors import MountError
from mcorefs.mount.binding import LIBFUSE2, Binding, advice, load_binding
from mcorefs.mount.living import INTERVAL, OPEN_FILES, Living
from mcorefs.mount.mountpoint import entries_at
from mcorefs.mount.nodes import build_nodes
from mcorefs.mount.operations import (
    BACKGROUND_REQUESTS,
    REQUEST_BYTES,
    CallableLivingOperations,
    CallableOperations,
    InPlaceReads,
    LivingOperations,
    Operations,
    Turns,
    WorkerThreads,
)
from mcorefs.mount.options import MountOptions
from mcorefs.mount.place import check_binding
from mcorefs.mount.status import Status, Value
from mcorefs.mount.unmounting import take_away
from mcorefs.tree import VirtualTree

_FOR_EVER = 86400 * 365
"""Seconds for which the kernel may keep names and attributes: the tree never changes."""
_M_ARENA_MAX, _HEAPS = -8, 4
_LIBFUSE2_REQUEST_BYTES = 128 << 10
_ENDED_BY_SIGNAL = 8  # libfuse 3, when its handler of SIGINT, SIGTERM or SIGHUP ended the loop
THREADS = 96
"""Of libfuse, which starts one only when all others are busy, as they are when storage does not
answer: more than read-ahead can take up, so that the rest of the mount is still answered."""
_FIXED_THREADS = (3, 12)  # first libfuse with max_threads; its threads never end before it

Option = bool | int | float | str
_OPERATIONS: dict[tuple[bool, bool], type[Operations]] = {
    (False, False): Operations,
    (True, False): CallableOperations,
    (False, True): LivingOperations,
    (True, True): CallableLivingOperations,
}
"""By whether fusepy calls them, and whether iterations come and go."""
Handler = Callable[[int, FrameType | None], object] | int | None


def run_session(
    served: VirtualTree | Living,
    mnt: Path | None,
    options: MountOptions,
    messages: BinaryIO,
    on_live: Callable[[], None],
) -> None:
    """Mount `served` at `mnt`, or take `options.fuse_fd` for its mount, and serve it in this thread
    and libfuse's own, until unmounted.

    What libfuse prints until the mount is live goes to `messages`. `on_live` is called when the
    kernel has the mount; it must not touch it. SIGINT, SIGTERM and SIGHUP unmount.
    Raises MountError with libfuse's words if mounting fails.
    """
    binding = load_binding()
    check_binding(binding, options)
    where = str(mnt) if options.fuse_fd is None else f"/dev/fd/{options.fuse_fd}"
    lived, device = False, ""
    cwd = os.getcwd()
    _share_heaps()

    def live() -> None:
        nonlocal lived, device
        lived = True
        if options.fuse_fd is None and mnt is not None:
            device = next((entry.device for entry in entries_at(mnt)[-1:]), "")
        os.chdir(cwd)  # libfuse went to /, even in the foreground
        restore_stderr()
        on_live()

    is_living = isinstance(served, Living)
    if is_living:
        _allow_open_files()
    nodes = served if isinstance(served, Living) else build_nodes(served)
    # Older libfuse ends idle threads and starts new ones.
    workers = WorkerThreads(THREADS if binding.version >= _FIXED_THREADS else 0)
    operations_class = _OPERATIONS[binding.flavour is LIBFUSE2, is_living]
    status = Status(lambda: _about(served), served.activity)
    operations = operations_class(nodes, workers, Turns(options.threads), status, live)
    session_class = type("Session", (InPlaceReads, binding.fuse_class), {})
    serve = cast(Callable[..., object], session_class)
    mount_options = _libfuse_options(binding, options, INTERVAL if is_living else _FOR_EVER)
    with _stderr_to(messages) as restore_stderr, _default_signals():
        try:
            serve(operations, where, foreground=True, **mount_options)
        except RuntimeError as error:
            if not lived or error.args != (_ENDED_BY_SIGNAL,):
                raise MountError(_failure(where, binding, messages, lived, error)) from error
        finally:
            if device and mnt is not None:
                take_away(mnt, device)


def _about(served: VirtualTree | Living) -> Mapping[str, Value]:
    """What is served, for the status."""
    if isinstance(served, VirtualTree):
        return {} if served.about is None else served.about.to_json()
    return {
        "run": served.root,
        "iterations": list(served.names),
        "opened": [about.to_json() for about in served.opened()],
    }


def _libfuse_options(binding: Binding, options: MountOptions, timeout: float) -> dict[str, Option]:
    """Options for libfuse, which passes on to the kernel what is the kernel's: names and attributes
    are believed for `timeout` seconds."""
    libfuse2 = binding.flavour is LIBFUSE2
    chosen: dict[str, Option] = {
        "ro": True,
        "nosuid": True,
        "nodev": True,
        "noexec": True,
        "default_permissions": True,
        "fsname": options.fsname,
        "subtype": "mcorefs",
        "use_ino": True,
        "kernel_cache": True,
        "attr_timeout": timeout,
        "entry_timeout": timeout,
        "negative_timeout": timeout if timeout == _FOR_EVER else 0,
        "max_read": _LIBFUSE2_REQUEST_BYTES if libfuse2 else REQUEST_BYTES,
    }
    if libfuse2:  # libfuse 3 is told when it starts
        chosen["max_background"] = BACKGROUND_REQUESTS
        chosen["congestion_threshold"] = BACKGROUND_REQUESTS * 3 // 4
    if binding.version >= _FIXED_THREADS:
        chosen["max_threads"] = THREADS
    if options.allow_other:
        chosen["allow_other"] = True
    if (
        options.fuse_fd is None
        and options.auto_unmount
        and shutil.which(binding.flavour.mounter) is not None
    ):
        chosen["auto_unmount"] = True
    return chosen


def _share_heaps() -> None:
    """Have all threads allocate from few heaps: each keeps the largest answers it ever held."""
    with suppress(AttributeError, OSError):  # musl has no such thing
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _HEAPS)


def _allow_open_files() -> None:
    """As many as this process may have: each iteration keeps some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _failure(
    where: str, binding: Binding, messages: BinaryIO, lived: bool, error: RuntimeError
) -> str:
    messages.seek(0)
    said = messages.read().decode(errors="replace").strip() or f"no message, exit code {error}"
    what = "stopped serving" if lived else "could not mount"
    major, minor = binding.version
    text = f"libfuse {major}.{minor} {what} {where}: {said}"
    if "not permitted" in said.lower() or "permission denied" in said.lower():
        text += "\n" + advice(
            "this user needs the right to: in a container --device /dev/fuse --cap-add SYS_ADMIN; "
            "where AppArmor is used --security-opt apparmor=unconfined, where SELinux is "
            "--security-opt label=disable (dmesg and `ausearch -m avc` say whether they refused)"
        )
    return text


def message_file() -> BinaryIO:
    """A file in memory for what libfuse prints: a temporary directory may not be writable."""
    return cast(BinaryIO, os.fdopen(os.memfd_create("mcorefs-mount"), "w+b"))


@contextmanager
def _stderr_to(messages: BinaryIO) -> Iterator[Callable[[], None]]:
    """Point fd 2 at `messages`; the function given undoes it early, and may be called again."""
    sys.stderr.flush()
    saved = os.dup(2)
    os.dup2(messages.fileno(), 2)
    restored = False

    def restore() -> None:
        nonlocal restored
        if not restored:
            restored = True
            os.dup2(saved, 2)
            os.close(saved)

    try:
        yield restore
    finally:
        restore()


@contextmanager
def _default_signals() -> Iterator[None]:
    """libfuse sets its own handlers, but only in place of the default ones."""
    if threading.current_thread() is not threading.main_thread():
        raise MountError("a mount can only be served from the main thread of a process")
    before: dict[signal.Signals, Handler] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
