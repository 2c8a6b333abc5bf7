"""Serving a mount from a process of its own, and not saying so before it can be read."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from mcorefs.errors import McorefsError, MountError
from mcorefs.mount.firstread import Expectation, raise_read_ahead
from mcorefs.mount.foreground import serve_foreground
from mcorefs.mount.living import Living
from mcorefs.mount.logs import JsonLines
from mcorefs.mount.mountpoint import mounted
from mcorefs.mount.options import MountOptions
from mcorefs.mount.place import check_place, claimed
from mcorefs.mount.privileges import keep_what_serving_needs
from mcorefs.mount.session import message_file, run_session
from mcorefs.mount.unmounting import unmount
from mcorefs.tree import VirtualTree

log = logging.getLogger("mcorefs.daemon")

TreeFactory = Callable[[], VirtualTree | Living]
Check = Callable[[Path], None]

_DEFAULT_OPTIONS = MountOptions()
_ENDS_WITHIN = 10.0


def serve(
    tree_factory: TreeFactory,
    mnt: Path | None,
    options: MountOptions = _DEFAULT_OPTIONS,
    check: Check | None = None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Mount a tree, or the trees of a run, at `mnt`.

    `tree_factory` is called once, in the process that will serve: threads that it starts live
    on. The tree must not hold relative paths, for the daemon's directory is /. Before the mount
    is called good, it is read through the kernel and compared with the tree, and `check(mnt)`
    is run, both outside the serving process; then `on_ready` is called, in this process. With
    `options.fuse_fd` `mnt` is where that is mounted; if it is None, nothing is read or checked.

    Returns when the daemon serves; with `options.foreground`, when the mount has been removed.
    Raises MountError, or what `check` raised, and leaves no mount and no process behind.
    """
    path = check_place(mnt, options)
    with claimed(path, options) as release:
        if options.foreground:
            serve_foreground(tree_factory, path, options, check, on_ready, release)
            return
        _start(tree_factory, path, options, check).forget()
    if on_ready is not None:
        on_ready()


@contextmanager
def mounting(
    tree: VirtualTree | Living, mnt: Path, options: MountOptions = _DEFAULT_OPTIONS
) -> Iterator[Path]:
    """Serve `tree` at `mnt` from a forked process while the block runs, then unmount."""
    path = check_place(mnt, options)
    assert path is not None
    with claimed(path, options):
        server = _start(lambda: tree, path, options, None)
    try:
        yield path
    finally:
        server.end(path if options.fuse_fd is None else None)


@dataclass(frozen=True)
class _Server:
    """A serving process, seen from the one that started it.

    `reports` is a pipe that the server holds open as long as it lives.
    """

    pid: int
    reports: BinaryIO

    def forget(self) -> None:
        self.reports.close()

    def end(self, path: Path | None) -> None:
        """Unmount `path`, if it is this server's to unmount, and see the process end, by force if
        need be."""
        entry = None if path is None else mounted(path)
        if entry is not None and entry.ours:
            with suppress(MountError):  # the process goes all the same
                unmount(entry.mountpoint, force=True)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._alive(0.5 if number == signal.SIGTERM else _ENDS_WITHIN):
                os.kill(self.pid, number)
        self._alive(_ENDS_WITHIN)
        self.reports.close()

    def _alive(self, patience: float) -> bool:
        """Whether it still lives after at most `patience` seconds."""
        deadline = time.monotonic() + patience
        poll = select.poll()  # select itself takes no descriptor beyond 1023
        poll.register(self.reports, select.POLLIN)
        while poll.poll(1000 * max(0.0, deadline - time.monotonic())):
            if not os.read(self.reports.fileno(), 1 << 16):
                return False
        return True


def _start(
    tree_factory: TreeFactory, path: Path | None, options: MountOptions, check: Check | None
) -> _Server:
    """Fork the daemon; returns when its mount is live and has passed the first read."""
    log_fd = _open_log(options.log_file)
    sys.stdout.flush()
    sys.stderr.flush()
    with message_file() as messages:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _become_daemon(tree_factory, path, options, writing, messages, log_fd)
        os.close(writing)
        os.close(log_fd)
        os.waitpid(child, 0)
        reports = os.fdopen(reading, "rb")
        server = _Server(int(_next_report(reports, messages)), reports)
        try:
            expectation = Expectation.from_json(_next_report(reports, messages))
            if path is not None:
                expectation.check(path)
                raise_read_ahead(path, options.read_ahead_kib)
                if check is not None:
                    check(path)
        except BaseException:
            server.end(path if options.fuse_fd is None else None)
            raise
    return server


def _next_report(reports: BinaryIO, messages: BinaryIO) -> str:
    """The next report of the daemon: its pid, then what its live mount must show.

    Raises MountError if it sent an error instead or ended.
    """
    line = reports.readline()
    if not line:
        messages.seek(0)
        said = messages.read().decode(errors="replace").strip() or "it left no message"
        raise MountError(f"the serving process ended before the mount was live: {said}")
    kind, content = cast(tuple[str, str], json.loads(line))
    if kind == "error":
        raise MountError(content)
    return content


def _become_daemon(
    tree_factory: TreeFactory,
    path: Path | None,
    options: MountOptions,
    writing: int,
    messages: BinaryIO,
    log_fd: int,
) -> NoReturn:
    """The life of the daemon, from the first fork on; nothing returns to the caller's code."""
    live = False

    def report(kind: str, content: str) -> None:
        # A starter that was killed does not end the mount.
        with suppress(BrokenPipeError), open(writing, "wb", closefd=False) as pipe:
            pipe.write(json.dumps([kind, content]).encode() + b"\n")

    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        if os.fork():
            os._exit(0)
        report("pid", str(os.getpid()))
        keep_what_serving_needs(options)
        tree = tree_factory()
        expectation = Expectation.of(tree)
        _leave_terminal(log_fd)
        _log_to_stderr(options.log_file is not None)

        def on_live() -> None:
            nonlocal live
            live = True
            log.info("mounted", extra={"path": path})
            report("live", expectation.to_json())

        run_session(tree, path, options, messages, on_live)
        log.info("unmounted", extra={"path": path})
        os._exit(0)
    except BaseException as error:
        text = str(error) if isinstance(error, McorefsError) else traceback.format_exc()
        if live:
            log.critical("%s", text, extra={"path": path})
        else:
            report("error", text)
    finally:
        os._exit(1)


def _open_log(log_file: Path | None) -> int:
    try:
        # O_NONBLOCK: to open a FIFO waits for who reads it, and so could every line.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(os.devnull if log_file is None else log_file, flags, 0o600)
    except OSError as error:
        raise MountError(
            f"the log file {log_file} cannot be written: {error.strerror}: name another one"
        ) from error
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise MountError(
            f"the log file {log_file} is a FIFO, whose reader could hold up the mount: name a file"
        )
    os.set_blocking(fd, True)
    return fd


def _leave_terminal(log_fd: int) -> None:
    """Input from nowhere, output to the log; the directory of the call may be removed."""
    nowhere = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nowhere, 0)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(nowhere)
    os.close(log_fd)
    os.chdir("/")
    os.umask(0o022)


def _log_to_stderr(wanted: bool) -> None:
    # The handlers of the caller write to its terminal, or are locked by threads left behind.
    handler: logging.Handler = logging.NullHandler()
    if wanted:
        handler = logging.StreamHandler(open(2, "w", closefd=False))  # noqa: SIM115
    handler.setFormatter(JsonLines())
    logging.basicConfig(force=True, level=logging.INFO, handlers=[handler])
