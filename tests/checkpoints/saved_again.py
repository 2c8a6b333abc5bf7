"""A checkpoint read and saved once more by torch.distributed.checkpoint, with each tensor cut along
its first axis, as Megatron-LM:tools/checkpoint/checkpoint_inspector.py (modify-state-dict) does."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.placement_types import Shard


def save_again(directory: Path) -> None:
    """Replace what torch wrote in `directory`. Collective."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    reader = FileSystemReader(directory)
    state: dict[str, Any] = {
        fqn: torch.distributed.tensor.empty(
            entry.size, dtype=entry.properties.dtype, device_mesh=mesh, placements=[Shard(0)]
        )
        if isinstance(entry, TensorStorageMetadata)
        else io.BytesIO()
        for fqn, entry in reader.read_metadata().state_dict_metadata.items()
    }
    load(state, storage_reader=reader)
    other = directory.with_name("saved-again")
    save(state, storage_writer=FileSystemWriter(other))
    if torch.distributed.get_rank() == 0:
        for file in (*directory.glob("*.distcp"), directory / ".metadata"):
            file.unlink()
        for file in other.iterdir():
            shutil.move(file, directory)
        other.rmdir()
    torch.distributed.barrier()
