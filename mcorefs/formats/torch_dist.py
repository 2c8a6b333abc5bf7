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

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from mcorefs.boxes import Shape
from mcorefs.errors import CheckpointError
from mcorefs.formats.base import Checkpoint, refusal, training_args
from mcorefs.formats.dcp import StorageTable, entries, load_range, read_metadata, read_tensor
from mcorefs.index import StoredTensor
from mcorefs.unpickle import Inert

COMMON_STATE = "common_state/shard_0_1"
"""ShardedObject("common_state", shape (1,), offset (0,)).unique_key, since megatron-core 0.19."""

BYTES = "torch.distributed.checkpoint.metadata.BytesStorageMetadata"

_OPTIMIZER = re.compile(r"(chained_\d+\.)*optim\w*\.")


class TorchDist:
    """Format `torch_dist`."""

    name = "torch_dist"

    def detect(self, path: Path) -> bool:
        try:
            if not ((path / "metadata.json").is_file() and (path / ".metadata").is_file()):
                return False
            with (path / "metadata.json").open("rb") as file:
                described = json.loads(file.read(1 << 16))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(described, dict) and described.get("sharded_backend") == self.name

    def index(self, path: Path) -> Checkpoint:
        metadata = read_metadata(path / ".metadata")
        weights: dict[str, object] = {}
        skipped: Counter[str] = Counter()
        for fqn, entry in entries(metadata):
            if (kind := _kind(fqn, entry)) == "model":
                weights[fqn] = entry
            else:
                skipped[kind] += 1
        storage = StorageTable(path, metadata, {*weights, COMMON_STATE})
        problems: list[str] = []
        tensors: dict[str, StoredTensor] = {}
        for fqn, entry in weights.items():
            tensor, problem = read_tensor(fqn, entry, storage)
            if tensor is not None:
                tensors[fqn] = tensor
            problems.extend([problem] if problem else [])
        files = storage.check_files(problems)
        args, source = _args(path, storage, problems)
        if problems:
            raise refusal(path, problems)
        if not tensors:
            raise CheckpointError(_no_weights(path, skipped))
        return Checkpoint(self.name, path, tensors, args, source, files, dict(skipped))


def _kind(fqn: str, entry: object) -> str:
    """Which kind of entry `fqn` is; only "model" entries are weights."""
    if _OPTIMIZER.match(fqn):
        return "optimizer"
    if "_extra_state" in fqn:
        return "_extra_state"
    is_bytes = isinstance(entry, Inert) and entry.name == BYTES
    if "/shard_" in fqn or is_bytes or fqn.startswith("rng_state"):
        return "object"
    return "model"


def _args(
    path: Path, storage: StorageTable, problems: list[str]
) -> tuple[Mapping[str, object], str]:
    """The training args as plain values, and where they were found."""
    try:
        state, source = _common_state(path, storage)
        return ({}, source) if state is None else training_args(state, source)
    except CheckpointError as problem:
        problems.append(str(problem))
        return {}, "the training args cannot be read"


def _common_state(path: Path, storage: StorageTable) -> tuple[object, str]:
    """(the state that all ranks share, where it is), or (None, why there is none)."""
    common = path / "common.pt"
    if os.path.lexists(common):
        nbytes = common.lstat().st_size
        return load_range(str(common), 0, nbytes), str(common)
    places: tuple[Shape | None, ...] = (None, (0,))
    held = [place for place in places if storage.holds(COMMON_STATE, place)]
    if not held:
        return None, f"{path} has neither common.pt nor a {COMMON_STATE} entry"
    span = storage.span(COMMON_STATE, held[0])
    if isinstance(span, str):
        raise CheckpointError(f"{COMMON_STATE}: {span}")
    state = load_range(span.path, span.offset, span.nbytes)
    if isinstance(state, list) and state:
        state = state[0]
    return state, f"{COMMON_STATE} in {span.path}"


def _no_weights(path: Path, skipped: Mapping[str, int]) -> str:
    held = ", ".join(f"{count} {kind}" for kind, count in skipped.items()) or "no"
    return (
        f"{path} holds no model weights ({held} entries). If the run saved Hugging Face "
        "safetensors beside it (ms-swift save_safetensors with no_save_optim), use those; "
        "if it holds only an optimizer, pass the directory of the model."
    )
