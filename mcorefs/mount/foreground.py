"""Serving a mount from the calling process, with the first read made by a child.

The process that serves must not read its own mount: a page fault taken with the interpreter
lock held would wait for an answer that needs the lock.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, cast

from mcorefs.errors import McorefsError, MountError
from mcorefs.mount.firstread import Expectation, raise_read_ahead
from mcorefs.mount.living import Living
from mcorefs.mount.options import MountOptions
from mcorefs.mount.session import message_file, run_session
from mcorefs.mount.unmounting import unmount
from mcorefs.tree import VirtualTree


def serve_foreground(
    tree_factory: Callable[[], VirtualTree | Living],
    path: Path | None,
    options: MountOptions,
    check: Callable[[Path], None] | None,
    on_ready: Callable[[], None] | None,
    on_live: Callable[[], None],
) -> None:
    """`serve` for `options.foreground`: returns when the mount at `path` has been removed."""

    def live() -> None:
        on_live()
        checker.begin(expectation)

    checker = _Checker(path, options, check)  # forks, so it comes before any thread
    watcher = threading.Thread(target=checker.watch, args=(on_ready,), daemon=True)
    watcher.start()
    try:
        tree = tree_factory()
        expectation = Expectation.of(tree)
        with message_file() as messages:
            run_session(tree, path, options, messages, live)
    finally:
        checker.end()
        watcher.join()
    if checker.failure:
        raise MountError(checker.failure)


class _Checker:
    """A forked child that reads the mount once it is live, and says what it found."""

    def __init__(
        self, path: Path | None, options: MountOptions, check: Callable[[Path], None] | None
    ) -> None:
        self.failure = ""
        self._path, self._is_ours = path, options.fuse_fd is None
        orders_in, orders_out = os.pipe()
        answers_in, answers_out = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(orders_out)
            os.close(answers_in)
            _check_in_child(path, options, check, orders_in, answers_out)
        os.close(orders_in)
        os.close(answers_out)
        self._orders = os.fdopen(orders_out, "wb")
        self._answers = os.fdopen(answers_in, "rb")

    def begin(self, expectation: Expectation) -> None:
        """The mount is live: let the child read. Called from libfuse's thread."""
        with suppress(BrokenPipeError):
            self._orders.write(expectation.to_json().encode() + b"\n")
            self._orders.flush()

    def watch(self, on_ready: Callable[[], None] | None) -> None:
        """Wait for the child's verdict; a bad one takes the mount away, which ends the session."""
        with self._answers as answers:
            answer = answers.readline()
        if not answer:
            return  # never live
        self.failure = cast(str, json.loads(answer))
        if self.failure:
            if self._is_ours and self._path is not None:
                with suppress(MountError):
                    unmount(self._path, force=True)
            else:
                os.kill(os.getpid(), signal.SIGTERM)
        elif on_ready is not None:
            on_ready()

    def end(self) -> None:
        with suppress(BrokenPipeError):
            self._orders.close()
        # The session is over, so it has answered, or its answer does not matter any more.
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def _check_in_child(
    path: Path | None,
    options: MountOptions,
    check: Callable[[Path], None] | None,
    orders: int,
    answers: int,
) -> NoReturn:
    failure = ""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the session, which ends this
    try:
        with os.fdopen(orders, "rb") as pipe:
            text = pipe.readline()
        if not text:
            os._exit(0)
        expectation = Expectation.from_json(text.decode())
        if path is not None:
            expectation.check(path)
            raise_read_ahead(path, options.read_ahead_kib)
            if check is not None:
                check(path)
    except BaseException as error:
        failure = str(error) if isinstance(error, McorefsError) else traceback.format_exc()
    finally:
        with suppress(OSError):
            os.write(answers, json.dumps(failure).encode() + b"\n")
        os._exit(0)
