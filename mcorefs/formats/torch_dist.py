"""`torch_dist`: what megatron-core's dist_checkpointing writes.

    iter_0000100/metadata.json      {"sharded_backend": "torch_dist", ...}
    iter_0000100/.metadata          pickle: fqn -> dtype, shape, chunks; (fqn, offset) -> file range
    iter_0000100/__R_W.distcp       entries, each a whole `torch.save` archive of one chunk
    iter_0000100/common.pt          training args and the like (megatron-core up to 0.18), or
                                    the entry `common_state/shard_0_1` (from 0.19)

Layout facts: Megatron-LM:megatron/core/dist_checkpointing/{core,serialization}.py and
strategies/torch.py; pytorch:torch/distributed/checkpoint/{metadata,filesystem}.py.
"""

from __future__ import annotations

from pathlib import Path

from mcorefs.formats.base import Checkpoint, WeightsFrom, refusal
from mcorefs.formats.dcp import (
    StorageTable,
    common_file,
    load_range,
    read_args,
    read_directory,
    sharded_backend,
)
from mcorefs.storage import is_file

COMMON_STATE = "common_state/shard_0_1"
"""ShardedObject("common_state", shape (1,), offset (0,)).unique_key, since megatron-core 0.19."""
ARGS = f"{COMMON_STATE}.0.args"
"""What becomes of the args in it when torch.distributed.checkpoint saves the whole once more."""


class TorchDist:
    """Format `torch_dist`."""

    name = "torch_dist"

    def detect(self, path: Path) -> bool:
        return is_file(path / ".metadata") and sharded_backend(path) == self.name

    def index(self, path: Path, weights: WeightsFrom = "model") -> Checkpoint:
        problems: list[str] = []
        contents = read_directory(path, weights, (COMMON_STATE, ARGS), problems)
        args, source = read_args(lambda: _common_state(path, contents.storage), problems)
        if problems:
            raise refusal(path, problems)
        return Checkpoint(
            self.name,
            path,
            contents.tensors,
            args,
            source,
            contents.files,
            contents.skipped,
            remarks=contents.remarks,
        )


def _common_state(path: Path, storage: StorageTable) -> tuple[object, str]:
    """(the state that all ranks share, where it is), or (None, why there is none)."""
    if (found := common_file(path)) is not None:
        return found
    span = storage.bytes_entry(COMMON_STATE)
    if span is None and (span := storage.bytes_entry(ARGS)) is not None:
        return {"args": load_range(span.path, span.offset, span.nbytes)}, f"{ARGS} in {span.path}"
    if span is None:
        return None, f"{path} has neither common.pt nor a {COMMON_STATE} entry"
    state = load_range(span.path, span.offset, span.nbytes)
    if isinstance(state, list) and state:
        state = state[0]
    return state, f"{COMMON_STATE} in {span.path}"
