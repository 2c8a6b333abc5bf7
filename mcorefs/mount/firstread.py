"""The first read: a live mount must show the tree before the person is told that it is there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mcorefs.errors import MountError
from mcorefs.mount.living import Living
from mcorefs.mount.mountpoint import entries_at
from mcorefs.tree import VirtualTree

_HEAD = 64
"""Bytes compared per file: part of the header of a safetensors file, never tensor data."""


@dataclass(frozen=True)
class Expectation:
    """What a mount must show: size and first bytes of every file, by path."""

    files: Mapping[str, tuple[int, bytes]]
    is_all: bool = True
    """Whether nothing else may be there."""

    @staticmethod
    def of(served: VirtualTree | Living) -> Expectation:
        """Asks every file for its first bytes; raises whatever a file that cannot be read does."""
        is_all = isinstance(served, VirtualTree)
        shown = served.files if isinstance(served, VirtualTree) else served.newest_files()
        files = {}
        for path, file in shown.items():
            head = bytearray(min(_HEAD, file.size))
            if head:
                file.read_into(0, memoryview(head))
            files[path] = (file.size, bytes(head))
        return Expectation(files, is_all)

    def to_json(self) -> str:
        files = {path: [size, head.hex()] for path, (size, head) in self.files.items()}
        return json.dumps([files, self.is_all])

    @staticmethod
    def from_json(text: str) -> Expectation:
        files, is_all = cast(tuple[dict[str, tuple[int, str]], bool], json.loads(text))
        return Expectation(
            {path: (size, bytes.fromhex(head)) for path, (size, head) in files.items()}, is_all
        )

    def check(self, mnt: Path) -> None:
        """Raise MountError if the mount at `mnt` shows anything else.

        Must not run in the process that serves the mount.
        """
        try:
            names = set(os.listdir(mnt))
            expected = {path.partition("/")[0] for path in self.files}
            if wrong := sorted(names ^ expected if self.is_all else expected - names)[:5]:
                raise MountError(
                    f"{mnt} does not list what it should: {', '.join(wrong)} missing or unexpected"
                )
            for path, (size, head) in self.files.items():
                self._check_file(mnt / path, size, head)
        except OSError as error:
            raise MountError(f"the first read through {mnt} failed: {error}") from error

    @staticmethod
    def _check_file(path: Path, size: int, head: bytes) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # No read-ahead: the first page only.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            found_size, found = os.fstat(fd).st_size, os.pread(fd, len(head), 0)
        finally:
            os.close(fd)
        if (found_size, found) != (size, head):
            raise MountError(
                f"{path} is not what was prepared: {found_size} bytes starting {found[:16]!r},"
                f" expected {size} bytes starting {head[:16]!r}"
            )


def raise_read_ahead(mnt: Path, kib: int) -> None:
    """Let the kernel read `kib` ahead on this mount; where that is not permitted, leave it.

    Only after the first answered request: the kernel lowers the value once more when it takes
    up the answer to INIT.
    """
    for entry in entries_at(mnt)[-1:]:
        with suppress(OSError):
            Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb").write_text(f"{kib}\n")
