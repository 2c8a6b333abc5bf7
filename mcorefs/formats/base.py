"""What every on-disk format gives to the layers above, and how one is added.

A format is one file in this folder that implements `Format`, and one line in
`mcorefs/formats/__init__.py`. It reads metadata only, never tensor data, and knows no model family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mcorefs.index import StoredTensor
from mcorefs.storage import FileIdentity


@dataclass(frozen=True)
class Checkpoint:
    """One iteration of a training run, as its format describes it."""

    format: str
    path: Path
    """The directory that holds the shard files."""
    tensors: Mapping[str, StoredTensor]
    """Model tensors by fqn; optimizer, rng and `_extra_state` entries are not among them."""
    args: Mapping[str, object]
    """The training arguments as plain values; empty where the checkpoint records none."""
    args_source: str
    """Where `args` were found, or why there are none, in words for the user."""
    files: Mapping[str, FileIdentity]
    """The shard files that hold `tensors`, as they were when the index was made."""
    skipped: Mapping[str, int]
    """How many entries of each kind were left aside, e.g. {"optimizer": 1200}."""


class Format(Protocol):
    """Reads one on-disk format. Stateless."""

    name: str

    def detect(self, path: Path) -> bool:
        """Whether `path` is one complete iteration in this format. Cheap: looks at names only."""
        ...

    def index(self, path: Path) -> Checkpoint:
        """The checkpoint in `path`. Raises CheckpointError with every problem found."""
        ...
