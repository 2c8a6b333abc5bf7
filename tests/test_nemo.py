"""What NeMo 2 leaves: `context/` beside real shards whose names begin with `module.`.

NeMo needs a GPU's libraries, so `context/` is a stand-in, laid out as
NeMo:nemo/lightning/io/mixin.py io_dump does; the shards are megatron-core's, renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint.metadata import MetadataIndex

from mcorefs.errors import CheckpointError, MappingError
from mcorefs.files import read_all
from mcorefs.model import Options, load
from mcorefs.tree import build
from tests.checkpoints import Fixture, ensure
from tests.edited import copy, edit_metadata
from tests.providers import Dumper, provider

DENSE, MOE = "qwen3-tied", "qwen3_moe-tp2-ep2-etp1"


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure([DENSE, MOE])


def prefixed(metadata: Any) -> None:
    def name(fqn: str) -> str:
        return fqn if "/shard_" in fqn else f"module.{fqn}"

    entries = metadata.state_dict_metadata
    metadata.state_dict_metadata = {name(fqn): entry for fqn, entry in entries.items()}
    metadata.storage_data = {
        MetadataIndex(name(key.fqn), key.offset, key.index): info
        for key, info in metadata.storage_data.items()
    }


class Exploding:
    """Lightning's state is full of classes of all kinds; none may be made."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.mkdir, (Path("exploded"),)


def saved(fixture: Fixture, directory: Path, target: str) -> Path:
    name = directory / "qwen3--step=99-last"
    iteration = copy(fixture, directory)
    edit_metadata(iteration, prefixed)
    torch.save({"loops": Exploding(), "pytorch-lightning_version": "2.5"}, iteration / "common.pt")
    name.mkdir()
    iteration.rename(name / "weights")
    shutil.rmtree(iteration.parent)
    (name / "context").mkdir()
    shutil.copytree(fixture.tokenizer, name / "context/nemo_tokenizer")
    (name / "context/io.json").write_text("not looked at")
    config = {**provider(fixture.spec), "_target_": target}
    model = {"_target_": "nemo.collections.llm.gpt.model.qwen3.Qwen3Model", "config": config}
    (name / "context/model.yaml").write_text(yaml.dump(model, Dumper=Dumper))
    return name


@pytest.mark.parametrize("level", ["..", ".", "weights"])
@pytest.mark.parametrize(
    ("name", "target", "told"),
    [
        (DENSE, "nemo.collections.llm.gpt.model.qwen3.Qwen3Config600M", "model_type qwen3"),
        (MOE, "nemo.collections.llm.gpt.model.qwen3.Qwen3Config30B_A3B", "model_type qwen3_moe"),
        (MOE, "somebody.Config", "has decoder.layers.*.mlp.router.weight"),
    ],
)
def test_everything_comes_from_the_context(
    fixtures: Mapping[str, Fixture],
    tmp_path: Path,
    level: str,
    name: str,
    target: str,
    told: str,
) -> None:
    fixture = fixtures[name]
    (tmp_path / "run").mkdir()
    path = saved(fixture, tmp_path / "run", target) / level
    model = load(path, Options())
    assert model.companions.trainer == "NeMo 2"
    assert model.companions.args_source.endswith("context/model.yaml")
    assert any(told in reason for reason in model.choice.evidence)
    assert model.tokenizer.source.endswith("context/nemo_tokenizer")
    assert model.config["rms_norm_eps"] == fixture.spec.norm_eps
    assert model.config["rope_theta"] == fixture.spec.rope_theta
    assert model.config["vocab_size"] == fixture.spec.vocab_size
    tree, _ = build(model, "50GB", 1 << 20)
    expected = (fixture.hf / "model.safetensors").read_bytes()
    assert read_all(tree.files["model.safetensors"]) == expected
    assert not Path("exploded").exists()


ADAPTER, BASE = "bridge-qwen3-pp2-only", "bridge-qwen3-pp2-only-base"


def test_an_adapter_names_its_base_model(tmp_path: Path) -> None:
    """Its modules are those that Megatron-Bridge took over; nothing plain says its alpha."""
    both = ensure([ADAPTER, BASE])
    target = "nemo.collections.llm.gpt.model.qwen3.Qwen3Config600M"
    for name in both:
        (tmp_path / name).mkdir()
    base = saved(both[BASE], tmp_path / BASE, target)
    adapter = saved(both[ADAPTER], tmp_path / ADAPTER, target)
    metadata = adapter / "weights/adapter_metadata.json"
    metadata.write_text(json.dumps({"model_ckpt_path": "/nonexistent/qwen3"}))
    with pytest.raises(CheckpointError, match=r"\(/nonexistent/qwen3, which is not on this mach"):
        load(adapter, Options())
    metadata.write_text(json.dumps({"model_ckpt_path": str(base)}))
    with pytest.raises(MappingError, match="give it with --adapter PATH:SCALE"):
        load(adapter, Options())
    model = load(adapter, Options(adapter=adapter, adapter_scale=4.0))
    tree, _ = build(model, "50GB", 1 << 20)
    expected = (both[ADAPTER].hf / "model.safetensors").read_bytes()
    assert read_all(tree.files["model.safetensors"]) == expected
