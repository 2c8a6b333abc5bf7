"""Every fixture, through the whole of mcorefs, against what `save_pretrained` wrote of the model it
was made from: the same files, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mcorefs.files import VirtualFile, read_all
from mcorefs.model import Options, load
from mcorefs.tree import build
from tests.checkpoints import SPECS, Fixture, ensure
from tests.checkpoints.families import family_to_name

CACHE = 1 << 20
NAMES = [name for name, spec in SPECS.items() if spec.is_whole]


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure(NAMES)


def options(fixture: Fixture, dtype: str | None = None) -> Options:
    """What the user must add to what this checkpoint records, and no more."""
    weights = fixture.spec.oracle_weights
    if fixture.spec.needs_reference:
        return Options(hf_config=fixture.hf, dtype=dtype, weights=weights)
    recorded = fixture.spec.vocab_size_in_args
    vocab_size = None if recorded else fixture.spec.vocab_size
    family = family_to_name(fixture.spec)
    return Options(vocab_size=vocab_size, dtype=dtype, weights=weights, family=family)


def files(fixture: Fixture, shard_size: int | str, opts: Options) -> Mapping[str, VirtualFile]:
    tree, _ = build(load(fixture.root, opts), shard_size, CACHE)
    return tree.files


def weights(names: Mapping[str, object] | list[str]) -> set[str]:
    return {name for name in names if name.startswith("model")}


def assert_same_files(virtual: Mapping[str, VirtualFile], oracle: Path) -> None:
    expected = {path.name: path.read_bytes() for path in oracle.iterdir()}
    assert weights(virtual) == weights(expected)
    if index := expected.get("model.safetensors.index.json"):
        served = read_all(virtual["model.safetensors.index.json"])
        assert json.loads(served) == json.loads(index)
        assert served == index
    different = [name for name in weights(expected) if read_all(virtual[name]) != expected[name]]
    assert not different


def tensors(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def served(fixture: Fixture, opts: Options, directory: Path) -> dict[str, Tensor]:
    """The tensors that the safetensors library finds in the files of the tree."""
    for name, file in files(fixture, "40KB", opts).items():
        if name.endswith(".safetensors"):
            (directory / name).write_bytes(read_all(file))
    return tensors(directory)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_those_of_save_pretrained(fixtures: Mapping[str, Fixture], name: str) -> None:
    fixture = fixtures[name]
    size = fixture.spec.hf_max_shard_size or "50GB"
    assert_same_files(files(fixture, size, options(fixture)), fixture.hf)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_those_of_the_model(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    fixture = fixtures[name]
    expected = tensors(fixture.hf)
    found = served(fixture, options(fixture), tmp_path)
    assert set(found) == set(expected)
    wrong = [name for name, tensor in expected.items() if not same_bits(found[name], tensor)]
    assert not wrong


@pytest.mark.parametrize("size", [1, "9KB", "36KB", "37KB", "100KB", 200_000, "1MB"])
@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_moe-fp32-router", "qwen3_moe-mixed-pp2", "qwen3-tp2-pp2-tied"]
)
def test_files_are_split_as_by_save_pretrained(
    fixtures: Mapping[str, Fixture], name: str, size: int | str, tmp_path: Path
) -> None:
    from tests.checkpoints.hf import build_model

    fixture = fixtures[name]
    build_model(fixture.spec).save_pretrained(tmp_path, max_shard_size=size)
    assert_same_files(files(fixture, size, options(fixture)), tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "name",
    [
        "qwen3",
        "qwen3-cp2-fp16",
        "qwen3-pp2-uneven",  # fp32
        "qwen3_moe-fp32-router",
        "qwen3_moe-tp2-ep2-singleton",  # fp32
        "glm4_moe-tp2-ep2",  # fp32 expert biases
    ],
)
def test_dtype_casts_as_torch_does(
    fixtures: Mapping[str, Fixture], name: str, dtype: str, tmp_path: Path
) -> None:
    fixture = fixtures[name]
    found = served(fixture, options(fixture, dtype), tmp_path)
    for key, tensor in tensors(fixture.hf).items():
        keeps = key.endswith((".gate.weight", ".gate.e_score_correction_bias"))
        expected = tensor if keeps else tensor.to(getattr(torch, dtype))
        assert same_bits(found[key], expected), key


def test_the_router_stays_in_fp32(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    found = served(fixtures["qwen3_moe-fp32-router"], Options(vocab_size=301), tmp_path)
    dtypes = {name: tensor.dtype for name, tensor in found.items()}
    routers = {name for name in dtypes if name.endswith(".mlp.gate.weight")}
    assert len(routers) == 4
    assert {dtypes[name] for name in routers} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in routers} == {torch.bfloat16}


def test_without_a_known_vocabulary_the_padding_is_kept_and_said(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    from tests.checkpoints import PADDING_VALUE

    fixture = fixtures["qwen3"]
    model = load(fixture.root, Options())
    assert model.config["vocab_size"] == fixture.spec.padded_vocab_size == 384
    assert any("padding included" in remark for remark in model.remarks)
    found, expected = served(fixture, Options(), tmp_path), tensors(fixture.hf)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name][:307], expected[name])
        padding = torch.full((77, 64), PADDING_VALUE, dtype=torch.bfloat16)
        assert torch.equal(found[name][307:], padding)


def test_the_iteration_directory_gives_the_same_tree_as_its_root(
    fixtures: Mapping[str, Fixture],
) -> None:
    fixture = fixtures["qwen3-per-layer"]
    assert fixture.iteration.name == "release"
    for path in (fixture.root, fixture.iteration):
        tree, _ = build(load(path, options(fixture)), "50GB", CACHE)
        assert_same_files(tree.files, fixture.hf)
