"""Copies of real checkpoints with one thing changed, by the libraries that wrote them; and how to
look at them as a user with no special rights."""

from __future__ import annotations

import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from mcorefs.formats.torch_dist import TorchDist
from tests.checkpoints import Fixture


def copy(fixture: Fixture, directory: Path) -> Path:
    """A copy of the fixture's iteration in its own root under `directory`, to be changed."""
    root = directory / "checkpoint"
    shutil.copytree(fixture.root, root)
    return root / fixture.iteration.name


def with_args(fixture: Fixture, directory: Path, **changes: object) -> Path:
    """The root of a copy whose training args differ by `changes`; ... takes one away."""
    iteration = copy(fixture, directory)
    args = {**TorchDist().index(fixture.iteration).args, **changes}
    kept = {name: value for name, value in args.items() if value is not ...}
    torch.save({"args": Namespace(**kept), "checkpoint_version": 3.0}, iteration / "common.pt")
    return iteration.parent


State = dict[str, Any]


def saved_anew(fixture: Fixture, root: Path, change: Callable[[State], None]) -> Path:
    """The copy of the fixture at `root`, its tensors saved again as `change` makes them."""
    iteration = root / fixture.iteration.name
    reader = FileSystemReader(iteration)
    state: State = {
        fqn: torch.empty(entry.size, dtype=entry.properties.dtype)
        for fqn, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp_load(state, storage_reader=reader, no_dist=True)
    change(state)
    for file in (*iteration.glob("*.distcp"), iteration / ".metadata"):
        file.unlink()
    dcp_save(state, storage_writer=FileSystemWriter(iteration), no_dist=True)
    return root


def edit_metadata(iteration: Path, edit: Callable[[Any], Any]) -> None:
    """`.metadata` unpickled with torch's own classes, handed to `edit`, and pickled again.

    `edit` changes it in place, or returns what to write instead.
    """
    path = iteration / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301 (written by this test run)
    path.write_bytes(pickle.dumps(edit(metadata) or metadata))


def rename(iteration: Path, new_name: Callable[[str], str]) -> None:
    """Every entry of `.metadata` under the name that `new_name` gives it."""

    def edit(metadata: Any) -> None:
        metadata.state_dict_metadata = {
            new_name(fqn): entry for fqn, entry in metadata.state_dict_metadata.items()
        }
        metadata.storage_data = {
            type(index)(new_name(index.fqn), index.offset, index.index): info
            for index, info in metadata.storage_data.items()
        }

    edit_metadata(iteration, edit)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom file modes bind: root may read everything."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(uid)
