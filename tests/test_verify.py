"""`verify`: equal directories are equal, and each kind of difference is found and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcorefs.errors import CheckpointError
from mcorefs.model import Options, load
from mcorefs.reader import Reader
from mcorefs.storage import Storage
from mcorefs.verify import Verdict, verify
from tests.checkpoints import Fixture, ensure

NAME = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure(["qwen3-tp2"])["qwen3-tp2"]


@pytest.fixture
def directory(fixture: Fixture, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixture.hf, tmp_path / "hf"))


def compared(fixture: Fixture, directory: Path) -> Verdict:
    model = load(fixture.root, Options())
    reader = Reader(Storage(model.checkpoint.files), 1 << 20)
    return verify(model.tensors, model.config, reader, directory)


def shard_of(directory: Path, name: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / str(index["weight_map"][name])


def change(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    shard = shard_of(directory, name)
    tensors = load_file(shard)
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, shard, {"format": "pt"})


def test_equal(fixture: Fixture, directory: Path) -> None:
    verdict = compared(fixture, directory)
    assert verdict.differences == ()
    total = json.loads((directory / "model.safetensors.index.json").read_text())["metadata"]
    assert verdict.total_bytes == total["total_size"]
    assert len(load_file(shard_of(directory, NAME))) < verdict.equal


def test_one_bit(fixture: Fixture, directory: Path) -> None:
    shard = shard_of(directory, NAME)
    tensor = load_file(shard)[NAME]
    tensor.view(torch.int16)[5, 7] ^= 1
    tensor.view(torch.int16)[60, 3] ^= 1
    change(directory, NAME, tensor)
    (difference,) = compared(fixture, directory).differences
    assert difference.name == NAME
    assert difference.problem == "differs in 2 of 6,144 elements, first at [5, 7]"


def test_shape_dtype_and_names(fixture: Fixture, directory: Path) -> None:
    tensor = load_file(shard_of(directory, NAME))[NAME]
    change(directory, NAME, tensor.float())
    change(directory, "model.norm.weight", torch.ones(63, dtype=torch.bfloat16))
    change(directory, "lm_head.weight", None)
    extra = shard_of(directory, NAME)
    save_file({**load_file(extra), "model.extra": torch.ones(2)}, extra, {"format": "pt"})
    found = {d.name: d.problem for d in compared(fixture, directory).differences}
    assert found.keys() == {NAME, "model.norm.weight", "lm_head.weight", "model.extra"}
    assert "BF16 in the checkpoint, F32 there" in found[NAME]
    assert "shape [64] in the checkpoint, [63] there" in found["model.norm.weight"]
    assert "is not in /" in found["lm_head.weight"]
    assert found["model.extra"] == "is not in the checkpoint"


def test_config_is_told_but_does_not_decide(fixture: Fixture, directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["rms_norm_eps"] = 1e-5
    (directory / "config.json").write_text(json.dumps(config))
    verdict = compared(fixture, directory)
    assert verdict.differences == ()
    assert "rms_norm_eps" in {d.name for d in verdict.config}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a valid safetensors file"),
        (b"\xff" * 64, "not a valid safetensors file"),
        (b"\x02\0\0\0\0\0\0\0{}trailing", "not a valid safetensors file"),
    ],
)
def test_damaged_files(fixture: Fixture, directory: Path, content: bytes, message: str) -> None:
    shard_of(directory, NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        compared(fixture, directory)


def test_damaged_directories(fixture: Fixture, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors file"):
        compared(fixture, tmp_path)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="not a plain name"):
        compared(fixture, directory)
    for text in ("[]", "{}", "{", '{"weight_map": []}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="cannot be read"):
            compared(fixture, directory)
