"""How long a large checkpoint takes to open: 100,000 chunks of weights, 500,000 of the optimizer.

    python scripts/big_metadata.py [DIR]

Writes the `.metadata` of a run on a thousand ranks with torch's own classes (its shard files have
no data in them), and opens it as a model in a process of its own.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import pickle
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

LAYERS, EXPERTS, HIDDEN, FFN, MOE_FFN = 94, 176, 2048, 6144, 768
HEADS, GROUPS, HEAD_DIM, VOCAB = 32, 4, 128, 151_936
TP, FILES = 2, 1024
STATES = ("param", "exp_avg", "exp_avg_sq", "a", "b")
ROOT = Path(__file__).resolve().parents[1]
Shape = tuple[int, ...]

OPEN = """
import sys, time
started = time.perf_counter()
from pathlib import Path
from mcorefs.model import Options, load
from mcorefs.tree import build
model = load(Path(sys.argv[1]), Options())
tree, _ = build(model, "50GB", 1 << 20)
seconds = time.perf_counter() - started
chunks = sum(len(tensor.chunks) for tensor in model.checkpoint.tensors.values())
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(f"{chunks} chunks, {len(model.tensors)} tensors: {seconds:.2f} s, {peak:.0f} MiB at most")
"""


def tensors() -> Iterator[tuple[str, Shape, Shape]]:
    """(fqn, shape, shape of a chunk) of a Qwen3-MoE at TP and ETP 2."""
    layers = "decoder.layers."
    rows = (HEADS + 2 * GROUPS) * HEAD_DIM
    heads = HEADS * HEAD_DIM
    yield "embedding.word_embeddings.weight", (VOCAB, HIDDEN), (VOCAB // TP, HIDDEN)
    yield "output_layer.weight", (VOCAB, HIDDEN), (VOCAB // TP, HIDDEN)
    yield "decoder.final_layernorm.weight", (HIDDEN,), (HIDDEN,)
    for name, shape, cut in (
        ("self_attention.linear_qkv.weight", (rows, HIDDEN), (rows // TP, HIDDEN)),
        ("self_attention.linear_proj.weight", (HIDDEN, heads), (HIDDEN, heads // TP)),
        ("self_attention.linear_qkv.layer_norm_weight", (HIDDEN,), (HIDDEN,)),
        ("self_attention.q_layernorm.weight", (HEAD_DIM,), (HEAD_DIM,)),
        ("self_attention.k_layernorm.weight", (HEAD_DIM,), (HEAD_DIM,)),
        ("pre_mlp_layernorm.weight", (HIDDEN,), (HIDDEN,)),
        ("mlp.router.weight", (EXPERTS, HIDDEN), (EXPERTS, HIDDEN)),
    ):
        yield layers + name, (LAYERS, *shape), (1, *cut)
    for name, shape, cut in (
        ("linear_fc1", (2 * MOE_FFN, HIDDEN), (MOE_FFN // TP, HIDDEN)),
        ("linear_fc2", (HIDDEN, MOE_FFN), (HIDDEN, MOE_FFN // TP)),
    ):
        fqn = f"{layers}mlp.experts.experts.{name}.weight"
        yield fqn, (LAYERS, EXPERTS, *shape), (1, 1, *cut)


def make(iteration: Path) -> None:
    """Write the checkpoint, whose shard files are all hole."""
    iteration.mkdir(parents=True, exist_ok=True)
    entries: dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata] = {}
    places: dict[dcp.MetadataIndex, _StorageInfo] = {}
    ends = [0] * FILES
    number = itertools.count()
    for state, (fqn, shape, cut) in itertools.product(("", *STATES), tensors()):
        name = f"optimizer.state.{state}.{fqn}" if state else fqn
        dtype = torch.float32 if state else torch.bfloat16
        nbytes = math.prod(cut) * dtype.itemsize + 1500
        chunks = []
        steps = [range(0, size, part) for size, part in zip(shape, cut, strict=True)]
        for offsets in itertools.product(*steps):
            chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(cut)))
            file = next(number) % FILES
            place = _StorageInfo(f"__{file}_0.distcp", ends[file], nbytes)
            places[dcp.MetadataIndex(name, torch.Size(offsets))] = place
            ends[file] += nbytes
        properties = dcp.TensorProperties(dtype=dtype)
        entries[name] = dcp.TensorStorageMetadata(properties, torch.Size(shape), chunks)
    for file, end in enumerate(ends):
        with (iteration / f"__{file}_0.distcp").open("wb") as stream:
            stream.truncate(end)
    with (iteration / ".metadata").open("wb") as stream:
        pickle.dump(dcp.Metadata(entries, storage_data=places), stream, protocol=4)
    described = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (iteration / "metadata.json").write_text(json.dumps(described))
    args = Namespace(
        rotary_base=1_000_000,
        layernorm_epsilon=1e-6,
        max_position_embeddings=4096,
        moe_router_topk=8,
        ffn_hidden_size=FFN,
        moe_ffn_hidden_size=MOE_FFN,
        vocab_size=VOCAB,
    )
    torch.save({"args": args}, iteration / "common.pt")


def main() -> None:
    gc.disable()
    with tempfile.TemporaryDirectory() as scratch:
        iteration = Path(sys.argv[1] if len(sys.argv) > 1 else scratch) / "iter_0000001"
        if not (iteration / "common.pt").exists():
            make(iteration)
        subprocess.run([sys.executable, "-c", OPEN, str(iteration)], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
