"""Adapters in PEFT's format, made and merged by PEFT itself, over a base model in either format."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

import mcorefs
from mcorefs.errors import CheckpointError, MappingError
from mcorefs.files import read_all
from mcorefs.model import Options
from mcorefs.tree import open_tree
from tests.checkpoints import Fixture, ensure
from tests.checkpoints.pool import REPOSITORY
from tests.test_cli import mcorefs as mcorefs_said

BF16, F32, GPT2, MOE, VL = (
    "qwen3-tp2",
    "qwen3-pp2-uneven",
    "gpt2-tp2",
    "qwen3_moe-tp2-pp2-ep2",
    "qwen2_5_vl-swift-tp2",
)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CAUSAL, SEES = "AutoModelForCausalLM", "AutoModelForImageTextToText"
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": (BF16, CAUSAL, {"r": 8, "lora_alpha": 20, "target_modules": LINEAR}),
    "bfloat16": (
        BF16,
        CAUSAL,
        {"r": 8, "lora_alpha": 20, "target_modules": LINEAR, "autocast": False},
    ),
    "float32": (F32, CAUSAL, {"r": 8, "lora_alpha": 20, "target_modules": LINEAR}),
    "patterns": (
        BF16,
        CAUSAL,
        {
            "r": 8,
            "lora_alpha": 12,
            "use_rslora": True,
            "target_modules": [*LINEAR, "embed_tokens"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 4, "o_proj": 2},
            "alpha_pattern": {r"^model\.layers\.2\.mlp\.up_proj": 3, r"layers\.[13].*down_proj": 5},
            "modules_to_save": ["lm_head"],
        },
    ),
    "some-layers": (
        F32,
        CAUSAL,
        {"r": 4, "lora_alpha": 4, "target_modules": ["v_proj"], "layers_to_transform": [1, 3]},
    ),
    "turned": (
        GPT2,
        CAUSAL,
        {"r": 8, "lora_alpha": 20, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "router": (
        MOE,
        CAUSAL,
        {
            "r": 8,
            "lora_alpha": 20,
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.gate.weight"],
        },
    ),
    "sees": (VL, SEES, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "qkv"]}),
    "dora": (BF16, CAUSAL, {"use_dora": True, "target_modules": ["q_proj"], "merges": False}),
    "pissa": (
        F32,
        CAUSAL,
        {"init_lora_weights": "pissa", "target_modules": ["q_proj"], "merges": False},
    ),
    "biases": (GPT2, CAUSAL, {"bias": "all", "target_modules": ["c_attn"], "merges": False}),
    "fused-experts": (
        MOE,
        CAUSAL,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "merges": False,
        },
    ),
    "tokens": (BF16, CAUSAL, {"trainable_token_indices": [3, 5], "merges": False}),
}
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
MERGED = [name for name, (_, _, settings) in RUNS.items() if settings.get("merges", True)]
REFUSED = {
    "dora": ["is a DoRA (use_dora)", "is a DoRA (base_model.model.model.layers.0.self_attn.q_proj"],
    "pissa": ["init_lora_weights='pissa', which changes the weights of the base model"],
    "biases": ["says bias='all'"],
    "fused-experts": ["the fused experts of model.layers.0.mlp.experts (target_parameters)"],
    "tokens": ["trainable_token_indices=[3, 5], which is not known"],
}


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure([BF16, F32, GPT2, MOE, VL])


@pytest.fixture(scope="module")
def made(fixtures: dict[str, Fixture], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where PEFT wrote all of RUNS."""
    out = tmp_path_factory.mktemp("peft")
    wanted = {
        name: (str(fixtures[base].hf), DTYPES[fixtures[base].spec.dtype], kind, settings)
        for name, (base, kind, settings) in RUNS.items()
    }
    subprocess.run(
        [sys.executable, "-m", "tests.peft_runs", out],
        input=json.dumps(wanted),
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    return out


def place(fixture: Fixture, kind: str) -> Path:
    """The base model, as training saved it or as it is on the hub."""
    return fixture.root if kind == "megatron" else fixture.hf


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_same(
    path: Path, expected: dict[str, torch.Tensor], **options: Any
) -> mcorefs.Checkpoint:
    with mcorefs.open(path, **options) as found:
        assert set(found.keys()) == set(expected)
        for name, tensor in expected.items():
            have = found.get_tensor(name)
            assert isinstance(have, torch.Tensor)
            assert have.dtype == tensor.dtype, name
            assert torch.equal(have, tensor), name
    return found


def copied(made: Path, name: str, directory: Path, **changes: object) -> Path:
    """An adapter with other settings."""
    adapter = Path(shutil.copytree(made / name / "adapter", directory / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
    return adapter


KINDS = pytest.mark.parametrize("kind", ["megatron", "huggingface"])


# -- what peft makes of it -------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("name", MERGED)
def test_it_is_what_peft_makes_of_it(
    fixtures: dict[str, Fixture], made: Path, name: str, kind: str
) -> None:
    base = fixtures[RUNS[name][0]]
    expected = weights(made / name / "merged")
    before = weights(base.hf)
    assert any(not torch.equal(before[name], expected[name]) for name in before)
    adapter = made / name / "adapter"
    found = assert_same(place(base, kind), expected, adapter=adapter, hf_config=base.hf)
    assert any(f"{adapter} is merged on read into" in remark for remark in found.remarks)


def expected_of(adapter: Path, base: Path, scale: float) -> dict[str, torch.Tensor]:
    """W + scale * (B @ A): the product rounded to float32, that times scale too, the sum once."""
    model, matrices = weights(base), load_file(adapter / "adapter_model.safetensors")
    for key in matrices:
        module, is_a, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
        if is_a:
            b = matrices[key.replace(".lora_A.", ".lora_B.")]
            delta = (b.double() @ matrices[key].double()).float() * torch.tensor(scale)
            weight = model[f"{module}.weight"]
            model[f"{module}.weight"] = (weight.float() + delta).to(weight.dtype)
    return model


def randomise(adapter: Path) -> None:
    """Values whose sums are rounded: any order of them gives other bits."""
    file = adapter / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(3)
    save_file(
        {
            name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.1
            for name, tensor in load_file(file).items()
        },
        file,
    )


@KINDS
@pytest.mark.parametrize("name", ["plain", "bfloat16", "float32"])
def test_the_arithmetic_is_what_it_says(
    fixtures: dict[str, Fixture], made: Path, tmp_path: Path, name: str, kind: str
) -> None:
    base, adapter = fixtures[RUNS[name][0]], copied(made, name, tmp_path)
    randomise(adapter)
    path, given = place(base, kind), {"hf_config": base.hf}
    assert_same(path, expected_of(adapter, base.hf, 2.5), adapter=adapter, **given)
    scaled = expected_of(adapter, base.hf, -0.75)
    assert_same(path, scaled, adapter=f"{adapter}:-0.75", **given)
    assert_same(path, weights(base.hf), adapter=f"{adapter}:0", **given)


def per_expert(base: Path, directory: Path) -> Path:
    """An adapter of each expert, by the names that ms-swift and Megatron-Bridge give it; no module
    of transformers 5 is called so, but files and engines have them."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights(base).items():
        if ".mlp.experts." in name or name.endswith("mlp.gate.weight"):
            for side, shape in (("A", (4, weight.shape[1])), ("B", (weight.shape[0], 4))):
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"
                tensors[key] = torch.randn(shape, generator=generator).to(weight.dtype) * 0.1
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": "all"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@KINDS
def test_an_adapter_of_each_expert(fixtures: dict[str, Fixture], tmp_path: Path, kind: str) -> None:
    base = fixtures[MOE]
    adapter = per_expert(base.hf, tmp_path / "adapter")
    expected = expected_of(adapter, base.hf, 2.0)
    assert_same(place(base, kind), expected, adapter=adapter, hf_config=base.hf)


def test_dtype_rounds_what_was_merged(fixtures: dict[str, Fixture], made: Path) -> None:
    base = fixtures[F32]
    expected = {
        name: tensor.bfloat16() for name, tensor in weights(made / "float32" / "merged").items()
    }
    adapter = made / "float32/adapter"
    assert_same(base.root, expected, adapter=adapter, dtype="bfloat16", hf_config=base.hf)


def test_any_slice_has_the_bits_of_the_whole(fixtures: dict[str, Fixture], made: Path) -> None:
    expected = weights(made / "patterns" / "merged")
    with mcorefs.open(fixtures[BF16].hf, adapter=made / "patterns/adapter") as found:
        for name, tensor in expected.items():
            part = found.get_slice(name)[3:7]
            assert isinstance(part, torch.Tensor)
            assert torch.equal(part, tensor[3:7])


@KINDS
def test_base_and_adapter_by_url(fixtures: dict[str, Fixture], made: Path, kind: str) -> None:
    memory, base = fsspec.filesystem("memory"), fixtures[BF16]
    memory.put(str(place(base, kind)), f"/peft/{kind}", recursive=True)
    memory.put(str(made / "plain/adapter"), f"/peft/{kind}-lora", recursive=True)
    expected = weights(made / "plain/merged")
    path, adapter = f"memory://peft/{kind}", f"memory://peft/{kind}-lora"
    with mcorefs.open(path, adapter=adapter, hf_config=base.hf) as found:
        for name, tensor in expected.items():
            have = found.get_tensor(name)
            assert isinstance(have, torch.Tensor)
            assert torch.equal(have, tensor), name


# -- the files of a base model that is one for Hugging Face ----------------------------------------


def test_files_are_those_of_the_base_model(
    fixtures: dict[str, Fixture], made: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(fixtures[BF16].hf, tmp_path / "base"))
    shutil.copytree(fixtures[BF16].tokenizer, base, dirs_exist_ok=True)
    (base / "original").mkdir()
    left_out = [
        "adapter_config.json",
        "consolidated.safetensors",
        "model-Q8_0.gguf",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]
    for name in left_out:
        (base / name).write_text('{"weight_map": {}}')
    tree = open_tree(base, Options(adapter=made / "plain/adapter")).tree
    there = {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()}
    assert set(tree.files) == there - set(left_out)
    for name, file in tree.files.items():
        served, real = read_all(file), (base / name).read_bytes()
        if name.endswith(".safetensors"):
            header = 8 + int.from_bytes(real[:8], "little")
            assert served[:header] == real[:header]
            assert len(served) == len(real)
            (tmp_path / name).write_bytes(served)
        else:
            assert served == real
    assert_equal(weights(tmp_path), weights(made / "plain" / "merged"))
    remarks = open_tree(base, Options(adapter=made / "plain/adapter")).source.remarks
    assert f"left out, since the adapter is not in them: {', '.join(left_out)}" in remarks


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


# -- what cannot be merged -------------------------------------------------------------------------


def problems_of(path: Path, adapter: Path, **options: Any) -> str:
    with pytest.raises(MappingError) as caught:
        open_tree(path, Options(adapter=adapter, **options))
    return "\n".join(caught.value.problems)


@KINDS
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(fixtures: dict[str, Fixture], made: Path, name: str, kind: str) -> None:
    base = fixtures[RUNS[name][0]]
    found = problems_of(place(base, kind), made / name / "adapter", hf_config=base.hf)
    for problem in REFUSED[name]:
        assert problem in found


@KINDS
def test_an_adapter_of_another_model(fixtures: dict[str, Fixture], made: Path, kind: str) -> None:
    found = problems_of(place(fixtures[MOE], kind), made / "plain/adapter").split("\n")
    assert (
        "mlp.gate_proj.weight, which the base model does not hold (and 3 more like it)"
        in "".join(one for one in found if "gate_proj" in one)
    )
    found = problems_of(place(fixtures[F32], kind), copied_smaller(made)).split("\n")
    assert any("q_proj.weight does not fit: addmm of [(128, 64)" in one for one in found)


def copied_smaller(made: Path) -> Path:
    """An adapter whose B has a row less."""
    adapter = made / "smaller"
    if not adapter.exists():
        shutil.copytree(made / "plain/adapter", adapter)
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        cut = {n: t[1:].clone() if "lora_B" in n else t for n, t in tensors.items()}
        save_file(cut, file)
    return adapter


Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
Q = "base_model.model.model.layers.0.self_attn.q_proj."


@KINDS
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if k != f"{Q}lora_B.weight"}, "has only its A"),
        (lambda t: t | {f"{Q}lora_B.weight": t[f"{Q}lora_B.weight"].half()}, "A and B are"),
        (lambda t: t | {f"{Q}lora_A.weight": t[f"{Q}lora_A.weight"][0]}, "not consist of matrices"),
        (lambda t: t | {f"{Q}lora_A.weight": t[f"{Q}lora_A.weight"][:2]}, "its rank is 2"),
        (lambda t: t | {f"{Q}lora_B.bias": torch.ones(4)}, f"holds {Q}lora_B.bias, which is not"),
        (lambda t: t | {"model.x": torch.ones(4)}, "model.x, which does not begin with base_model"),
        (
            lambda t: t | {"base_model.model.lm_head.weight": torch.ones(4, 4)},
            "lm_head.weight, which was trained whole, does not fit: it has shape [4, 4]",
        ),
        (
            lambda t: t | {"base_model.model.score.weight": torch.ones(4, 4)},
            "the adapter changes score.weight, which the base model does not hold",
        ),
        (lambda t: {}, "holds no tensor of an adapter"),
    ],
)
def test_tensors_that_do_not_fit(
    fixtures: dict[str, Fixture], made: Path, tmp_path: Path, edit: Edit, said: str, kind: str
) -> None:
    adapter = copied(made, "plain", tmp_path)
    file = adapter / "adapter_model.safetensors"
    save_file({n: t.contiguous() for n, t in edit(load_file(file)).items()}, file)
    assert said in problems_of(place(fixtures[BF16], kind), adapter)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA': only LORA"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=[[0, 2]], which is not known"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"use_rslora": "false"}, "use_rslora='false', which is neither true nor false"),
        ({f"new_{n}": n for n in range(1, 31)}, "says 10 more things that are not known"),
        ({"something_new": 0.5}, "something_new=0.5, which is not known"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern=['q_proj']: no patterns"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern: q_proj: '8', no number"),
        ({"alpha_pattern": {"(a|b)*c": 8}}, "alpha_pattern: (a|b)*c: not simple enough"),
        ({"alpha_pattern": {"a.*b.*": 8}}, "alpha_pattern: a.*b.*: not simple enough"),
        ({"lora_alpha": None}, "alpha None over rank 8"),
        ({"r": 16}, "its rank is 8, adapter_config.json says 16"),
        ({"fan_in_fan_out": True}, "does not fit: addmm of"),
    ],
)
def test_settings_that_do_not_fit(
    fixtures: dict[str, Fixture],
    made: Path,
    tmp_path: Path,
    settings: dict[str, object],
    said: str,
) -> None:
    adapter = copied(made, "plain", tmp_path, **settings)
    assert said in problems_of(fixtures[BF16].hf, adapter)


@KINDS
def test_an_output_layer_that_is_the_embedding(
    fixtures: dict[str, Fixture], made: Path, tmp_path: Path, kind: str
) -> None:
    adapter = copied(made, "turned", tmp_path)
    file = adapter / "adapter_model.safetensors"
    words = load_file(fixtures[GPT2].hf / "model.safetensors")["transformer.wte.weight"]
    save_file(load_file(file) | {"base_model.model.transformer.wte.weight": words}, file)
    base = fixtures[GPT2]
    assert "the adapter changes transformer.wte.weight, but the output layer" in problems_of(
        place(base, kind), adapter, hf_config=base.hf
    )


def test_files_that_are_none(fixtures: dict[str, Fixture], made: Path, tmp_path: Path) -> None:
    base = fixtures[BF16].hf

    def refusal(adapter: Path, path: Path = base) -> str:
        with pytest.raises(CheckpointError) as caught:
            open_tree(path, Options(adapter=adapter))
        return str(caught.value)

    adapter = copied(made, "plain", tmp_path)
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    assert f"pass its base model ({base}) as CKPT, and --adapter {adapter}" in refusal(
        adapter, adapter
    )
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert "is not a valid safetensors file" in refusal(adapter)
    file.rename(adapter / "adapter_model.bin")
    assert "is a pickle, which is never opened" in refusal(adapter)
    (adapter / "adapter_model.bin").unlink()
    assert "holds adapter_config.json, but no adapter_model.safetensors" in refusal(adapter)
    config.write_text("[]")
    assert "describes no adapter" in refusal(adapter)
    config.write_text("{")
    assert "cannot be read" in refusal(adapter)
    config.unlink()
    assert "is not a Megatron checkpoint" in refusal(adapter)


def test_weights_optimizer(fixtures: dict[str, Fixture], made: Path) -> None:
    for kind in ("megatron", "huggingface"):
        with pytest.raises(CheckpointError, match="--weights"):
            open_tree(
                place(fixtures[BF16], kind),
                Options(adapter=made / "plain/adapter", weights="optimizer"),
            )


# -- the command line ------------------------------------------------------------------------------


@KINDS
def test_the_command_line(
    fixtures: dict[str, Fixture], made: Path, tmp_path: Path, kind: str
) -> None:
    path, adapter = place(fixtures[BF16], kind), made / "patterns/adapter"
    given = (path, "--adapter", adapter)
    said = mcorefs_said("inspect", *given)
    line = (
        "rank 2 and 4 and 8, alpha 12, scaled by the root of the rank, on down_proj, embed_tokens"
    )
    assert f"adapter  LoRA in {adapter}: {line}" in said
    assert "; lm_head trained whole\n" in said
    assert "verdict  whole; can be mounted" in said
    said = mcorefs_said("materialize", path, tmp_path / "out", "--adapter", adapter)
    assert_equal(weights(tmp_path / "out"), weights(made / "patterns/merged"))
    said = mcorefs_said("verify", path, made / "patterns/merged", "--adapter", adapter)
    assert "47 tensors equal, 0 different" in said
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    mcorefs_said("mount", path, mnt, "--adapter", adapter)
    try:
        assert_equal(weights(mnt), weights(made / "patterns/merged"))
    finally:
        mcorefs_said("umount", "--force", mnt)
