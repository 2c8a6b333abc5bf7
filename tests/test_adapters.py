"""LoRA adapters, merged on read: every fixture against what torch makes of the matrices on the
Hugging Face side, byte for byte.

The shards are written by the modules of ms-swift (mcore-bridge) and Megatron-Bridge themselves
(tests/checkpoints/adapters.py); `args.json` and `run_config.yaml` beside them are stand-ins.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mcorefs
from mcorefs.errors import CheckpointError, MappingError
from mcorefs.files import read_all
from mcorefs.model import Model, Options, load, parse_adapter
from mcorefs.remote import parse_path
from mcorefs.tree import build, open_tree
from tests.checkpoints import ADAPTED, Fixture, Spec, ensure
from tests.checkpoints.lora import scale_of
from tests.providers import Dumper, provider
from tests.test_cli import mcorefs as mcorefs_said

ONLY = [name for name, spec in ADAPTED.items() if spec.adapter_only]
PEFT, PEFT_BASE = "swift-qwen3-tp2-only", "swift-qwen3-tp2-only-base"
BRIDGE, BRIDGE_BASE = "bridge-qwen3-pp2-only", "bridge-qwen3-pp2-only-base"
TOGETHER = [name for name, spec in ADAPTED.items() if spec.adapter and not spec.adapter_only]


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure(ADAPTED)


def saved(fixture: Fixture, directory: Path, base: Path | None = None, **changes: object) -> Path:
    """A run of the framework that trained, in `directory`; returns its checkpoint."""
    spec = fixture.spec
    if spec.adapter == "ms-swift":
        root = directory / "v0-20261124-081500" / "checkpoint-100"
        shutil.copytree(fixture.root, root)
        (root / "args.json").write_text(json.dumps(swift_args(spec, base) | changes))
        return root
    root = directory / "checkpoints"
    shutil.copytree(fixture.root, root)
    config = {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": provider(spec),
        "checkpoint": {"pretrained_checkpoint": None if base is None else str(base)},
        "peft": {
            "_target_": "megatron.bridge.peft.lora.LoRA",
            "dim": spec.lora_rank,
            "alpha": spec.lora_alpha,
            "target_modules": list(spec.lora_targets),
            **changes,
        },
    }
    path = root / spec.iteration_dir / "run_config.yaml"
    path.write_text(yaml.dump(config, Dumper=Dumper))
    return root


def swift_args(spec: Spec, base: Path | None) -> dict[str, object]:
    return {
        "model": "Qwen/Qwen3-0.6B",
        "model_type": spec.family,
        "swift_version": "4.5.2",
        "tuner_type": "lora",
        "lora_rank": spec.lora_rank,
        "lora_alpha": spec.lora_alpha,
        "use_rslora": spec.rank_stabilised,
        "target_modules": ["all-linear"],
        "mcore_model": None if base is None else str(base),
    }


def options(fixture: Fixture, adapter: Path | None = None, scale: float | None = None) -> Options:
    # The base model may record no heads, and a run of Megatron-Bridge no size of the vocabulary.
    return Options(
        vocab_size=fixture.spec.vocab_size,
        hf_config=fixture.hf,
        adapter=adapter,
        adapter_scale=scale,
    )


def assert_merged(model: Model, fixture: Fixture) -> None:
    tree, _ = build(model, "50GB", 1 << 20)
    served = read_all(tree.files["model.safetensors"])
    assert served == (fixture.hf / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", TOGETHER)
def test_base_and_adapter_in_one_checkpoint(
    fixtures: dict[str, Fixture], tmp_path: Path, name: str
) -> None:
    fixture = fixtures[name]
    model = load(saved(fixture, tmp_path), options(fixture))
    assert_merged(model, fixture)


@pytest.mark.parametrize("name", ONLY)
def test_adapter_on_its_base_model(fixtures: dict[str, Fixture], tmp_path: Path, name: str) -> None:
    fixture, base = fixtures[name], fixtures[f"{name}-base"]
    root = saved(fixture, tmp_path)
    model = load(base.root, options(fixture, root))
    assert_merged(model, fixture)
    assert any(
        f"{root / fixture.spec.iteration_dir} is merged on read into {base.iteration}" in remark
        for remark in model.remarks
    )
    assert load(base.root, options(base)).adapted is None


@pytest.mark.parametrize("name", ONLY)
def test_the_base_model_is_found_where_the_run_says(
    fixtures: dict[str, Fixture], tmp_path: Path, name: str
) -> None:
    fixture, base = fixtures[name], fixtures[f"{name}-base"]
    root = saved(fixture, tmp_path, base.root)
    for path in (root, root / fixture.spec.iteration_dir):
        model = load(path, options(fixture))
        assert_merged(model, fixture)
        assert model.location.path == root / fixture.spec.iteration_dir
        assert any("merged on read into" in remark for remark in model.remarks)


# -- over a base model that is one for Hugging Face --------------------------------------------


@pytest.mark.parametrize("name", [*TOGETHER, *ONLY])
def test_adapter_on_a_hugging_face_model(
    fixtures: dict[str, Fixture], tmp_path: Path, name: str
) -> None:
    """Nothing but the adapter is taken from a checkpoint that holds the base model too."""
    fixture = fixtures[name]
    root, base = saved(fixture, tmp_path), fixture.directory / "base"
    tree = open_tree(base, Options(adapter=root)).tree
    for file in base.iterdir():
        real = (fixture.hf if file.suffix == ".safetensors" else base) / file.name
        assert read_all(tree.files[file.name]) == real.read_bytes()


@pytest.mark.parametrize("name", [name for name in (*TOGETHER, *ONLY) if name.startswith("bridge")])
def test_what_megatron_bridge_exports_for_peft_comes_to_the_same(
    fixtures: dict[str, Fixture], tmp_path: Path, name: str
) -> None:
    """By the names that its save_hf_adapter writes, an expert's among them; it merges in float32,
    as PEFT does."""
    fixture = fixtures[name]
    matrices = load_file(fixture.adapter / "model.safetensors")
    named = {f"base_model.model.{key}": tensor for key, tensor in matrices.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": fixture.spec.lora_rank, "bias": "none"}
    config["lora_alpha"] = fixture.spec.lora_alpha
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    bases = [fixture.directory / "base"]
    if fixture.spec.adapter_only:
        bases.append(fixtures[f"{name}-base"].root)
    expected = load_file(fixture.hf / "model.safetensors")
    for base in bases:
        with mcorefs.open(base, adapter=tmp_path, hf_config=bases[0]) as checkpoint:
            assert set(checkpoint.keys()) == set(expected)
            for key, tensor in expected.items():
                found = checkpoint.get_tensor(key)
                assert isinstance(found, torch.Tensor)
                assert torch.equal(found, tensor), key


def edited(fixture: Fixture, directory: Path, **changes: object) -> Path:
    """The base model with another config.json."""
    base = Path(shutil.copytree(fixture.directory / "base", directory / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    return base


def problems_of(base: Path, adapter: Path, scale: float | None = None) -> list[str]:
    with pytest.raises(MappingError) as caught:
        open_tree(base, Options(adapter=adapter, adapter_scale=scale))
    return list(caught.value.problems)


@pytest.mark.parametrize("name", ["swift-qwen3", BRIDGE])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 1e-06 in the checkpoint but 0.001 in"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta is "),
    ],
)
def test_an_adapter_whose_run_denies_the_config(
    fixtures: dict[str, Fixture],
    tmp_path: Path,
    name: str,
    changes: dict[str, object],
    said: str,
) -> None:
    fixture = fixtures[name]
    problems = problems_of(edited(fixture, tmp_path, **changes), saved(fixture, tmp_path))
    assert any(problem.startswith(said) for problem in problems)


def test_an_adapter_of_another_hugging_face_model(
    fixtures: dict[str, Fixture], tmp_path: Path
) -> None:
    dense, sparse = fixtures["swift-qwen3"], fixtures["swift-qwen3_moe-tp2-pp2-ep2-only"]
    problems = problems_of(dense.directory / "base", saved(sparse, tmp_path / "sparse"))
    experts = "decoder.layers.0.mlp.experts.0.linear_fc1.weight"
    lacks = "which the base model does not hold"
    assert f"the adapter changes {experts}, {lacks} (and 31 more like it)" in problems
    problems = problems_of(sparse.directory / "base", saved(dense, tmp_path / "dense"))
    mlp = "decoder.layers.0.mlp.linear_fc1.weight"
    assert f"the adapter changes {mlp}, {lacks} (and 3 more like it)" in problems


def test_an_adapter_of_another_size(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["swift-qwen3"]
    base = edited(fixture, tmp_path)
    (file,) = base.glob("*.safetensors")
    cut = {
        name: tensor[:-1].clone() if name.endswith("down_proj.weight") else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(cut, file)
    problems = problems_of(base, saved(fixture, tmp_path))
    name = "model.layers.0.mlp.down_proj.weight"
    said = f"what the adapter makes of {name} has shape [64, 96], in the base model it is [63, 96]"
    assert f"{said} (and 3 more like it)" in problems


def test_an_output_layer_that_is_the_embedding(
    fixtures: dict[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["swift-qwen3-tp4-rslora-head"]
    root = saved(fixture, tmp_path)
    both = "the adapter changes lm_head.weight, but the output layer of the base model is its"
    problems = problems_of(edited(fixture, tmp_path, tie_word_embeddings=True), root)
    assert any(problem.startswith(both) for problem in problems)
    base = fixtures[BRIDGE].directory / "base"
    assert "the adapter changes lm_head.weight, which the base model does not hold" in problems_of(
        base, root
    )


def test_a_hugging_face_model_that_is_not_known(
    fixtures: dict[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["swift-qwen3"]
    base, root = edited(fixture, tmp_path, model_type="something"), saved(fixture, tmp_path)
    with pytest.raises(MappingError, match="is 'something', which is not supported yet"):
        open_tree(base, Options(adapter=root))


def test_a_hugging_face_model_and_another_scale(
    fixtures: dict[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures[BRIDGE]
    base, root = fixture.directory / "base", saved(fixture, tmp_path)
    with mcorefs.open(base, adapter=f"{root}:0") as checkpoint:
        for name, tensor in load_file(base / "model.safetensors").items():
            found = checkpoint.get_tensor(name)
            assert isinstance(found, torch.Tensor)
            assert torch.equal(found, tensor)
    (root / fixture.spec.iteration_dir / "run_config.yaml").unlink()
    said = "nothing says how the adapter is scaled (alpha / r): give it with --adapter PATH:SCALE"
    assert problems_of(base, root) == [said]


def test_the_base_model_that_the_run_names_is_told_and_not_taken(
    fixtures: dict[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures[PEFT]
    base = fixture.directory / "base"
    root = saved(fixture, tmp_path, model=str(base))
    with pytest.raises(CheckpointError) as caught:
        load(root, options(fixture))
    iteration = root / fixture.spec.iteration_dir
    said = f"Hugging Face model directory (perhaps {base}), as CKPT, and --adapter {iteration}"
    assert said in str(caught.value)
    assert any(
        "merged on read" in one for one in open_tree(base, Options(adapter=root)).source.remarks
    )
    other = edited(fixture, tmp_path)
    remarks = open_tree(other, Options(adapter=root)).source.remarks
    asked = f"it was trained on top of {base}, as its run says: is that the base model?"
    assert asked in remarks


# -- what is said ------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["output", "run", "checkpoint", "iteration"])
def test_every_level_of_an_adapter_opens(
    fixtures: dict[str, Fixture], tmp_path: Path, level: str
) -> None:
    fixture, base = fixtures[PEFT], fixtures[PEFT_BASE]
    root = saved(fixture, tmp_path / "output", base.root)
    levels = {
        "output": tmp_path / "output",
        "run": root.parent,
        "checkpoint": root,
        "iteration": root / fixture.spec.iteration_dir,
    }
    assert_merged(load(levels[level], options(fixture)), fixture)
    assert_merged(load(base.root, options(fixture, levels[level])), fixture)


def test_the_tokenizer_may_lie_with_either(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture, base = fixtures[PEFT], fixtures[PEFT_BASE]
    edited = tmp_path / "base"
    shutil.copytree(base.root, edited)
    root = saved(fixture, tmp_path / "output", edited)
    for holder in (root, edited / base.spec.iteration_dir):
        shutil.copytree(fixture.tokenizer, holder / "tokenizer")
        for path, adapter in ((root, None), (edited, root)):
            model = load(path, Options(vocab_size=307, adapter=adapter))
            assert model.tokenizer.source == str(holder / "tokenizer")
        shutil.rmtree(holder / "tokenizer")


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, r"\(Qwen/Qwen3-0.6B, loaded from Hugging Face weights\)"),
        (Path("/nonexistent/mcore"), r"\(/nonexistent/mcore, which is not on this machine\)"),
        (Path("mcore"), r"\(mcore, which is not on this machine\)"),
    ],
)
def test_an_adapter_without_its_base_model(
    fixtures: dict[str, Fixture], tmp_path: Path, base: Path | None, said: str
) -> None:
    fixture = fixtures[PEFT]
    root = saved(fixture, tmp_path, base)
    with pytest.raises(CheckpointError, match=said) as caught:
        load(root, options(fixture))
    iteration = root / fixture.spec.iteration_dir
    assert f"{iteration} holds only a LoRA adapter (8 tensors)" in str(caught.value)
    assert f"as CKPT, and --adapter {iteration}" in str(caught.value)
    assert "--merge_lora true" in str(caught.value)


def test_what_the_framework_merged_itself_is_named(
    fixtures: dict[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures[PEFT]
    root = saved(fixture, tmp_path)
    merged = root.with_name("checkpoint-100-merged")
    shutil.copytree(fixture.hf, merged)
    with pytest.raises(CheckpointError, match=f"merged already when it was saved: pass {merged}"):
        load(root, options(fixture))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("hf", "which cannot be used: .* is a Hugging Face model: it is not taken unasked"),
        ("empty", "which cannot be used: .* is empty"),
        ("itself", "which holds an adapter itself"),
    ],
)
def test_a_base_model_that_is_none(
    fixtures: dict[str, Fixture], tmp_path: Path, what: str, said: str
) -> None:
    fixture = fixtures[PEFT]
    (tmp_path / "empty").mkdir()
    places = {"hf": fixture.hf, "empty": tmp_path / "empty", "itself": fixture.root}
    with pytest.raises(CheckpointError, match=said):
        load(saved(fixture, tmp_path / "output", places[what]), options(fixture))


def test_a_checkpoint_that_is_no_adapter(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    base = fixtures[PEFT_BASE]
    for path in (base.root, fixtures[BRIDGE_BASE].root, base.hf):
        with pytest.raises(CheckpointError, match=r"--adapter: .* holds a model, but no LoRA"):
            load(base.root, options(base, path))
    with pytest.raises(CheckpointError, match="does not exist"):
        load(base.root, options(base, tmp_path / "absent"))
    for path in (base.root, base.hf):
        with pytest.raises(CheckpointError, match=r"--adapter: .* holds a model, but no LoRA"):
            open_tree(base.hf, Options(adapter=path))


@pytest.mark.parametrize("name", [PEFT, "swift-qwen3"])
def test_an_adapter_for_an_adapter(fixtures: dict[str, Fixture], tmp_path: Path, name: str) -> None:
    fixture = fixtures[name]
    with pytest.raises(CheckpointError, match="pass the checkpoint of its base model as CKPT"):
        load(saved(fixture, tmp_path), options(fixture, fixtures[BRIDGE].root))


def test_main_parameters_of_an_adapter(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures[PEFT]
    root = saved(fixture, tmp_path, fixtures[PEFT_BASE].root)
    for path, adapter in ((root, None), (fixtures[PEFT_BASE].root, root)):
        chosen = replace(options(fixture, adapter), weights="optimizer")
        with pytest.raises(CheckpointError, match="--weights optimizer"):
            load(path, chosen)


def test_a_run_that_does_not_say_its_scale(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["swift-qwen3"]
    root = saved(fixture, tmp_path)
    (root / "args.json").unlink()
    with pytest.raises(MappingError) as caught:
        load(root, options(fixture))
    assert caught.value.problems == (
        "nothing says how the adapter is scaled (alpha / r): give it with --adapter PATH:SCALE",
    )
    assert_merged(load(root, options(fixture, root, scale_of(fixture.spec))), fixture)
    iteration = root / fixture.spec.iteration_dir
    assert_merged(load(root, options(fixture, iteration, scale_of(fixture.spec))), fixture)


@pytest.mark.parametrize("alpha", [None, "32", True, float("inf"), float("nan"), 10**60])
def test_alphas_that_are_none(fixtures: dict[str, Fixture], tmp_path: Path, alpha: object) -> None:
    for name in ("swift-qwen3", "bridge-qwen3-tp2"):
        root = saved(fixtures[name], tmp_path / name, lora_alpha=alpha, alpha=alpha)
        with pytest.raises(MappingError, match="give it with --adapter PATH:SCALE"):
            load(root, options(fixtures[name]))


def test_an_alpha_beyond_every_float(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    root = saved(fixtures["swift-qwen3"], tmp_path, lora_alpha=10**400)
    with pytest.raises(MappingError, match="give it with --adapter PATH:SCALE"):
        load(root, options(fixtures["swift-qwen3"]))
    root = saved(fixtures[BRIDGE], tmp_path / "bridge", dim=10**400)
    with pytest.raises(CheckpointError, match="a number of 401 characters"):
        load(root, options(fixtures[BRIDGE]))


def test_another_scale(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture, base = fixtures[BRIDGE], fixtures[BRIDGE_BASE]
    root = saved(fixture, tmp_path)
    assert_merged(load(base.root, options(fixture, root, 0.0)), base)
    with mcorefs.open(base.root, hf_config=fixture.hf, adapter=f"{root}:0.75") as checkpoint:
        found = checkpoint.get_tensor("model.layers.1.mlp.down_proj.weight")
    matrices = load_file(fixture.adapter / "model.safetensors")
    b, a = (matrices[f"model.layers.1.mlp.down_proj.lora_{side}.weight"] for side in "BA")
    weight = load_file(base.hf / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, (weight.float() + 0.75 * (b.float() @ a.float())).bfloat16())


@pytest.mark.parametrize("name", [PEFT, BRIDGE])
def test_a_rank_that_the_run_denies(
    fixtures: dict[str, Fixture], tmp_path: Path, name: str
) -> None:
    fixture, base = fixtures[name], fixtures[f"{name}-base"]
    root = saved(fixture, tmp_path, lora_rank=16, dim=16)
    with pytest.raises(MappingError) as caught:
        load(base.root, options(fixture, root))
    for module in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
        (problem,) = (p for p in caught.value.problems if f".{module}.weight" in p)
        assert problem.endswith("its rank is 8, that of the run was 16 (and 3 more like it)")


def test_an_adapter_of_another_model(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture, base = fixtures["swift-qwen3_moe-tp2-pp2-ep2-only"], fixtures[PEFT_BASE]
    with pytest.raises(MappingError) as caught:
        load(base.root, replace(options(base), adapter=saved(fixture, tmp_path)))
    problems = "\n".join(caught.value.problems)
    experts = "decoder.layers.0.mlp.experts.0.linear_fc1.weight"
    assert f"the adapter changes {experts}, which the base model does not hold" in problems
    assert "(and 31 more like it)" in problems


def test_ranks_are_told_by_the_pieces_where_nothing_else_says(
    fixtures: dict[str, Fixture], tmp_path: Path
) -> None:
    for name in ("bridge-qwen3-tp2-canonical", "bridge-qwen3-tp2"):
        fixture = fixtures[name]
        root = saved(fixture, tmp_path / name)
        path = root / fixture.spec.iteration_dir / "run_config.yaml"
        config = yaml.safe_load(path.read_text())
        for key in ("tensor_model_parallel_size", "expert_tensor_parallel_size"):
            del config["model"][key]
        path.write_text(yaml.dump(config))
        assert_merged(load(root, options(fixture)), fixture)


@pytest.mark.parametrize(
    ("text", "scale"),
    [("a", None), ("a:0.5", 0.5), ("a:b:2", 2.0), ("a:-1e-1", -0.1), ("here:1", None)],
)
def test_paths_with_a_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, scale: float | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here:1").mkdir()
    path = text if scale is None else text.rpartition(":")[0]
    assert parse_adapter(text) == (Path(path), scale)


@pytest.mark.parametrize("text", ["a:b", "a:", "a:nan", "a:inf", "/x/y:1/z"])
def test_scales_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no scale"):
        parse_adapter(text)


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("s3://bucket/run", "s3://bucket/run", None),
        ("s3://bucket/run:0.5", "s3://bucket/run", 0.5),
        ("memory://run", "memory://run", None),
        ("memory://run:2", "memory://run", 2.0),
    ],
)
def test_an_adapter_may_be_a_url(text: str, path: str, scale: float | None) -> None:
    assert parse_adapter(text) == (parse_path(path), scale)


def test_base_and_adapter_by_url(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    name = "swift-qwen3_moe-tp2-pp2-ep2-only"
    fixture, base = fixtures[name], fixtures[f"{name}-base"]
    adapter, memory = saved(fixture, tmp_path), fsspec.filesystem("memory")
    memory.put(str(base.root), "/adapters/base", recursive=True)
    memory.put(str(adapter), "/adapters/lora", recursive=True)
    given = options(fixture, parse_path("memory://adapters/lora"))
    model = load(parse_path("memory://adapters/base"), given)
    assert_merged(model, fixture)
    places = {path.split("/")[3] for path in model.checkpoint.files}
    assert places == {"base", "lora"}
    with pytest.raises(CheckpointError, match=r"/adapters/lora/.* holds only a LoRA adapter"):
        load(parse_path("memory://adapters/lora"), options(fixture))


# -- reading -----------------------------------------------------------------------------------


def test_any_slice_has_the_bits_of_the_whole(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["bridge-qwen3-tp2-canonical"]
    expected = load_file(fixture.hf / "model.safetensors")
    with mcorefs.open(saved(fixture, tmp_path), hf_config=fixture.hf) as checkpoint:
        for name, tensor in expected.items():
            part = checkpoint.get_slice(name)
            rows = part[3:7]
            assert isinstance(rows, torch.Tensor)
            assert torch.equal(rows, tensor[3:7])
            if tensor.ndim == 2:
                box = part[5:, 9:11]
                assert isinstance(box, torch.Tensor)
                assert torch.equal(box, tensor[5:, 9:11])


def test_peft_itself_comes_to_the_same(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    """peft.PeftModel.merge_and_unload on the Hugging Face model. It multiplies in float32 on a
    CPU, which makes no difference where alpha / r is a power of two."""
    fixture = fixtures["swift-qwen3"]
    matrices = load_file(fixture.adapter / "model.safetensors")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    named = {f"base_model.model.{name}": tensor for name, tensor in matrices.items()}
    save_file(named, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": fixture.spec.lora_rank,
        "lora_alpha": fixture.spec.lora_alpha,
        "target_modules": [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    script = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype='bfloat16')\n"
        "merged = PeftModel.from_pretrained(base, sys.argv[3], autocast_adapter_dtype=False)\n"
        "merged.merge_and_unload().save_pretrained(sys.argv[4])\n"
    )
    places = (Path(sys.prefix) / "trainers", fixture.directory / "base", adapter, tmp_path / "out")
    subprocess.run([sys.executable, "-c", script, *map(str, places)], check=True)
    tree, _ = build(load(saved(fixture, tmp_path), options(fixture)), "50GB", 1 << 20)
    served = read_all(tree.files["model.safetensors"])
    assert served == (tmp_path / "out" / "model.safetensors").read_bytes()


# -- the command line --------------------------------------------------------------------------


def test_inspect_says_what_the_adapter_is(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture, base = fixtures[PEFT], fixtures[PEFT_BASE]
    root = saved(fixture, tmp_path)
    iteration = root / fixture.spec.iteration_dir
    said = mcorefs_said("inspect", root, status=1)
    line = "rank 8, alpha 32, on linear_fc1, linear_fc2, linear_proj, linear_qkv"
    assert f"adapter  LoRA in {iteration}: {line}\n" in said
    assert "base model  Qwen/Qwen3-0.6B\n" in said
    assert "PROBLEM" in said
    assert f"--adapter {iteration}" in said
    given = ("inspect", base.root, "--adapter", root, "--vocab-size", 307)
    found = json.loads(mcorefs_said(*given, "--json"))
    assert found["adapter"] == {
        "path": str(iteration),
        "ranks": [8],
        "alpha": 32,
        "is_rank_stabilised": False,
        "targets": ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"],
        "trained_whole": [],
        "base": str(base.iteration),
    }
    assert found["problems"] == []
    assert f"base model  {base.iteration}\n" in mcorefs_said(*given)
    assert "verdict  whole; can be mounted" in mcorefs_said(*given)


def test_inspect_of_both_in_one(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["swift-qwen3-tp4-rslora-head"]
    said = mcorefs_said("inspect", saved(fixture, tmp_path), "--vocab-size", 307)
    assert "alpha 32, scaled by the root of the rank, on linear_fc1" in said
    assert "; output_layer trained whole\n" in said
    assert "base model  in the same checkpoint\n" in said
    plain = fixtures[PEFT_BASE]
    assert "base model" not in mcorefs_said("inspect", plain.root, "--vocab-size", 307)


def test_the_command_line_over_a_hugging_face_model(
    fixtures: dict[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures[PEFT]
    root, base = saved(fixture, tmp_path), fixture.directory / "base"
    iteration = root / fixture.spec.iteration_dir
    given = (base, "--adapter", root)
    found = json.loads(mcorefs_said("inspect", *given, "--json"))
    assert found["adapter"] == {
        "path": str(iteration),
        "ranks": [8],
        "alpha": 32,
        "is_rank_stabilised": False,
        "targets": ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"],
        "trained_whole": [],
        "base": str(base),
    }
    assert (found["format"], found["problems"]) == ("huggingface", [])
    said = mcorefs_said("verify", base, fixture.hf, "--adapter", root)
    assert "47 tensors equal, 0 different" in said
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    said = mcorefs_said("mount", base, mnt, "--adapter", root)
    try:
        assert f"the LoRA adapter in {iteration} is merged on read into {base}" in said
        expected = (fixture.hf / "model.safetensors").read_bytes()
        assert (mnt / "model.safetensors").read_bytes() == expected
    finally:
        mcorefs_said("umount", "--force", mnt)


def test_materialize_and_verify(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture, base = fixtures[PEFT], fixtures[PEFT_BASE]
    root = saved(fixture, tmp_path)
    given = (base.root, "--vocab-size", 307, "--adapter", root)
    said = mcorefs_said("materialize", *given[:1], tmp_path / "out", *given[1:])
    assert f"the LoRA adapter in {root / fixture.spec.iteration_dir} is merged on read" in said
    expected = (fixture.hf / "model.safetensors").read_bytes()
    assert (tmp_path / "out/model.safetensors").read_bytes() == expected
    said = mcorefs_said("verify", *given[:1], fixture.hf, *given[1:])
    assert "47 tensors equal, 0 different" in said
    scaled = (*given[1:-1], f"{root}:3")
    assert "28 different" in mcorefs_said("verify", given[0], fixture.hf, *scaled, status=1)
    said = mcorefs_said("verify", given[0], fixture.hf, "--adapter", f"{root}:x", status=2)
    assert "'x' is no scale" in said


def test_mount(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture, base = fixtures[BRIDGE], fixtures[BRIDGE_BASE]
    root, mnt = saved(fixture, tmp_path), tmp_path / "mnt"
    mnt.mkdir()
    said = mcorefs_said("mount", base.root, mnt, "--adapter", root, "--hf-config", fixture.hf)
    try:
        assert "is merged on read into" in said
        expected = (fixture.hf / "model.safetensors").read_bytes()
        assert (mnt / "model.safetensors").read_bytes() == expected
    finally:
        mcorefs_said("umount", "--force", mnt)
