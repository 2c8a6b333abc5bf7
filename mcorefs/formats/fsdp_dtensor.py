"""`fsdp_dtensor` and `torch_dcp`: DTensors that torch.distributed.checkpoint saved as they were.

    iter_0000100/.metadata          see `dcp`; without a metadata.json of megatron-core
    iter_0000100/__R_W.distcp

Both hold a state dict of modules: names with whatever is wrapped around the model, one tensor per
layer and per expert, the training args as an entry. Megatron-FSDP (`fsdp_dtensor`) keeps the
weights in fp32, cuts each anywhere between two rows, and saves the gate and the up rows of a
linear_fc1 under names of their own (`_w` and `_v`) if the run was started with --swiglu. torch's
FSDP2 (`torch_dcp`) keeps the dtype of the model, and linear_fc1 whole.

Layout facts: Megatron-LM:megatron/training/checkpointing.py,
megatron/core/transformer/fsdp_dtensor_checkpoint.py, megatron/core/distributed/ (fsdp/,
torch_fully_sharded_data_parallel.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mcorefs.errors import CheckpointError
from mcorefs.formats.base import Checkpoint, WeightsFrom, refusal
from mcorefs.formats.dcp import (
    StorageTable,
    common_file,
    load_range,
    read_args,
    read_directory,
    sharded_backend,
)
from mcorefs.index import StoredTensor
from mcorefs.names import unwrapped
from mcorefs.storage import is_file

ARGS = "args"
EMBEDDING = "embedding.word_embeddings.weight"
_MEGATRON = re.compile(r"(^|\.)(decoder|encoder)\.layers\.|(^|\.)(word_embeddings|output_layer)\.")
_STACKED = re.compile(r"decoder\.layers\.(?!\d)")
_FC1 = re.compile(r"(.*\.linear_fc)1\.(?:weight|bias)(\d*)$")


class FsdpDtensor:
    """Formats `fsdp_dtensor` and `torch_dcp`, which only the names in them tell apart."""

    name = "fsdp_dtensor"

    def detect(self, path: Path) -> bool:
        return is_file(path / ".metadata") and sharded_backend(path) in (None, self.name)

    def index(self, path: Path, weights: WeightsFrom = "model") -> Checkpoint:
        problems: list[str] = []
        contents = read_directory(path, weights, (ARGS,), problems)
        tensors = contents.tensors
        _refuse_other_formats(path, tensors, contents.sharded_objects)
        args, source = read_args(lambda: _state_with_args(path, contents.storage), problems)
        name = self.name if _is_megatron_fsdp(tensors) else "torch_dcp"
        lost = _lost_parts(name, tensors, args)
        ranks = {} if lost else _fc1_ranks(tensors, args, problems)
        problems += lost
        if problems:
            raise refusal(path, problems)
        return Checkpoint(
            name,
            path,
            tensors,
            args,
            source,
            contents.files,
            contents.skipped,
            ranks,
            contents.remarks,
        )


def _refuse_other_formats(path: Path, names: Iterable[str], sharded_objects: int) -> None:
    """Raise where .metadata is that of another program's checkpoint."""
    short = [unwrapped(name) for name in names]
    if sharded_objects or any(map(_STACKED.match, short)):
        raise CheckpointError(
            f"{path} cannot be opened: it is in the torch_dist format but has no metadata.json, "
            "which is written last: the save was interrupted, or not everything was copied"
        )
    if short and not any(map(_MEGATRON.search, short)):
        raise CheckpointError(
            f"{path} was saved by torch.distributed.checkpoint but holds no Megatron-Core model: "
            f"it has {short[0]!r:.120} and the like"
        )


def _state_with_args(path: Path, storage: StorageTable) -> tuple[object, str]:
    """(a state with the training args in it, where it is), or (None, why there is none)."""
    if (found := common_file(path)) is not None:
        return found
    span = storage.bytes_entry(ARGS)
    if span is None:
        return None, f"{path} has neither an entry {ARGS!r} nor common.pt"
    args = load_range(span.path, span.offset, span.nbytes)
    return {ARGS: args}, f"{ARGS!r} in {span.path}"


def _is_megatron_fsdp(names: Iterable[str]) -> bool:
    """By the wrapper that stays in its names (Megatron-LM unwraps FSDP2 down to the model), or by
    the halves of linear_fc1."""
    return any(
        "module." in name.removesuffix(unwrapped(name)) or name.endswith(("_w", "_v"))
        for name in names
    )


def _size(args: Mapping[str, object], name: str) -> int | None:
    value = args.get(name)
    return value if type(value) is int and value > 0 else None


def _lost_parts(
    name: str, tensors: Mapping[str, StoredTensor], args: Mapping[str, object]
) -> list[str]:
    """What ranks have overwritten: where several save different parts of the model under one name,
    torch.distributed.checkpoint keeps one of them and says nothing."""
    lost: list[str] = []
    pp = _size(args, "pipeline_model_parallel_size") or 1
    if pp > 1:
        lost.append(f"pipeline_model_parallel_size {pp}: every stage numbers its layers from 0")
    if name == "torch_dcp":
        tp = _size(args, "tensor_model_parallel_size") or 1
        vocab = _size(args, "padded_vocab_size")
        embedding = next((t for n, t in tensors.items() if unwrapped(n) == EMBEDDING), None)
        whole = embedding is not None and embedding.shape[:1] == (vocab,)
        if tp > 1 and not whole:
            lost.append(f"tensor_model_parallel_size {tp}: FSDP2 knows only of its own sharding")
        ep = _size(args, "expert_model_parallel_size") or 1
        if ep > 1:
            lost.append(f"expert_model_parallel_size {ep}: every rank numbers its experts from 0")
    return [
        f"the run had {size}, so its ranks saved different weights under the same names and only "
        "one rank's are left: this checkpoint does not hold the whole model"
        for size in lost
    ]


def _fc1_ranks(
    tensors: Mapping[str, StoredTensor], args: Mapping[str, object], problems: list[str]
) -> dict[str, int]:
    """The gated linear_fc1 that hold [gate; up] for one tensor-parallel rank after the other, and
    the number of ranks: what a module's own weight is where its halves were not taken apart.

    The linear_fc2 beside it tells the number, as only tensor parallelism cuts its columns. That
    holds for what the run itself saved, so the training arguments must agree where there are any.
    """
    ranks: dict[str, int] = {}
    doubtful: list[str] = []
    for fqn, tensor in tensors.items():
        match = _FC1.match(fqn)
        fc2 = tensors.get(f"{match[1]}2.weight{match[2]}") if match else None
        if fc2 is None or len(fc2.shape) != 2 or tensor.shape[:1] != (2 * fc2.shape[1],):
            continue  # no linear_fc1, or one that is not gated
        cuts = len({chunk.box.offsets[1] for chunk in fc2.chunks})
        expected = _size(args, "tensor_model_parallel_size")
        if ".experts." in fqn:
            expected = _size(args, "expert_tensor_parallel_size") or expected
        if expected not in (None, cuts) or tensor.shape[0] % (2 * cuts):
            doubtful.append(f"{fqn} (its linear_fc2 is cut in {cuts}, {expected} expected)")
        elif cuts > 1:
            ranks[fqn] = cuts
    if doubtful:
        more = f" and {len(doubtful) - 1} more like it" if len(doubtful) > 1 else ""
        problems.append(
            "whether linear_fc1 holds all gate rows first, or those of each tensor-parallel rank "
            f"before its up rows, cannot be told: {doubtful[0]}{more}. It was saved again after "
            "training; use the checkpoint that the run itself saved"
        )
    return ranks
