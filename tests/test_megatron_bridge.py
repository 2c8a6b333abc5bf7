"""What Megatron-Bridge leaves: `run_config.yaml` beside real shards.

Megatron-Bridge needs TransformerEngine, so the file is a stand-in (`tests.providers`), written as
its `ConfigContainer.to_yaml` does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig

from mcorefs.errors import CheckpointError, MappingError
from mcorefs.files import read_all
from mcorefs.model import Options, load
from mcorefs.trainers import plain_yaml
from mcorefs.trainers.plain_yaml import read_yaml
from mcorefs.tree import build
from tests.checkpoints import Fixture, ensure
from tests.edited import copy
from tests.providers import Dumper, provider

DENSE, MOE = "qwen3-tied", "qwen3_moe-tp2-ep2-etp1"


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure([DENSE, MOE])


def saved(fixture: Fixture, directory: Path, **changes: object) -> Path:
    """The root of a copy as Megatron-Bridge leaves it; `changes` are of the model section."""
    iteration = copy(fixture, directory)
    torch.save({"checkpoint_version": 3.0, "iteration": 100}, iteration / "common.pt")
    shutil.copytree(fixture.tokenizer, iteration / "tokenizer")
    config = {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": {**provider(fixture.spec), **changes},
        "tokenizer": {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/nowhere"},
    }
    (iteration / "run_config.yaml").write_text(yaml.dump(config, Dumper=Dumper))
    return iteration.parent


@pytest.mark.parametrize("name", [DENSE, MOE])
def test_everything_comes_from_the_run_config(
    fixtures: Mapping[str, Fixture], tmp_path: Path, name: str
) -> None:
    fixture = fixtures[name]
    model = load(saved(fixture, tmp_path), Options())
    assert model.companions.trainer == "Megatron-Bridge"
    assert model.companions.args_source.endswith("run_config.yaml")
    assert model.tokenizer.source.endswith("iter_0000100/tokenizer")
    assert any("'Qwen/Qwen3-0.6B', which is not on this machine" in r for r in model.remarks)
    tree, _ = build(model, "50GB", 1 << 20)
    assert (
        read_all(tree.files["model.safetensors"]) == (fixture.hf / "model.safetensors").read_bytes()
    )
    (tmp_path / "made").mkdir()
    (tmp_path / "made/config.json").write_bytes(read_all(tree.files["config.json"]))
    made, expected = (AutoConfig.from_pretrained(p) for p in (tmp_path / "made", fixture.hf))
    ignored = {"transformers_version", "_name_or_path", "pad_token_id"}
    differing = {
        key
        for key, value in expected.to_dict().items()
        if made.to_dict().get(key) != value and key not in ignored
    }
    assert differing == set()


def test_the_builder_form(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures[DENSE]
    flat = provider(fixture.spec)
    own = {"vocab_size", "seq_length", "rotary_base", "position_embedding_type"}
    root = saved(fixture, tmp_path)
    directory = tmp_path / "Qwen3"
    shutil.copytree(fixture.tokenizer, directory)
    shutil.copy(fixture.hf / "config.json", directory)
    model = {
        "_target_": "megatron.bridge.models.builder.BridgeGPTModelConfig",
        "transformer": {key: value for key, value in flat.items() if key not in own},
        **{key: flat[key] for key in own},
        "extra_checkpoint_metadata": {"hf_model_id": str(directory)},
    }
    config = root / "iter_0000100/run_config.yaml"
    config.write_text(yaml.dump({"model": model}, Dumper=Dumper))
    found = load(root, Options())
    assert found.companions.hf_directories == (directory,)
    assert found.companions.args["num_layers"] == fixture.spec.layers
    assert found.companions.args["rotary_base"] == fixture.spec.rope_theta


def test_specific_providers(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    target = "megatron.bridge.models.qwen.qwen_provider.Qwen3ModelProvider600M"
    model = load(saved(fixtures[DENSE], tmp_path, _target_=target), Options())
    assert model.choice.evidence == ("the trainer names model_type qwen3",)


def test_contradictions_are_told(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    root = saved(fixtures[DENSE], tmp_path, num_layers=7, kv_channels=32)
    with pytest.raises(MappingError) as caught:
        load(root, Options())
    assert any("num_layers is 7 in the training arguments" in p for p in caught.value.problems)
    assert any("kv_channels is 32" in problem for problem in caught.value.problems)


# --- plain YAML -----------------------------------------------------------------------------


def test_tags_construct_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "a: !!python/object/apply:os.mkdir [exploded]\n"
        "b: !!python/name:os.system ''\n"
        "c: !!python/object/new:type {args: [x]}\n"
        "d: !unknown {e: 1}\n"
        "f: !!python/tuple [1, 2]\n"
        "g: {_target_: os.system, _call_: true, _args_: [true]}\n"
        "h: {_target_: torch.nn.functional.silu, _call_: false}\n"
        "i: {_target_: AttnBackend, _call_: true, _args_: [5], _name_: auto}\n"
        "j: 2026-11-24\n"
    )
    assert read_yaml(file) == {
        "a": ["exploded"],
        "b": "",
        "c": {"args": ["x"]},
        "d": {"e": 1},
        "f": [1, 2],
        "g": {"_target_": "os.system", "_call_": True, "_args_": [True]},
        "h": "torch.nn.functional.silu",
        "i": 5,
        "j": "2026-11-24",
    }
    assert not Path("exploded").exists()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a [*a]",
        "a: " + "[" * 5000 + "]" * 5000,
        "a: " + "[" * 100 + "]" * 100,
        "- a list",
        "text",
        "",
        "a: [",
        "{a: 1}: 2",
        "a: 1\n\x00",
        "a: !!int nan",
        "a: !!timestamp never",
        "a: " + "0" * (1 << 20),
    ],
)
def test_what_is_no_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"x\.yaml (cannot be read|holds no mapping)"):
        read_yaml(tmp_path / "x.yaml")


def test_too_many_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.yaml").write_text(json.dumps({"a": [0] * 1000}))
    assert read_yaml(tmp_path / "x.yaml") == {"a": [0] * 1000}
    monkeypatch.setattr(plain_yaml, "MAX_NODES", 1000)
    with pytest.raises(CheckpointError, match="means too many values"):
        read_yaml(tmp_path / "x.yaml")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_yaml(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        read_yaml(tmp_path / "x.yaml")
