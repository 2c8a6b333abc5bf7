"""Directories that need no conversion: the same files, or a refusal that says what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mcorefs
from mcorefs.errors import CheckpointError, McorefsError, NoWeightsError, ReadFault
from mcorefs.files import VirtualFile, read_all
from mcorefs.inspection import inspect
from mcorefs.locate import TRACKER
from mcorefs.materialize import materialize
from mcorefs.model import Options
from mcorefs.passthrough import SMALL, Passthrough
from mcorefs.tree import Opened, open_tree
from tests.checkpoints import Fixture, ensure
from tests.edited import edit_metadata

NAME = "qwen3-tp2"  # save_pretrained split it into many files


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure([NAME])[NAME]


@pytest.fixture
def directory(fixture: Fixture, tmp_path: Path) -> Path:
    hf = Path(shutil.copytree(fixture.hf, tmp_path / "hf"))
    shutil.copytree(fixture.tokenizer, hf, dirs_exist_ok=True)
    return hf


def opened(path: Path, **options: Any) -> Opened:
    found = open_tree(path, Options(**options))
    assert isinstance(found.source, Passthrough)
    return found


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def read(files: dict[str, VirtualFile]) -> dict[str, bytes]:
    return {name: read_all(file) for name, file in files.items()}


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_tree(path, Options(**options))
    return str(caught.value)


def index_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "model.safetensors.index.json").read_text())
    return found


# -- the same files -------------------------------------------------------------------------------


def test_every_byte_of_every_file(directory: Path, tmp_path: Path) -> None:
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/tool.jinja").write_text("{{ tools }}")
    (directory / "modeling_custom.py").write_text("raise SystemExit")
    (directory / "empty.txt").touch()
    (directory / "large.json").write_bytes(os.urandom(SMALL + 1))
    expected = contents(directory)
    (directory / ".git").mkdir()
    (directory / ".git/config").write_text("")
    (directory / ".cache.json").write_text("")
    tree = opened(directory).tree
    assert read(dict(tree.files)) == expected
    whole = expected["large.json"]
    for start, count in ((0, 0), (0, 1), (SMALL, 1), (4096, 70_000)):
        out = bytearray(count)
        tree.files["large.json"].read_into(start, memoryview(out))
        assert out == whole[start : start + count]
    materialize(tree, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_it_can_be_opened_in_python(directory: Path) -> None:
    with mcorefs.open(directory) as found:
        assert set(found.keys()) == set(index_of(directory)["weight_map"])
        for name, file in index_of(directory)["weight_map"].items():
            with safe_open(directory / file, framework="pt") as real:
                assert torch.equal(found.get_tensor(name), real.get_tensor(name))  # type: ignore[arg-type]
        assert found.config["model_type"] == "qwen3"


def test_a_file_in_the_hubs_cache_is_a_link(directory: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name/snapshots/abc"
    shutil.copytree(directory, snapshot)
    (snapshot.parents[1] / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = snapshot.parents[1] / f"blobs/{number}"
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    assert read(dict(opened(snapshot).tree.files)) == contents(directory)


def test_of_a_run_only_the_models_own_files(directory: Path) -> None:
    """ms-swift's checkpoint-N: tracker file, iteration and safetensors in one directory."""
    expected = contents(directory)
    (directory / TRACKER).write_text("5")
    (directory / "iter_0000005").mkdir()
    (directory / "iter_0000005/common.pt").write_bytes(pickle.dumps(Bomb()))
    found = opened(directory)
    assert read(dict(found.tree.files)) == expected
    assert found.source.location.iteration == 5


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/mcorefs-was-here",)


def test_pickled_weights_are_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    weights = tmp_path / "pytorch_model-00001-of-00001.bin"
    assert f"{weights}: No such file" in refusal_of_missing(tmp_path)
    weights.write_bytes(pickle.dumps(Bomb()))
    found = opened(tmp_path)
    assert read(dict(found.tree.files)) == contents(tmp_path)
    assert found.source.tensors == ()
    assert found.source.architecture == "bert"
    assert not Path("/tmp/mcorefs-was-here").exists()
    with mcorefs.open(tmp_path) as checkpoint:
        assert checkpoint.keys() == []


def refusal_of_missing(directory: Path) -> str:
    """With other pickled weights there, so that it is a model directory at all."""
    other = directory / "pytorch_model.bin"
    other.touch()
    message = refusal(directory)
    other.unlink()
    return message


def test_a_dtype_that_is_not_known_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = {"a": torch.zeros(4, dtype=torch.float8_e8m0fnu), "b": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = opened(tmp_path)
    assert read(dict(found.tree.files)) == contents(tmp_path)
    assert [tensor.name for tensor in found.source.tensors] == ["b"]
    assert inspect(tmp_path, Options()).skipped == {"of an unknown dtype": 1}


# -- what is refused ------------------------------------------------------------------------------


def test_everything_wrong_is_told_at_once(directory: Path) -> None:
    files = sorted(directory.glob("model-*.safetensors"))
    os.truncate(files[0], files[0].stat().st_size - 1)
    with files[1].open("ab") as file:
        file.write(b"\0")
    files[2].unlink()
    files[3].write_bytes(b"\xff" * 100)
    tensors = load_file(files[4])
    gone = sorted(tensors)[0]
    tensors["model.extra"] = tensors.pop(gone)
    save_file(tensors, files[4])
    message = refusal(directory)
    for damaged in (files[0], files[1], files[3]):
        assert f"{damaged} is not a valid safetensors file" in message
    assert f"{files[2]}: No such file" in message
    assert f"{files[4]} does not hold {gone}, which" in message
    found = inspect(directory, Options())
    assert len(found.problems) == 1
    assert "does not hold" in found.problems[0]


def test_a_tensor_in_two_files(directory: Path) -> None:
    (directory / "model.safetensors.index.json").unlink()
    shutil.copy(sorted(directory.glob("*.safetensors"))[0], directory / "copy.safetensors")
    assert "and in another file" in refusal(directory)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a\0b", "", ".."])
def test_an_index_that_leads_elsewhere(directory: Path, name: str) -> None:
    index = index_of(directory)
    index["weight_map"]["x"] = name
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not a plain name" in refusal(directory)


def test_links_that_lead_elsewhere(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (directory / "notes.txt").symlink_to(tmp_path / "secret")
    (directory / "more").symlink_to(tmp_path)
    os.mkfifo(directory / "fifo")
    (directory / "same.json").symlink_to("config.json")
    weights = sorted(directory.glob("*.safetensors"))[0]
    shutil.move(weights, tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    message = refusal(directory)
    assert f"{directory}/notes.txt is a symbolic link to {tmp_path}/secret" in message
    assert f"{directory}/more is a symbolic link to a directory" in message
    assert f"{directory}/fifo: is not a regular file" in message
    assert f"{weights} is a symbolic link to {tmp_path}/weights" in message
    assert "same.json" not in message


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_config_that_is_none(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    assert f"{directory}/config.json" in refusal(directory)


def test_a_file_that_is_replaced_under_it(directory: Path) -> None:
    found = opened(directory)
    name = next(name for name in found.tree.files if name.endswith(".safetensors"))
    data = (directory / name).read_bytes()
    assert read_all(found.tree.files[name]) == data
    found = opened(directory)
    (directory / name).unlink()
    (directory / name).write_bytes(data)
    with pytest.raises(ReadFault, match="was replaced after the checkpoint was opened"):
        read_all(found.tree.files[name])


def test_options_that_would_need_other_bytes(directory: Path) -> None:
    message = refusal(
        directory, dtype="float16", vocab_size=3, tokenizer=directory, weights="optimizer"
    )
    for name in ("--dtype", "--vocab-size", "--tokenizer", "--weights"):
        assert f"{name} cannot be given" in message
    found = opened(directory, hf_config=directory, family="qwen3", require_tokenizer=True)
    assert {"--hf-config is not used", "--family is not used"} <= set(found.source.remarks)
    assert found.source.tokenizer.found
    (directory / "tokenizer.json").unlink()
    assert f"--require-tokenizer: none found in {directory}" in refusal(
        directory, require_tokenizer=True
    )


# -- weights that the trainer saved elsewhere -----------------------------------------------------


def only_optimizer(root: Path) -> Path:
    """A real sharded checkpoint of an optimizer, as verl's layout 1 has it beside `huggingface`."""
    source = ensure(["qwen3-tp2-dp2-fully-parallel"])["qwen3-tp2-dp2-fully-parallel"]
    shutil.copytree(source.iteration, root)

    def edit(metadata: Any) -> None:
        kept = metadata.state_dict_metadata.items()
        metadata.state_dict_metadata = {k: v for k, v in kept if k.startswith("optimizer")}

    edit_metadata(root, edit)
    return root


def test_sharded_state_without_weights(directory: Path, tmp_path: Path) -> None:
    actor = tmp_path / "global_step_5/actor"
    sharded = only_optimizer(actor / "dist_ckpt")
    with pytest.raises(NoWeightsError, match="holds no model weights"):
        open_tree(actor, Options())
    assert "holds no model weights" in inspect(actor, Options()).problems[0]
    beside = Path(shutil.copytree(directory, actor / "huggingface"))
    for path in (tmp_path, actor.parent, actor, sharded, beside):
        found = opened(path)
        assert read(dict(found.tree.files)) == contents(directory)
        told = inspect(path, Options())
        assert (told.path, told.format, told.problems) == (str(beside), "huggingface", ())
        assert told.iteration == 5
        if path != beside:
            assert f"{sharded} holds no weights; the trainer saved them in {beside}" in told.remarks
    sorted(beside.glob("*.safetensors"))[0].unlink()
    with pytest.raises(McorefsError, match="No such file"):
        open_tree(actor, Options())
