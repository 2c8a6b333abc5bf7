"""Every error that mcorefs raises on purpose.

    McorefsError                 a person can act on it; `cli` prints it and exits 1
    ├── CheckpointError          the checkpoint cannot be opened: what, where, found versus expected
    │   └── NoWeightsError       it is whole, but no weights of a model are in it
    ├── MappingError             all mapping problems of one checkpoint, reported together
    ├── MountError               no FUSE, mountpoint busy, missing, ...
    ├── OutputError              materialize: not enough space, OUT not empty, ...
    └── ReadFault(OSError: EIO)  a read failed after opening: short read, shard gone or replaced

Messages say what, where (file, fqn), found versus expected, and what to do next.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence


class McorefsError(Exception):
    """Base class: the message is written for the person at the terminal."""


class CheckpointError(McorefsError):
    """The checkpoint cannot be opened."""


class NoWeightsError(CheckpointError):
    """The checkpoint is whole but holds no weights: only an optimizer, or only arguments."""


class MappingError(McorefsError):
    """The checkpoint opened but cannot be presented as a Hugging Face model.

    `problems` holds every problem that was found, not only the first.
    """

    def __init__(self, summary: str, problems: Sequence[str]) -> None:
        self.summary, self.problems = summary, tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{summary}{lines}")

    def __reduce__(self) -> tuple[type[MappingError], tuple[str, tuple[str, ...]]]:
        return MappingError, (self.summary, self.problems)


class MountError(McorefsError):
    """The tree cannot be mounted here."""


class OutputError(McorefsError):
    """Real files cannot be written as asked."""


class ReadFault(McorefsError, OSError):
    """A read failed after the checkpoint was opened; carries errno EIO."""

    def __init__(self, message: str) -> None:
        McorefsError.__init__(self, message)
        OSError.__init__(self, errno.EIO, message)

    def __str__(self) -> str:
        return str(self.args[-1])

    def __reduce__(self) -> tuple[type[ReadFault], tuple[str]]:
        return ReadFault, (str(self),)
