"""Formats `fsdp_dtensor` and `torch_dcp`.

test_roundtrip holds every fixture, as it is, against what save_pretrained wrote; here is what
changes, and what cannot be read.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from mcorefs.errors import CheckpointError
from mcorefs.files import read_all
from mcorefs.formats import Checkpoint, detect
from mcorefs.inspection import inspect
from mcorefs.model import Options, load
from mcorefs.tree import build
from tests.checkpoints import SPECS, Fixture, ensure
from tests.edited import copy, edit_metadata, rename
from tests.test_roundtrip import same_bits, tensors

NAMES = [name for name, spec in SPECS.items() if spec.format in ("fsdp_dtensor", "torch_dcp")]
FUSED = "fsdp-qwen3-tp2-dp2-fused"

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure([*NAMES, "qwen3-tp2", "qwen3-per-layer", "torch-qwen3"])


def index(iteration: Path) -> Checkpoint:
    format_ = detect(iteration)
    assert format_ is not None
    return format_.index(iteration)


def refusal(iteration: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        index(iteration)
    return str(caught.value)


def weights(fixture: Fixture, path: Path, dtype: str | None = None) -> dict[str, bytes]:
    reference = fixture.hf if fixture.spec.common == "no_args" else None
    options = Options(vocab_size=fixture.spec.vocab_size, hf_config=reference, dtype=dtype)
    tree, _ = build(load(path, options), "50GB", 1 << 20)
    return {name: read_all(f) for name, f in tree.files.items() if name.endswith(".safetensors")}


def oracle(fixture: Fixture) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in fixture.hf.glob("*.safetensors")}


def with_args(path: Path, /, **args: object) -> Path:
    """`path` with other training args: a common.pt beside .metadata, as NeMo leaves it."""
    torch.save({"args": Namespace(**args)}, path / "common.pt")
    return path


def saved_again(iteration: Path, without: Callable[[str], bool] = lambda fqn: False) -> Path:
    """A copy that torch wrote after reading `iteration` whole, in one process."""
    reader = FileSystemReader(iteration)
    state = {
        fqn: torch.empty(entry.size, dtype=entry.properties.dtype)
        for fqn, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not without(fqn)
    }
    dcp_load(state, storage_reader=reader, no_dist=True)
    other = iteration.with_name("iter_0000777")
    dcp_save(state, storage_writer=FileSystemWriter(other), no_dist=True)
    return other


# -- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if SPECS[name].is_whole])
def test_an_index_of_a_real_checkpoint(fixtures: Mapping[str, Fixture], name: str) -> None:
    fixture = fixtures[name]
    checkpoint = index(fixture.iteration)
    assert checkpoint.format == fixture.spec.format == inspect(fixture.root, Options()).format
    metadata = FileSystemReader(fixture.iteration).read_metadata().state_dict_metadata
    expected = {
        fqn: (str(entry.properties.dtype), tuple(entry.size))
        for fqn, entry in metadata.items()
        if fqn.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    assert {
        fqn: (f"torch.{tensor.dtype.torch}", tensor.shape)
        for fqn, tensor in checkpoint.tensors.items()
    } == expected
    optimizer = sum(fqn.startswith("optimizer.") for fqn in metadata)
    extra = sum(fqn.endswith("_extra_state") for fqn in metadata)
    assert checkpoint.skipped.get("optimizer", 0) == optimizer
    assert (optimizer > 0) == fixture.spec.optimizer_entries
    assert checkpoint.skipped.get("_extra_state", 0) == extra
    assert (extra > 0) == (fixture.spec.format == "torch_dcp")
    if fixture.spec.common == "no_args":
        assert checkpoint.args == {}
        assert "neither an entry 'args' nor common.pt" in checkpoint.args_source
    else:
        assert checkpoint.args["num_layers"] == fixture.spec.layers
        assert checkpoint.args["params_dtype"] == "bfloat16"
        assert checkpoint.args_source.startswith("'args' in ")


def test_the_fixtures_hold_what_makes_them_hard(fixtures: Mapping[str, Fixture]) -> None:
    def chunks(name: str, fqn: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        metadata = FileSystemReader(fixtures[name].iteration).read_metadata()
        found = metadata.state_dict_metadata[fqn].chunks  # type: ignore[union-attr]
        return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in found]

    qkv = "model.module.decoder.layers.0.self_attention.linear_qkv.weight"
    assert chunks("fsdp-qwen3-tp2-dp2", qkv) == [
        ((0, 0), (107, 64)),
        ((128, 0), (107, 64)),
        ((107, 0), (21, 64)),
        ((235, 0), (21, 64)),
    ]
    assert chunks("dcp-qwen3_moe-dp3", "model.decoder.layers.0.mlp.router.weight") == [
        ((0, 0), (2, 64)),
        ((2, 0), (2, 64)),
        ((4, 0), (0, 64)),
    ]


@pytest.mark.parametrize("wrapper", ["", "model.", "module.", "model.module.module.module."])
@pytest.mark.parametrize("name", ["fsdp-qwen3-dp2", "fsdp-qwen3_moe-ep2-dp4", "dcp-qwen3-dp3"])
def test_wrappers_of_any_depth(
    fixtures: Mapping[str, Fixture], name: str, wrapper: str, tmp_path: Path
) -> None:
    iteration = copy(fixtures[name], tmp_path)
    kept = "model.module." if name.startswith("fsdp") else "model."

    def rewrapped(fqn: str) -> str:
        return wrapper + fqn.removeprefix(kept) if fqn.startswith(kept) else fqn

    rename(iteration, rewrapped)
    assert weights(fixtures[name], iteration) == oracle(fixtures[name])


def test_main_weights_are_said_to_be_fp32_and_can_be_rounded(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """What a Megatron-FSDP run in bf16 computed with are the roundings of what it saved."""
    fixture = fixtures["fsdp-qwen3-dp2"]
    model = load(fixture.root, Options())
    assert model.config["dtype"] == "float32"
    assert any("--dtype bfloat16" in remark for remark in model.remarks)
    asked = load(fixture.root, Options(dtype="bfloat16"))
    assert not any("--dtype bfloat16" in remark for remark in asked.remarks)
    (content,) = weights(fixture, fixture.root, "bfloat16").values()
    (tmp_path / "model.safetensors").write_bytes(content)
    found, expected = tensors(tmp_path), tensors(fixture.hf)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert not torch.equal(tensor, tensor.bfloat16().float())
        assert same_bits(found[name], tensor.bfloat16())
    same = load(fixtures["fsdp-qwen3-tp2-dp2"].root, Options())
    assert same.config["dtype"] == "bfloat16"
    assert not any("--dtype" in remark for remark in same.remarks)


def test_a_metadata_json_may_name_the_format(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """Megatron-LM:tools/checkpoint/dist_checkpoint_io.py writes one, and a common.pt."""
    fixture = fixtures["fsdp-qwen3-tp2-dp2"]
    iteration = copy(fixture, tmp_path)
    args = index(iteration).args
    described = {"sharded_backend": "fsdp_dtensor", "sharded_backend_version": 1}
    (iteration / "metadata.json").write_text(json.dumps(described))
    checkpoint = index(with_args(iteration, **args))
    assert checkpoint.format == "fsdp_dtensor"
    assert checkpoint.args_source == str(iteration / "common.pt")
    assert weights(fixture, iteration) == oracle(fixture)
    (iteration / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert detect(iteration) is None


@pytest.mark.parametrize("name", ["fsdp-qwen3_moe-ep2-dp4", "dcp-qwen3_moe-dp2"])
def test_what_was_saved_again_in_one_piece(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    iteration = copy(fixtures[name], tmp_path)
    args = index(iteration).args
    other = saved_again(iteration, lambda fqn: not fqn.startswith("model."))
    assert weights(fixtures[name], with_args(other, **args)) == oracle(fixtures[name])


# -- how linear_fc1 is cut ------------------------------------------------------------------------


def test_linear_fc1_by_rank_where_the_args_say_so_too(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures[FUSED]
    iteration = with_args(copy(fixture, tmp_path), tensor_model_parallel_size=2)
    fc1 = "model.module.decoder.layers.{}.mlp.linear_fc1.weight"
    assert index(iteration).fc1_ranks == {fc1.format(layer): 2 for layer in range(4)}
    for name in NAMES:
        if SPECS[name].is_whole and name != FUSED:
            assert index(fixtures[name].iteration).fc1_ranks == {}


@pytest.mark.parametrize("tp", [1, 4])
def test_linear_fc1_whose_cut_contradicts_the_args(
    fixtures: Mapping[str, Fixture], tp: int, tmp_path: Path
) -> None:
    iteration = copy(fixtures[FUSED], tmp_path)
    text = refusal(with_args(iteration, tensor_model_parallel_size=tp))
    assert "cannot be told: model.module.decoder.layers." in text
    assert f"cut in 2, {tp} expected) and 3 more like it" in text


def test_linear_fc1_that_was_put_together_after_training(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """Nothing shows any more whether the rows still are in the order of the ranks."""
    other = saved_again(copy(fixtures[FUSED], tmp_path))
    assert "its linear_fc2 is cut in 1, 2 expected" in refusal(
        with_args(other, tensor_model_parallel_size=2)
    )
    assert index(with_args(other, tensor_model_parallel_size=1)).fc1_ranks == {}


def test_expert_tensor_parallelism_decides_for_experts(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    iteration = copy(fixtures["dcp-qwen3_moe-dp2"], tmp_path)
    args = {**index(iteration).args, "tensor_model_parallel_size": 2}
    assert "linear_fc2 is cut in 1, 2 expected" in refusal(
        with_args(iteration, **{**args, "expert_tensor_parallel_size": None})
    )
    index(with_args(iteration, **{**args, "expert_tensor_parallel_size": 1}))


# -- what cannot be read --------------------------------------------------------------------------


def test_tensor_parallel_ranks_of_torch_dcp_overwrite_each_other(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["dcp-qwen3-tp2-dp2"]
    entry = (
        FileSystemReader(fixture.iteration)
        .read_metadata()
        .state_dict_metadata["model.embedding.word_embeddings.weight"]
    )
    rows = fixture.spec.padded_vocab_size
    assert tuple(entry.size) == (rows // 2, 64)  # type: ignore[union-attr]
    text = refusal(fixture.iteration)
    assert "tensor_model_parallel_size 2" in text
    assert "this checkpoint does not hold the whole model" in text
    assert "cannot be told" not in text


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("fsdp-qwen3-dp2", "pipeline_model_parallel_size"),
        ("dcp-qwen3-dp2", "pipeline_model_parallel_size"),
        ("dcp-qwen3_moe-dp2", "expert_model_parallel_size"),
    ],
)
def test_other_ranks_that_overwrite_each_other(
    fixtures: Mapping[str, Fixture], name: str, size: str, tmp_path: Path
) -> None:
    iteration = copy(fixtures[name], tmp_path)
    args = {**index(iteration).args, size: 2}
    assert f"the run had {size} 2: every" in refusal(with_args(iteration, **args))


@pytest.mark.parametrize("name", ["qwen3-tp2", "qwen3-per-layer"])
def test_torch_dist_without_its_metadata_json_is_unfinished(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    iteration = copy(fixtures[name], tmp_path)
    (iteration / "metadata.json").unlink()
    assert "torch_dist format but has no metadata.json" in refusal(iteration)
    stacked = saved_again(iteration, lambda fqn: not fqn.startswith("decoder."))
    if name == "qwen3-tp2":
        assert "torch_dist format but has no metadata.json" in refusal(stacked)


def test_checkpoints_of_other_programs(tmp_path: Path) -> None:
    def saved(**state: Tensor) -> Path:
        shutil.rmtree(tmp_path / "here", ignore_errors=True)
        writer = FileSystemWriter(tmp_path / "here")
        dcp_save(dict(state), storage_writer=writer, no_dist=True)
        return tmp_path / "here"

    name = "model.layers.0.self_attn.q_proj.weight"
    text = refusal(saved(**{name: torch.zeros(2, 2)}))
    assert f"holds no Megatron-Core model: it has '{name}' and the like" in text
    text = refusal(saved(**{"optimizer.state.exp_avg.x": torch.zeros(2)}))
    assert "it holds no model weights (1 optimizer entries)" in text
    assert "it holds no model weights (no entries)" in refusal(saved())


def test_all_problems_are_reported_together(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    iteration = copy(fixtures["fsdp-qwen3-dp2"], tmp_path)
    (iteration / "__0_0.distcp").unlink()

    def damage(metadata: object) -> None:
        table = metadata.storage_data  # type: ignore[attr-defined]
        gone = next(key for key in table if key.fqn == "model.module.output_layer.weight")
        del table[gone]

    edit_metadata(iteration, damage)
    (iteration / "common.pt").write_bytes(b"not a torch file")
    text = refusal(iteration)
    assert "__0_0.distcp" in text
    assert "output_layer.weight: chunk at [0, 0]: no shard file holds it" in text
    assert "common.pt" in text
