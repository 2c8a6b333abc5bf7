"""The checkpoints that scripts/bench measures opening with are cut as megatron-core cuts them."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mcorefs.model import Options, load
from scripts.big_metadata import write
from scripts.big_models import DEEPSEEK_V3, QWEN3_30B_A3B, Run
from tests.checkpoints import SPECS, Fixture, ensure

NAMES = (
    "qwen3_moe-tp2-pp2-ep2-etp2",
    "qwen3_moe-ep2-reshardable",
    "qwen3_moe-tp2-ep2-dp-reshardable",
    "deepseek_v3-tp2-pp2-ep2-mtp",
)


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure(NAMES)


def small(name: str) -> Run:
    """The run that wrote the fixture, as the generator describes runs."""
    spec = SPECS[name]
    big = DEEPSEEK_V3 if spec.kv_lora else QWEN3_30B_A3B
    optimizer: Any = spec.distributed_optimizer or "none"
    return dataclasses.replace(
        big,
        layers=spec.layers,
        hidden=spec.hidden,
        heads=spec.heads,
        groups=0 if spec.kv_lora else spec.kv_heads,
        head_dim=spec.head_dim,
        vocab=spec.padded_vocab_size,
        experts=spec.experts,
        moe_ffn=spec.moe_ffn,
        ffn=spec.ffn,
        shared_ffn=spec.shared_ffn,
        tp=spec.tp,
        pp=spec.pp,
        ep=spec.ep,
        etp=spec.expert_tp,
        world=spec.world,
        stages=(spec.layers // spec.pp,) * spec.pp,
        dense_layers=(spec.moe_layer_freq or (1,)).count(0),
        latent=(32, 24, spec.qk_nope, spec.qk_rope, spec.v_head) if spec.kv_lora else None,
        mtp=bool(spec.mtp),
        optimizer=optimizer,
    )


def described(iteration: Path) -> Iterator[tuple[str, object]]:
    """(name, shape and chunks) of all tensors, read by torch's own classes; names of objects."""
    metadata = pickle.loads((iteration / ".metadata").read_bytes())  # noqa: S301  (ours)
    places = {(index.fqn, index.offset) for index in metadata.storage_data}
    for fqn, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            assert (fqn, None) in places
            yield fqn, None
            continue
        chunks = sorted((tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks)
        assert all((fqn, chunk.offsets) in places for chunk in entry.chunks)
        yield fqn, (str(entry.properties.dtype), tuple(entry.size), chunks)


@pytest.mark.parametrize("name", NAMES)
def test_what_megatron_core_writes(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    run = small(name)
    write(run, tmp_path / "iter_0000001")
    made = dict(described(tmp_path / "iter_0000001"))
    real = dict(described(fixtures[name].iteration))
    if run.optimizer == "none":  # its optimizer is not a distributed one
        real = {fqn: entry for fqn, entry in real.items() if not fqn.startswith("optimizer.")}
    ours, theirs = (
        {fqn: entry for fqn, entry in one.items() if entry is not None and "gbuf_idx" not in fqn}
        for one in (made, real)
    )
    assert ours == theirs
    assert _kinds(made, "_extra_state") == _kinds(real, "_extra_state")
    # The order in a bucket is that of the backward pass, which depends on the specs: so do cuts.
    assert _kinds(made, "gbuf_idx") == _kinds(real, "gbuf_idx")
    for fqn, entry in made.items():
        if "gbuf_idx" in fqn:
            assert _elements(entry) == _elements(real[fqn])


def _kinds(entries: Mapping[str, object], mark: str) -> Counter[str]:
    return Counter(fqn for fqn in entries if mark in fqn)


def _elements(entry: Any) -> tuple[str, tuple[int, ...], int]:
    dtype, shape, chunks = entry
    assert sum(math.prod(sizes) for _, sizes in chunks) == math.prod(shape)
    return dtype, shape, len(chunks)


@pytest.mark.parametrize(
    "optimizer", ["fully_reshardable", "fully_sharded_model_space", "dp_reshardable"]
)
def test_what_is_written_opens(optimizer: Any, tmp_path: Path) -> None:
    run = dataclasses.replace(
        small("qwen3_moe-tp2-pp2-ep2-etp2"), optimizer=optimizer, bucket=10_000
    )
    write(run, tmp_path / "iter_0000001")
    model = load(tmp_path / "iter_0000001", Options())
    assert model.architecture == "Qwen3MoeForCausalLM"
    assert model.checkpoint.skipped["optimizer"] > 20
    assert len(model.checkpoint.tensors) == 12
