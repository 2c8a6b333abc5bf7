"""What ms-swift leaves: `args.json` as its `save_args` writes it, around a real checkpoint.

The weights are saved by megatron-core; `args.json` is a stand-in with the keys of ms-swift 4.6
(swift/megatron/trainers/base.py save_checkpoint puts the files where they are here).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mcorefs.errors import CheckpointError
from mcorefs.files import read_all
from mcorefs.locate import locate
from mcorefs.model import Model, Options, load
from mcorefs.trainers import companions
from mcorefs.tree import build, open_tree
from tests.checkpoints import Fixture, ensure

NAMES = ("qwen3_moe-tp2-pp2-ep2", "qwen3-tied")
ARGS: dict[str, object] = {
    "model": "Qwen/Qwen3-30B-A3B",
    "model_type": "qwen3_moe",
    "model_revision": None,
    "model_dir": "/nonexistent/modelscope/hub/models/Qwen/Qwen3-30B-A3B",
    "template": "qwen3",
    "task_type": "causal_lm",
    "tuner_type": "full",
    "swift_version": "4.6.0.dev0",
    "mcore_model": None,
}


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure(NAMES)


@pytest.fixture(autouse=True)
def _no_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MODELSCOPE_CACHE", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def saved(fixture: Fixture, output: Path, **changes: object) -> Path:
    """A run of ms-swift 4 in `output`; returns its checkpoint directory."""
    run = output / "v0-20261124-081500"
    checkpoint = run / "checkpoint-100"
    run.mkdir(parents=True)
    shutil.copytree(fixture.root, checkpoint)
    for place in (run, checkpoint):
        (place / "args.json").write_text(json.dumps({**ARGS, **changes}))
    return checkpoint


def model_directory(fixture: Fixture, place: Path) -> Path:
    """The model that was trained from: no weights are needed."""
    place.mkdir(parents=True)
    for file in (fixture.hf / "config.json", *fixture.tokenizer.iterdir()):
        shutil.copy(file, place)
    return place


def is_whole(model: Model, fixture: Fixture) -> None:
    tree, _ = build(model, fixture.spec.hf_max_shard_size or "50GB", 1 << 20)
    shards = sorted(fixture.hf.glob("*.safetensors"))
    assert sorted(name for name in tree.files if name.endswith(".safetensors")) == [
        shard.name for shard in shards
    ]
    for shard in shards:
        assert read_all(tree.files[shard.name]) == shard.read_bytes()


@pytest.mark.parametrize("level", ["output", "run", "checkpoint", "iteration"])
def test_every_level_opens(fixtures: dict[str, Fixture], tmp_path: Path, level: str) -> None:
    """The failure that this project began with: the wrong level was given, and a tokenizer was
    asked for that no level holds."""
    fixture = fixtures["qwen3_moe-tp2-pp2-ep2"]
    checkpoint = saved(fixture, tmp_path / "output")
    levels = {
        "output": tmp_path / "output",
        "run": checkpoint.parent,
        "checkpoint": checkpoint,
        "iteration": checkpoint / fixture.iteration.name,
    }
    model = load(levels[level], Options(vocab_size=fixture.spec.vocab_size))
    assert model.companions.trainer == "ms-swift"
    assert model.choice.family.name == "qwen3_moe"
    assert model.choice.evidence == ("the trainer names model_type qwen3_moe",)
    (remark,) = model.companions.remarks
    assert "'Qwen/Qwen3-30B-A3B', which is not on this machine" in remark
    assert "--hf-config DIR" in remark
    is_whole(model, fixture)


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("models/qwen", {"model_dir": "{tmp}/models/qwen"}),
        ("models/qwen", {"model": "{tmp}/models/qwen", "model_dir": None}),
        ("home/.cache/modelscope/hub/models/Qwen/Qwen3-30B-A3B", {}),
        ("home/.cache/modelscope/hub/models/Qwen/Qwen2___5-7B", {"model": "Qwen/Qwen2.5-7B"}),
        ("home/.cache/huggingface/hub/models--Qwen--Qwen3-30B-A3B/snapshots/0a1b", {}),
    ],
)
def test_the_model_it_was_trained_from_is_found(
    fixtures: dict[str, Fixture], tmp_path: Path, place: str, changes: dict[str, str | None]
) -> None:
    """Its config.json fills what common.pt does not record: this one records no arguments."""
    fixture = fixtures["qwen3-tied"]
    changes = {key: value and value.format(tmp=tmp_path) for key, value in changes.items()}
    checkpoint = saved(fixture, tmp_path / "output", model_type="qwen3", **changes)
    directory = model_directory(fixture, tmp_path / place)
    model = load(checkpoint, Options())
    assert model.companions.hf_directories == (directory,)
    assert model.companions.remarks == ()
    assert model.tokenizer.source == str(directory)
    stated = json.loads((fixture.hf / "config.json").read_text())
    for key in ("rms_norm_eps", "num_attention_heads", "tie_word_embeddings", "vocab_size"):
        assert model.config[key] == stated[key]
    is_whole(model, fixture)


@pytest.mark.parametrize(
    ("version", "stated", "model_type"),
    [
        ("4.6.0.dev0", "qwen3_moe", "qwen3_moe"),
        ("4.0.0", "deepseek", "deepseek"),
        ("4.0.0", "yi", "llama"),
        ("3.9.3", "qwen3_moe_thinking", "qwen3_moe"),
        ("3.9.3", "qwen2_5", "qwen2"),
        ("3.9.3", "llama3_1", "llama"),
        ("3.9.3", "deepseek", "llama"),
        ("3.9.3", "moonlight", "deepseek_v3"),
        ("3.12.6", "qwen3", "qwen3"),
        (None, "qwen3_coder", "qwen3_moe"),
        # Qwen3-30B-A3B-Instruct-2507 and Qwen3-4B-Instruct-2507 go by the same name.
        ("3.9.3", "qwen3_nothinking", None),
        ("3.9.3", "deepseek_r1_distill", None),
        ("3.9.3", "glm4", None),
        ("4.1.0", "glm4", "glm4"),
        ("4.1.0", 7, None),
    ],
)
def test_names_of_its_own(
    fixtures: dict[str, Fixture],
    tmp_path: Path,
    version: str | None,
    stated: object,
    model_type: str | None,
) -> None:
    fixture = fixtures["qwen3_moe-tp2-pp2-ep2"]
    root = saved(fixture, tmp_path, model_type=stated, swift_version=version)
    location = locate(root)
    beside = companions(location, location.format.index(location.path))
    assert (beside.trainer, beside.model_type) == ("ms-swift", model_type)


def test_a_name_for_several_kinds_leaves_it_to_the_tensors(
    fixtures: dict[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["qwen3_moe-tp2-pp2-ep2"]
    changes = {"model_type": "qwen3_nothinking", "swift_version": "3.9.3"}
    model = load(saved(fixture, tmp_path, **changes), Options(vocab_size=301))
    assert model.choice.family.name == "qwen3_moe"
    is_whole(model, fixture)


@pytest.mark.parametrize("name", ["../../etc", "a/b/c", "/etc\0", "x", "..", "Qwen/../x"])
def test_names_that_are_no_models(fixtures: dict[str, Fixture], tmp_path: Path, name: str) -> None:
    fixture = fixtures["qwen3_moe-tp2-pp2-ep2"]
    checkpoint = saved(fixture, tmp_path, model=name, model_dir=name)
    model = load(checkpoint, Options(vocab_size=301))
    assert model.companions.hf_directories == ()


def test_other_files_of_that_name(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["qwen3_moe-tp2-pp2-ep2"]
    checkpoint = saved(fixture, tmp_path)
    (checkpoint.parent / "args.json").unlink()
    (checkpoint / "args.json").write_text('{"learning_rate": 1}')
    assert load(checkpoint, Options()).companions.trainer == "Megatron-LM"
    for damaged in ("{", "[]", "\xff", "[" * 100_000):
        (checkpoint / "args.json").write_text(damaged, encoding="latin1")
        with pytest.raises(CheckpointError, match=r"args\.json (cannot be read|holds no JSON)"):
            load(checkpoint, Options())


@pytest.mark.parametrize("level", ["run", "checkpoint", "iteration"])
def test_an_adapter_that_was_only_saved_for_peft(
    fixtures: dict[str, Fixture], tmp_path: Path, level: str
) -> None:
    """save_safetensors and no_save_optim, with a LoRA adapter: nothing is in the iteration."""
    fixture = fixtures["qwen3-tied"]
    checkpoint = saved(fixture, tmp_path, tuner_type="lora")
    iteration = checkpoint / fixture.iteration.name
    for file in iteration.iterdir():
        if file.name != "common.pt":
            file.unlink()
    named = {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}
    (checkpoint / "adapter_config.json").write_text(json.dumps(named))
    (checkpoint / "adapter_model.safetensors").write_bytes(b"")
    path = {"run": checkpoint.parent, "checkpoint": checkpoint, "iteration": iteration}[level]
    wanted = rf"pass its base model \(Qwen/Qwen3-0.6B\) as CKPT, and --adapter {checkpoint}"
    with pytest.raises(CheckpointError, match=wanted):
        load(path, Options())
    merged = checkpoint.with_name("checkpoint-100-merged")
    shutil.copytree(fixture.hf, merged)
    (merged / "latest_checkpointed_iteration.txt").write_text("100")
    (merged / "args.json").write_text(json.dumps(ARGS))
    wanted = {"run": "holds several checkpoints"}.get(level, f"merged with it in {merged}")
    with pytest.raises(CheckpointError, match=wanted):
        load(path, Options())
    (merged / "latest_checkpointed_iteration.txt").write_text("100")
    (merged / "args.json").write_text(json.dumps(ARGS))
    assert (
        read_all(open_tree(merged, Options()).tree.files["model.safetensors"])
        == (fixture.hf / "model.safetensors").read_bytes()
    )
