"""`--weights optimizer`: the main parameters, which differ from the weights in what rounding took.

test_roundtrip holds them, fixture by fixture, against the fp32 oracle; here is the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mcorefs
from mcorefs.errors import CheckpointError
from mcorefs.inspection import inspect
from mcorefs.model import Model, Options, load
from tests.checkpoints import SPECS, Fixture, ensure
from tests.edited import copy, edit_metadata, rename
from tests.test_cli import mcorefs as command
from tests.test_roundtrip import NAMES, same_bits, served, tensors

BESIDE = [name for name in NAMES if SPECS[name].oracle_weights == "optimizer"]
MAIN = "optimizer.state.fp32_param."


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure(
        [
            *BESIDE,
            "qwen3",
            "qwen3-pp2-uneven",
            "qwen3-dp2-dp-zero",
            "qwen3_moe-tp2-ep2-dp-reshardable",
            "torch-qwen3-tp2",
            "dcp-qwen3-dp2",
            "fsdp-qwen3-dp2",
            "fsdp-qwen3-tp2-dp2",
        ]
    )


def opened(root: Path) -> Model:
    return load(root, Options(vocab_size=307, weights="optimizer"))


def refusal(root: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(root)
    return str(caught.value)


def tensor(root: Path, name: str) -> Tensor:
    with mcorefs.open(root, vocab_size=307, weights="optimizer") as checkpoint:
        found = checkpoint.get_tensor(name)
        assert isinstance(found, Tensor)
        return found


@pytest.mark.parametrize("name", BESIDE)
def test_the_weights_of_the_model_are_the_roundings(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    fixture = fixtures[name]
    options = Options(vocab_size=fixture.spec.vocab_size)
    assert load(fixture.root, options).config["dtype"] == "bfloat16"
    found, expected = served(fixture, options, tmp_path), tensors(fixture.hf)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert not torch.equal(value, value.bfloat16().float())
        assert same_bits(found[key], value.bfloat16()), key


def test_main_parameters_are_float32_unless_asked_otherwise(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["qwen3-tp2-main-params"]
    model = opened(fixture.root)
    assert model.config["dtype"] == "float32"
    assert not any("main parameter" in remark for remark in model.remarks)
    assert {tensor.dtype.name for tensor in model.tensors} == {"F32"}
    options = Options(vocab_size=307, weights="optimizer", dtype="bfloat16")
    found = served(fixture, options, tmp_path)
    expected = tensors(fixture.hf)
    assert all(same_bits(found[key], value.bfloat16()) for key, value in expected.items())


@pytest.mark.parametrize("name", ["fsdp-qwen3-dp2", "qwen3-pp2-uneven"])
def test_float32_weights_are_their_own_main_parameters(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    fixture = fixtures[name]
    options = Options(vocab_size=307, weights="optimizer")
    found, expected = served(fixture, options, tmp_path), tensors(fixture.hf)
    assert set(found) == set(expected)
    assert all(same_bits(found[key], value) for key, value in expected.items())


def test_parameters_that_were_not_trained(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """They have no main parameter: the model's own are widened, or stay what they are."""
    fixture = fixtures["qwen3_moe-ep2-main-params"]
    frozen = {
        f"{MAIN}decoder.final_layernorm.weight": "model.norm.weight",
        f"{MAIN}decoder.layers.2.mlp.router.weight": "model.layers.2.mlp.gate.weight",
    }

    def freeze(metadata: Any) -> None:
        for fqn in frozen:
            del metadata.state_dict_metadata[fqn]

    iteration = copy(fixture, tmp_path)
    edit_metadata(iteration, freeze)
    (remark,) = [said for said in opened(iteration).remarks if "main parameter" in said]
    assert "no main parameter for 2 tensors (decoder." in remark
    expected = tensors(fixture.hf)
    norm, router = frozen.values()
    assert same_bits(tensor(iteration, norm), expected[norm].bfloat16().float())
    assert same_bits(tensor(iteration, router), expected[router].bfloat16())
    other = "model.layers.1.mlp.gate.weight"
    assert same_bits(tensor(iteration, other), expected[other])


@pytest.mark.parametrize("prefix", ["chained_0.", "chained_1.chained_0."])
def test_prefixes_of_chained_optimizers(
    fixtures: Mapping[str, Fixture], prefix: str, tmp_path: Path
) -> None:
    fixture = fixtures["qwen3-tp2-main-params"]
    iteration = copy(fixture, tmp_path)
    rename(iteration, lambda fqn: prefix + fqn if fqn.startswith("optimizer.") else fqn)
    name = "model.layers.3.mlp.up_proj.weight"
    assert same_bits(tensor(iteration, name), tensors(fixture.hf)[name])


def test_names_of_checkpoints_converted_to_fsdp_dtensor(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """Megatron-LM:tools/checkpoint/checkpoint_inspector.py, convert-torch-dist-to-fsdp-dtensor."""
    fixture = fixtures["qwen3_moe-ep2-main-params"]
    iteration = copy(fixture, tmp_path)
    (iteration / "metadata.json").unlink()

    def converted(fqn: str) -> str:
        if not fqn.startswith("optimizer.state."):
            return f"model.module.{fqn}"
        _, _, kind, name = fqn.split(".", 3)
        return f"optimizer.state.module.module.module.{name}.{kind}"

    def without_objects(metadata: Any) -> None:
        entries = metadata.state_dict_metadata
        for fqn in [fqn for fqn in entries if "/shard_" in fqn]:
            del entries[fqn]

    edit_metadata(iteration, without_objects)
    rename(iteration, converted)
    model = load(iteration, Options(vocab_size=301, weights="optimizer"))
    assert model.checkpoint.format == "fsdp_dtensor"
    with mcorefs.open(iteration, vocab_size=301, weights="optimizer") as checkpoint:
        for name, value in tensors(fixture.hf).items():
            found = checkpoint.get_tensor(name)
            assert isinstance(found, Tensor)
            assert same_bits(found, value)


# -- what cannot be read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("qwen3", "not there: the run saved no optimizer"),
        ("qwen3-dp2-dp-zero", "dp_zero_gather_scatter"),
        ("qwen3_moe-tp2-ep2-dp-reshardable", "dp_reshardable or fully_sharded_bucket_space"),
        ("torch-qwen3-tp2", "by number, in buffers of each rank"),
        ("dcp-qwen3-dp2", "keeps none under the names of the model"),
        ("fsdp-qwen3-tp2-dp2", "not there: the run saved no optimizer"),
    ],
)
def test_main_parameters_that_cannot_be_read(
    fixtures: Mapping[str, Fixture], name: str, how: str
) -> None:
    text = refusal(fixtures[name].root)
    assert how in text
    assert "--weights model serves the model's own weights" in text
    found = inspect(fixtures[name].root, Options(weights="optimizer"))
    assert how in "".join(found.problems)


def test_numbered_main_parameters(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """Float16OptimizerWithFloat16Params under FSDP2 saves lists, not a sharded state."""
    iteration = copy(fixtures["dcp-qwen3-dp2"], tmp_path)
    numbers = iter(range(1000))

    def numbered(fqn: str) -> str:
        if not fqn.startswith("optimizer."):
            return fqn
        return f"optimizer.fp32_from_fp16_params.0.{next(numbers)}"

    rename(iteration, numbered)
    assert "numbered instead of named (fp32_from_fp16_params)" in refusal(iteration)


def test_flattened_main_parameters(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """fully_sharded_model_space up to megatron-core 0.15: [..., all elements of a rank's part]."""
    iteration = copy(fixtures["qwen3-tp2-main-params"], tmp_path)
    fqn = f"{MAIN}decoder.layers.self_attention.linear_proj.weight"

    def flatten(metadata: Any) -> None:
        metadata.state_dict_metadata[fqn].size = torch.Size([4, 1, 2, 64 * 64])

    edit_metadata(iteration, flatten)
    text = refusal(iteration)
    assert f"(fully_sharded_model_space): {fqn} is float32 [4, 1, 2, 4096] but" in text
    assert "tensor [4, 64, 128]" in text
    load(iteration, Options())


def test_half_precision_main_parameters(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    iteration = copy(fixtures["qwen3-tp2-main-params"], tmp_path)

    def halve(metadata: Any) -> None:
        for fqn, entry in metadata.state_dict_metadata.items():
            if fqn.startswith(MAIN):
                entry.properties.dtype = torch.float16

    edit_metadata(iteration, halve)
    assert "is float16" in refusal(iteration)


def test_on_the_command_line(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["qwen3-tp2-dp2-reshardable"]
    arguments = (fixture.root, "--vocab-size", 307, "--weights")
    assert "F32 47" in command("inspect", *arguments, "optimizer")
    assert "BF16 47" in command("inspect", *arguments, "model")
    command("materialize", fixture.root, tmp_path / "out", *arguments[1:], "optimizer")
    expected = (fixture.hf / "model.safetensors").read_bytes()
    assert (tmp_path / "out/model.safetensors").read_bytes() == expected
    verified = (fixture.root, fixture.hf, *arguments[1:])
    assert "0 different" in command("verify", *verified, "optimizer")
    assert "0 tensors equal, 47 different" in command("verify", *verified, "model", status=1)
    text = command("inspect", *arguments, "both", status=1)
    assert "--weights both: expected one of model, optimizer" in text
