"""Checkpoints of large runs whose shard files are all hole, to measure how they are opened.

    python scripts/big_metadata.py DIR NAME [--optimizer FORM] [--etp N]

Writes into DIR what torch and megatron-core would: each rank's plan and what came of it, pickled
as the ranks send them to each other, and gathered by torch's own planner and writer. (What is one
string or tuple in a rank is one in `.metadata`; what several ranks sent is not.)
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import pickle
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.distributed.checkpoint import metadata as dcp  # noqa: E402
from torch.distributed.checkpoint.default_planner import (  # noqa: E402
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import (  # noqa: E402
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.planner import (  # noqa: E402
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult  # noqa: E402

from scripts.big_models import DEEPSEEK_V3, QWEN3_30B_A3B, Piece, Run, by_key, count  # noqa: E402

T = TypeVar("T")
RUNS = {"qwen3-30b-a3b": QWEN3_30B_A3B, "deepseek-v3": DEEPSEEK_V3}
WRITERS = 2
"""Files of each rank (megatron-core's default)."""
ARCHIVE, OBJECT = 1500, 1261
"""Bytes of an archive beside its tensor; of one of an object."""


def write(run: Run, iteration: Path) -> None:
    """The checkpoint, as an iteration directory."""
    iteration.mkdir(parents=True)
    plans, results = [], []
    saved = run.saved()
    for rank, pieces in saved.items():
        plan = SavePlan(_items(pieces))
        plans.append(_sent(plan))
        results.append(_sent(_written(plan, rank, iteration)))
    _, metadata = create_default_global_save_plan(plans)
    metadata.all_local_plans = plans  # type: ignore[attr-defined]
    FileSystemWriter(iteration).finish(metadata, results)
    described = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (iteration / "metadata.json").write_text(json.dumps(described))
    torch.save({"args": _args(run), "iteration": 1, "checkpoint_version": 3.0}, _common(iteration))
    print(f"{iteration}: {dict(count(saved))}", file=sys.stderr)


def _common(iteration: Path) -> Path:
    return iteration / "common.pt"


def _sent(value: T) -> T:
    """As torch.distributed.gather_object sends it."""
    sent: T = pickle.loads(pickle.dumps(value))  # noqa: S301  (ours)
    return sent


def _items(pieces: Sequence[Piece]) -> list[WriteItem]:
    """As megatron-core makes them: dist_checkpointing/strategies/{torch,checkpointable}.py."""
    items = []
    for key, parts in by_key(pieces).items():
        for number, piece in enumerate(parts):
            if piece.sizes is None:
                items.append(WriteItem(dcp.MetadataIndex(key), WriteItemType.BYTE_IO))
                continue
            offsets = torch.Size(piece.offsets)
            data = TensorWriteData(
                dcp.ChunkStorageMetadata(offsets, torch.Size(piece.sizes)),
                dcp.TensorProperties(getattr(torch, piece.dtype)),
                torch.Size(piece.shape),
            )
            index = dcp.MetadataIndex(key, offsets, number)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
    return items


def _written(plan: SavePlan, rank: int, iteration: Path) -> list[WriteResult]:
    """What the writers of a rank answer, each from a process of its own."""
    results: list[WriteResult] = []
    for writer in range(WRITERS):
        name, end = f"__{rank}_{writer}.distcp", 0
        mine = sorted(plan.items[writer::WRITERS], key=lambda item: item.tensor_data is not None)
        answered = []
        for item in mine:
            data = item.tensor_data
            nbytes = OBJECT
            if data is not None:
                nbytes = math.prod(data.chunk.sizes) * data.properties.dtype.itemsize + ARCHIVE
            answered.append(WriteResult(item.index, nbytes, _StorageInfo(name, end, nbytes)))
            end += nbytes
        with (iteration / name).open("wb") as stream:
            stream.truncate(end)
        results += _sent(answered)
    return results


def _args(run: Run) -> Namespace:
    freq = [0] * run.dense_layers + [1] * (run.layers - run.dense_layers)
    return Namespace(
        num_layers=run.layers,
        hidden_size=run.hidden,
        num_attention_heads=run.heads,
        num_query_groups=run.groups or run.heads,
        kv_channels=run.head_dim,
        num_experts=run.experts,
        moe_layer_freq=freq if run.dense_layers else 1,
        moe_router_topk=run.topk,
        ffn_hidden_size=run.ffn,
        moe_ffn_hidden_size=run.moe_ffn,
        vocab_size=run.vocab,
        padded_vocab_size=run.vocab,
        tensor_model_parallel_size=run.tp,
        pipeline_model_parallel_size=run.pp,
        expert_model_parallel_size=run.ep,
        expert_tensor_parallel_size=run.etp,
        world_size=run.world,
        params_dtype=torch.bfloat16,
        **run.args,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path)
    parser.add_argument("name", choices=RUNS)
    parser.add_argument("--optimizer", default=None)
    parser.add_argument("--etp", type=int)
    options = parser.parse_args()
    run = RUNS[options.name]
    if options.optimizer:
        run = dataclasses.replace(run, optimizer=options.optimizer)
    if options.etp:
        run = dataclasses.replace(run, etp=options.etp)
    gc.disable()
    options.dir.mkdir(parents=True, exist_ok=True)
    write(run, options.dir / "iter_0000001")
    (options.dir / "latest_checkpointed_iteration.txt").write_text("1")


if __name__ == "__main__":
    main()
