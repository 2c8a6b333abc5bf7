"""Small files of every kind that is parsed, by the libraries that write them."""

from __future__ import annotations

import base64
import functools
import io
import json
import pickle
import tarfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.checkpoints import ensure

DIST, FSDP, LEGACY, ZARR = (
    "qwen3-tp2",
    "fsdp-qwen3-tp2-dp2",
    "torch-qwen3-tp2",
    "zarr-llama-tp2-pp2",
)
SHARDS = tuple(f"__{rank}_{part}.distcp" for rank in range(4) for part in range(2))
SHARD_BYTES = 1 << 20
KEPT = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "linear_qkv.weight")


@functools.cache
def metadata(name: str = DIST) -> tuple[bytes, ...]:
    """That of a real checkpoint, with few of its tensors; the second with other entries too."""
    fixture = ensure([name])[name]
    data = (fixture.iteration / ".metadata").read_bytes()
    found = []
    for marks in (KEPT, (*KEPT, "_extra_state", "optim")):
        whole: Any = pickle.loads(data)  # noqa: S301 (ours)
        names = {
            n for mark in marks for n in [n for n in whole.state_dict_metadata if mark in n][:2]
        }
        whole.state_dict_metadata = {n: whole.state_dict_metadata[n] for n in sorted(names)}
        whole.storage_data = {i: s for i, s in whole.storage_data.items() if i.fqn in names}
        if isinstance(whole.planner_data, dict):
            whole.planner_data = {n: p for n, p in whole.planner_data.items() if n in names}
        if plans := getattr(whole, "all_local_plans", None):
            whole.all_local_plans = [replace(plans[0], items=plans[0].items[:1])]
        found.append(pickle.dumps(whole))
    return tuple(found)


def pickles() -> Iterator[bytes]:
    yield from metadata()
    values = {"a": [1, 2.5, None, True, b"x", 1 << 70], "b": ({3}, frozenset((4,)), (5, 6, 7, 8))}
    for protocol in (2, 4):
        yield pickle.dumps(values, protocol)
        yield pickle.dumps(
            Namespace(lr=1e-4, name="n", where=Path("/a/b"), nested=values), protocol
        )


@functools.cache
def archives() -> tuple[bytes, ...]:
    """What torch.save writes: a tensor, the step of a TrainState, a parameter of a strided view."""
    import torch

    tensor = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    values = (tensor, {"step": torch.tensor(100)}, torch.nn.Parameter(tensor.float().t()[1:]))
    return tuple(map(_saved, values))


def _saved(value: object) -> bytes:
    import torch

    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


@functools.cache
def rank_files() -> tuple[bytes, ...]:
    """A model of one layer, as one rank saves it."""
    import torch

    args = Namespace(num_layers=1, hidden_size=8, num_attention_heads=2, swiglu=True)
    args.tensor_model_parallel_size = args.pipeline_model_parallel_size = 1
    layer = "decoder.layers.0."
    model = {
        "embedding.word_embeddings.weight": torch.zeros(16, 8),
        f"{layer}self_attention.linear_qkv.weight": torch.zeros(24, 8),
        f"{layer}self_attention.linear_proj.weight": torch.zeros(8, 8),
        f"{layer}mlp.linear_fc1.weight": torch.zeros(32, 8),
        f"{layer}mlp.linear_fc2.weight": torch.zeros(8, 16),
        "decoder.final_layernorm.weight": torch.zeros(8),
        "output_layer.weight": torch.zeros(16, 8),
    }
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 100, "model": model}
    virtual = {"args": args, "iteration": 1, "model0": model, "model1": {}, "optimizer": {}}
    return _saved(state), _saved(virtual)


def safetensors() -> Iterator[bytes]:
    import torch
    from safetensors.torch import save

    tensors = {"a.weight": torch.zeros(2, 3), "b": torch.zeros(0, 4), "c": torch.tensor(1.0).half()}
    yield save(tensors)
    yield save({"d": torch.zeros(3, dtype=torch.int64)}, {"format": "pt"})


def indexes() -> Iterator[bytes]:
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    yield _json(
        {"metadata": {"total_size": 8}, "weight_map": {"a.weight": one, "b": one, "d": two}}
    )


def tars() -> Iterator[bytes]:
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
            long = "d" * (90 if kind == tarfile.USTAR_FORMAT else 180)
            for name in (".", "./model_weights", f"./model_weights/{long}"):
                about = tarfile.TarInfo(name)
                about.type = tarfile.DIRTYPE
                archive.addfile(about)
            for name in ("./model_config.yaml", f"./model_weights/{long}/x.pt"):
                about = tarfile.TarInfo(name)
                about.size = 5
                archive.addfile(about, io.BytesIO(b"a: 1\n"))
        yield out.getvalue().rstrip(b"\0") + bytes(1024)


def arrays() -> Iterator[bytes]:
    from numcodecs import Blosc

    array = {
        "zarr_format": 2,
        "shape": [4, 6],
        "chunks": [2, 3],
        "dtype": "<f4",
        "order": "C",
        "fill_value": None,
        "filters": None,
        "compressor": None,
    }
    yield _json(array)
    yield _json({**array, "compressor": Blosc().get_config(), "order": "F"})
    yield _json({**array, "shape": [], "chunks": [], "dtype": "bfloat16"})


CHUNK_BYTES = 200


def chunks() -> Iterator[bytes]:
    """A chunk in each encoding, whose number comes first."""
    from numcodecs.registry import get_codec

    from mcorefs.encoding import CODECS

    data = bytes(range(100)) * 2
    for number, codec in enumerate(CODECS):
        yield bytes([number]) + bytes(get_codec({"id": codec}).encode(data))
    for name in ("zlib", "zstd", "blosclz"):
        coded = get_codec({"id": "blosc", "cname": name, "shuffle": 2}).encode(data)
        yield bytes([CODECS.index("blosc")]) + bytes(coded)


def manifests() -> Iterator[bytes]:
    yield _json({"algorithm": "sha256", "files": {"__0_0.distcp": "0" * 64, ".metadata": "f" * 64}})


def yamls() -> Iterator[bytes]:
    yield b"""model:
  _target_: megatron.bridge.models.qwen.Qwen3ModelProvider
  num_layers: 4
  activation_func: {_target_: torch.nn.functional.silu, _call_: false}
  params_dtype: !!python/name:torch.bfloat16 ''
  backend: {_target_: a.B, _call_: true, _args_: [flash]}
  hf_model_id: Qwen/Qwen3-0.6B
  base: &a [1, 0x1f, 1e-5, 1:30, .inf]
  again: *a
tokenizer: {tokenizer_type: HuggingFaceTokenizer, tokenizer_model: Qwen/Qwen3, vocab_size: null}
checkpoint: {pretrained_checkpoint: /data/base}
peft: {dim: 8, alpha: 16.0, target_modules: [linear_qkv]}
"""
    yield b"""config: {_target_: nemo.collections.llm.gpt.model.Qwen3Config600M, num_layers: 2}
tokenizer: {pretrained_model_name: {attr: Qwen/Qwen3, _target_: x.DirOrStringArtifact}}
"""
    yield b"""mcore_gpt: true
num_layers: 2
hidden_size: 8
num_attention_heads: 2
max_position_embeddings: ${.encoder_seq_length}
activation: fast-swiglu
normalization: rmsnorm
override_vocab_size: 32
tokenizer: {library: sentencepiece, model: 'nemo:0a_tokenizer.model', type: null}
"""


def objects() -> Iterator[bytes]:
    """JSON that trainers leave."""
    yield _json(
        {
            "swift_version": "3.8.1",
            "model": "Qwen/Qwen3-0.6B",
            "model_dir": "/models/x",
            "model_type": "qwen3",
            "tuner_type": "lora",
            "lora_rank": 8,
            "lora_alpha": 16,
            "target_modules": ["all-linear"],
            "template": "qwen3",
            "task_type": "causal_lm",
        }
    )
    yield _json(
        {"num_layers": 2, "hidden_size": 8, "activation_func": "silu", "rope_scaling": True}
    )
    target = {"type": "pyref", "module": "nemo", "name": "Qwen3Config600M"}
    yield _json({"objects": {"model": {"items": [["a", target]], "metadata": None}}})
    yield _json({"model_ckpt_path": "/base/weights"})


def configs() -> Iterator[bytes]:
    fixture = ensure([DIST])[DIST]
    yield (fixture.hf / "config.json").read_bytes()
    rope = {"rope_type": "yarn", "factor": 4.0, "mrope_section": [1, 2], "rope_theta": 1e6}
    yield _json(
        {
            "model_type": "qwen2_5_vl",
            "hidden_size": 8,
            "vision_config": {"depth": 2},
            "rope_scaling": rope,
            "rope_parameters": {"full_attention": rope, "sliding_attention": {"rope_theta": 1}},
            "auto_map": {
                "AutoModel": "modeling_x.Model",
                "AutoConfig": ["configuration_x.C", None],
            },
        }
    )


def trackers() -> Iterable[bytes]:
    return (b"100", b"release\n", b"0000000", b" 12 ")


@functools.cache
def sentencepieces() -> tuple[bytes, ...]:
    from tests.trained_tokenizers import LLAMA, SYMBOLS, train

    plain = {"normalization_rule_name": "identity"}
    return (
        train(**LLAMA),
        train(model_type="unigram", user_defined_symbols=SYMBOLS, **plain),
        train(model_type="bpe", **plain),
    )


def tiktokens() -> Iterator[bytes]:
    """The arguments, and the vocabulary."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc"]
    coded = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": ""}
        for rank, token in enumerate(tokens)
    ]
    args = {"tokenizer_type": "TikTokenizer", "vocab_size": 265, "tiktoken_pattern": "v2"}
    args |= {"tiktoken_num_special_tokens": 7, "tokenizer_sentencepiece_legacy": False}
    yield _json({"args": args, "vocabulary": coded})


def tokenizers() -> Iterator[bytes]:
    """All JSON files of a tokenizer, by name."""
    fixture = ensure([DIST])[DIST]
    files = {file.name: json.loads(file.read_bytes()) for file in fixture.tokenizer.glob("*.json")}
    files["tokenizer.json"]["model"]["vocab"] = dict(
        list(files["tokenizer.json"]["model"]["vocab"].items())[:20]
    )
    files["tokenizer.json"]["model"]["merges"] = files["tokenizer.json"]["model"]["merges"][:5]
    yield _json(files)
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    yield _json(
        {
            "vocab.json": vocabulary,
            "merges.txt": "#version: 0.2\na b\n",
            "tokenizer_config.json": {
                "eos_token": {"content": "<|endoftext|>"},
                "added_tokens_decoder": {"3": {"content": "<|endoftext|>"}},
            },
            "special_tokens_map.json": {"bos_token": "a"},
            "args": {"tokenizer_type": "GPT2BPETokenizer"},
        }
    )


def listings() -> Iterator[bytes]:
    """Keys in a bucket, each with its content or its size."""
    fixture = ensure([DIST])[DIST]
    index = "model.safetensors.index.json"
    model = next(safetensors()).decode("latin-1")
    copy = {"config.json": (fixture.hf / "config.json").read_text(), "model.safetensors": model}
    yield _json({f"bucket/run/{name}": said for name, said in copy.items()})
    run: dict[str, object] = {f"iter_0000100/{name}": SHARD_BYTES for name in SHARDS[:2]}
    run |= {"iter_0000100/metadata.json": '{"sharded_backend": "torch_dist"}', "": 0}
    run |= {"latest_checkpointed_iteration.txt": "100", "iter_0000100/.metadata": 100}
    yield _json({f"bucket/run/{name}": said for name, said in run.items()} | {"bucket/x": index})


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
