"""`torch_dist`: real checkpoints read through one format class, then damaged in every way that a
copy, a crash or an enemy can."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import pickle
import random
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardedProperties
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from mcorefs.errors import CheckpointError, McorefsError, ReadFault
from mcorefs.files import read_all
from mcorefs.formats import Checkpoint, WeightsFrom, detect
from mcorefs.formats.torch_dist import COMMON_STATE, TorchDist
from mcorefs.inspection import inspect
from mcorefs.model import Options, load
from mcorefs.tree import build
from tests.checkpoints import SPECS, Fixture, ensure
from tests.edited import copy, edit_metadata, rename

NAMES = [name for name, spec in SPECS.items() if spec.format == "torch_dist"]
QKV = "decoder.layers.self_attention.linear_qkv.weight"
EMBEDDING = "embedding.word_embeddings.weight"
EXPERTS = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure(NAMES)


@pytest.fixture
def iteration(fixtures: Mapping[str, Fixture], tmp_path: Path) -> Path:
    """A copy of a TP2 checkpoint, to be damaged: every matrix is in two chunks or more."""
    return copy(fixtures["qwen3-tp2"], tmp_path)


def index(iteration: Path) -> Checkpoint:
    return TorchDist().index(iteration)


def refusal(iteration: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        index(iteration)
    return str(caught.value)


def described(iteration: Path) -> dict[str, object]:
    """All that an index says of the tensors, in a form that compares."""
    return {
        fqn: (tensor.dtype, tensor.shape, {(c.box, c.span) for c in tensor.chunks})
        for fqn, tensor in index(iteration).tensors.items()
    }


def stored(metadata: Any, fqn: str, place: int = 0) -> tuple[Any, Any]:
    """(MetadataIndex, _StorageInfo) of a chunk of `fqn`."""
    index, info = [item for item in metadata.storage_data.items() if item[0].fqn == fqn][place]
    return index, info


# -- what is there --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_index_of_a_real_checkpoint(fixtures: Mapping[str, Fixture], name: str) -> None:
    fixture = fixtures[name]
    found = detect(fixture.iteration)
    assert found is not None
    checkpoint = found.index(fixture.iteration)
    assert checkpoint.format == "torch_dist"
    metadata = pickle.loads((fixture.iteration / ".metadata").read_bytes())  # noqa: S301
    expected = {
        fqn: (
            str(entry.properties.dtype),
            tuple(entry.size),
            sum(0 not in chunk.sizes for chunk in entry.chunks),
        )
        for fqn, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        and not re.match(r"(chained_\d\.)?optimizer\.|rng_state", fqn)
    }
    assert {
        fqn: (f"torch.{tensor.dtype.torch}", tensor.shape, len(tensor.chunks))
        for fqn, tensor in checkpoint.tensors.items()
    } == expected
    for path in checkpoint.files:
        assert Path(path).parent == fixture.iteration
    assert checkpoint.skipped.get("optimizer", 0) > 0 or not fixture.spec.optimizer_entries
    assert checkpoint.skipped["_extra_state"] > 0


def test_the_training_args_are_plain_values(fixtures: Mapping[str, Fixture]) -> None:
    before = set(sys.modules)
    for name in ("qwen3-tp2", "qwen3-tp2-common-state"):
        checkpoint = index(fixtures[name].iteration)
        args = checkpoint.args
        assert args["num_layers"] == 4
        assert args["rotary_base"] == 1_000_000
        assert args["layernorm_epsilon"] == 1e-6
        assert args["params_dtype"] == "bfloat16"
        assert args["dataloader_save"] == str(fixtures[name].root / "dataloader")
        assert args["attention_backend"] == 5  # AttnBackend.auto, an enum of megatron-core
        assert args["num_experts"] is None
    assert checkpoint.args_source.startswith("common_state/shard_0_1 in ")
    assert set(sys.modules) == before  # megatron and torch are not needed
    bare = index(fixtures["qwen3-tied"].iteration)
    assert bare.args == {}
    assert bare.args_source.endswith("common.pt holds no training args")


def test_a_value_that_is_no_data_is_none(iteration: Path) -> None:
    args = Namespace(a=[1, (2.5, {"b": None})], function=os.getcwd, kind=type, stream=io.BytesIO())
    torch.save({"args": args}, iteration / "common.pt")
    found = index(iteration).args
    assert found["a"] == [1, [2.5, {"b": None}]]
    assert found["function"] is found["kind"] is found["stream"] is None


def test_without_common_state(iteration: Path) -> None:
    (iteration / "common.pt").unlink()
    found = index(iteration)
    assert found.args == {}
    assert found.args_source == f"{iteration} has neither common.pt nor a {COMMON_STATE} entry"


# -- how it may be written ------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(iteration: Path, protocol: int) -> None:
    before = described(iteration)
    metadata = pickle.loads((iteration / ".metadata").read_bytes())  # noqa: S301
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    assert described(iteration) == before


def test_chunks_are_found_by_offset_whatever_the_order_and_hints(iteration: Path) -> None:
    def shuffle(metadata: Any) -> None:
        rng = random.Random(1)
        items = [
            (MetadataIndex(index.fqn, index.offset, rng.randrange(9)), info)
            for index, info in metadata.storage_data.items()
        ]
        rng.shuffle(items)
        metadata.storage_data = dict(items)
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                rng.shuffle(entry.chunks)

    before = described(iteration)
    edit_metadata(iteration, shuffle)
    assert described(iteration) == before


def older_properties(metadata: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch up to 2.2 described tensors by a class of its sharded tensors."""
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.properties = ShardedProperties(dtype=entry.properties.dtype)  # type: ignore[assignment]


def without_plans(metadata: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_local_plans", "planner_data", "storage_meta", "version"):
        metadata.__dict__.pop(name, None)


def without_transforms(metadata: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """_StorageInfo had no transform_descriptors before torch 2.7."""
    for info in metadata.storage_data.values():
        info.__dict__.pop("transform_descriptors", None)


def megatron_subclass(metadata: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """megatron-core 0.11 to 0.15 saved a subclass, with plans of its own."""
    module = "megatron.core.dist_checkpointing.strategies.torch"
    fake = ModuleType(module)
    for name, base in (("MCoreMetadata", type(metadata)), ("MCoreSavePlan", object)):
        setattr(fake, name, type(name, (base,), {"__module__": module}))
    monkeypatch.setitem(sys.modules, module, fake)
    for parent in ("megatron", "megatron.core", "megatron.core.dist_checkpointing"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, module.rpartition(".")[0], ModuleType("strategies"))
    found = fake.MCoreMetadata(metadata.state_dict_metadata, storage_data=metadata.storage_data)
    found.mcore_data = {QKV: {"nd_reformulated_orig_global_shape": (1, 2)}}
    found.all_local_plans = [fake.MCoreSavePlan()]
    return found


@pytest.mark.parametrize(
    "edit", [older_properties, without_plans, without_transforms, megatron_subclass]
)
def test_older_writers(
    iteration: Path, edit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = described(iteration)
    edit_metadata(iteration, lambda metadata: edit(metadata, monkeypatch))
    assert described(iteration) == before


def test_metadata_json_of_other_versions(iteration: Path) -> None:
    for extra in (
        {},
        {"common_backend": "torch", "common_backend_version": 1},
        {"new": [1]},
        {"sharded_backend_version": 7},
    ):
        text = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, **extra}
        (iteration / "metadata.json").write_text(json.dumps(text))
        assert TorchDist().detect(iteration)


@pytest.mark.parametrize(
    ("name", "fqns"),
    [
        (
            "qwen3_moe-tp2-ep2-dp-reshardable",
            (
                "chained_0.optimizer.distributed.dp_group_idx_0.optimizer/shard_0_1",
                "chained_1.optimizer.distributed.dp_group_idx_0.gbuf_idx_0."
                "dtype_(torch.bfloat16, torch.bfloat16).bucket_idx_0.exp_avg_sq",
            ),
        ),
        (
            "qwen3-tp2-dp2-reshardable",
            ("optimizer.state.param.decoder.layers.mlp.linear_fc2.weight",),
        ),
        (
            "qwen3-dp2-dp-zero",
            ("optimizer.distributed.dp_group_idx_0.param_state/shard_0_1",),
        ),
        (
            "qwen3-tp2-main-params",
            ("optimizer.state.fp32_param.decoder.final_layernorm.weight",),
        ),
    ],
)
def test_optimizers_are_left_aside(
    fixtures: Mapping[str, Fixture], name: str, fqns: tuple[str, ...]
) -> None:
    iteration = fixtures[name].iteration
    metadata = pickle.loads((iteration / ".metadata").read_bytes())  # noqa: S301
    held = metadata.state_dict_metadata
    assert set(fqns) <= set(held)
    kept = sum(bool(re.match(r"(chained_\d\.)?optimizer\.", fqn)) for fqn in held)
    checkpoint = index(iteration)
    assert checkpoint.skipped["optimizer"] == kept
    assert all(fqn.startswith(("decoder.", "embedding.", "output_")) for fqn in checkpoint.tensors)


def test_what_torch_saved_once_more_has_the_args_in_pieces(
    fixtures: Mapping[str, Fixture],
) -> None:
    checkpoint = index(fixtures["qwen3_moe-ep2-dp4-saved-again"].iteration)
    assert checkpoint.args["num_experts"] == 8
    assert checkpoint.args_source.startswith("common_state/shard_0_1.0.args in ")
    sizes = {
        fqn: {chunk.box.sizes[0] for chunk in index(fixtures[name].iteration).tensors[fqn].chunks}
        for name, fqn in (
            ("qwen3_moe-ep2-dp4-saved-again", EXPERTS),
            ("qwen3-dp3-saved-again", QKV),
        )
    }
    assert sizes == {EXPERTS: {2}, QKV: {2}}


def test_weights_inside_of_a_wrapper(iteration: Path, fixtures: Mapping[str, Fixture]) -> None:
    """NeMo 2 writes `module.` before every name."""
    rename(iteration, lambda fqn: f"module.{fqn}" if not fqn.startswith("rng_state") else fqn)
    fixture = fixtures["qwen3-tp2"]
    tree, _ = build(load(iteration, Options()), fixture.spec.hf_max_shard_size or 0, 1 << 20)
    for path in fixture.hf.glob("*.safetensors"):
        assert read_all(tree.files[path.name]) == path.read_bytes()


def test_empty_tensors_and_empty_chunks(iteration: Path) -> None:
    def add(metadata: Any) -> None:
        properties = metadata.state_dict_metadata[QKV].properties
        nothing = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([0, 4]))
        metadata.state_dict_metadata["decoder.empty"] = TensorStorageMetadata(
            properties, torch.Size([0, 4]), [nothing]
        )
        metadata.state_dict_metadata[EMBEDDING].chunks.append(
            ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([0, 64]))
        )

    edit_metadata(iteration, add)
    tensors = index(iteration).tensors
    assert tensors["decoder.empty"].shape == (0, 4)
    assert len(tensors[EMBEDDING].chunks) == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight", "optimizer"),
        ("chained_0.optimizer.state.fp32_param.embedding.word_embeddings.weight", "optimizer"),
        ("chained_0.chained_1.optimizer.distributed.dp_group_idx_0.param_state", "optimizer"),
        ("optimizer_state.0.exp_avg", "optimizer"),
        ("optimizer_states.0.state.1.exp_avg", "optimizer"),
        ("decoder.layers.self_attention.linear_qkv._extra_state", "_extra_state"),
        ("rng_state.torch_rng_state", "object"),
        ("decoder.layers.x/shard_0_4", "object"),
    ],
)
def test_what_is_no_weight_is_left_aside(iteration: Path, name: str, kind: str) -> None:
    """Even where it is stored as a tensor, and even where its chunks are nowhere."""
    before = index(iteration).skipped
    expected = described(iteration)

    def add(metadata: Any) -> None:
        metadata.state_dict_metadata[name] = metadata.state_dict_metadata[QKV]

    edit_metadata(iteration, add)
    after = index(iteration).skipped
    assert {k: n - before.get(k, 0) for k, n in after.items() if n != before.get(k)} == {kind: 1}
    assert described(iteration) == expected


def test_objects_are_left_aside(iteration: Path) -> None:
    def add(metadata: Any) -> None:
        metadata.state_dict_metadata["iteration"] = BytesStorageMetadata()

    before = index(iteration).skipped.get("object", 0)
    edit_metadata(iteration, add)
    assert index(iteration).skipped["object"] == before + 1


def test_only_files_that_hold_weights_count(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """A shard with nothing but optimizer state may be left out of a copy."""
    iteration = copy(fixtures["qwen3-tp2-dp2-fully-parallel"], tmp_path)
    expected = described(iteration)

    def move(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn.startswith("optimizer."):
                info.relative_path = "__9_0.distcp"

    edit_metadata(iteration, move)
    assert described(iteration) == expected
    assert not any(path.endswith("__9_0.distcp") for path in index(iteration).files)


@pytest.mark.parametrize("prefix", ["module.", "model.", "model.module."])
def test_wrapped_keys_give_the_same_files(
    fixtures: Mapping[str, Fixture], iteration: Path, prefix: str
) -> None:
    rename(iteration, lambda fqn: prefix + fqn)
    tree, _ = build(load(iteration, Options()), "60KB", 1 << 20)
    for path in fixtures["qwen3-tp2"].hf.glob("*.safetensors"):
        assert read_all(tree.files[path.name]) == path.read_bytes()


# -- shard files that are not as they were --------------------------------------------------------


def shard(iteration: Path) -> Path:
    return iteration / "__0_0.distcp"


def remove(path: Path) -> None:
    path.unlink()


def cut_one_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (remove, "No such file or directory"),
        (cut_one_byte, "is cut short: it has"),
        (empty, "is cut short: it has 0 bytes"),
        (directory, "is not a regular file"),
        (link, "is a symbolic link"),
        (pipe, "is not a regular file"),
    ],
)
def test_a_shard_that_is_not_as_it_was(
    iteration: Path, damage: Callable[[Path], None], why: str
) -> None:
    damage(shard(iteration))
    message = refusal(iteration)
    assert message.count("\n  - ") == 1
    assert str(shard(iteration)) in message
    assert why in message


def test_every_bad_shard_is_named(iteration: Path) -> None:
    shards = sorted(iteration.glob("*.distcp"))
    assert len(shards) > 2
    for path, damage in zip(shards, itertools.cycle((remove, cut_one_byte, pipe)), strict=False):
        damage(path)
    message = refusal(iteration)
    assert message.count("\n  - shard file") == len(shards)
    for path in shards:
        assert str(path) in message


def test_a_shard_from_another_save_is_an_error_when_it_is_read(
    fixtures: Mapping[str, Fixture], iteration: Path
) -> None:
    """Its bytes are not where .metadata says; opening reads no data, so only reading can tell."""
    path = shard(iteration)
    path.write_bytes(path.read_bytes()[1:] + b"\0")
    tree, _ = build(load(iteration, Options()), "50GB", 1 << 20)
    with pytest.raises(ReadFault, match=r"__0_0\.distcp"):
        read_all(tree.files["model.safetensors"])


# -- .metadata that is wrong ----------------------------------------------------------------------


def test_metadata_that_is_cut_short(iteration: Path) -> None:
    data = (iteration / ".metadata").read_bytes()
    for length in (0, 1, 2, 100, len(data) // 2, len(data) - 1):
        (iteration / ".metadata").write_bytes(data[:length])
        message = refusal(iteration)
        assert str(iteration / ".metadata") in message
        assert "cannot be read as a pickle" in message


def test_metadata_with_any_byte_changed_never_crashes(iteration: Path) -> None:
    data = (iteration / ".metadata").read_bytes()
    rng = random.Random(7)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 4, 50))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (iteration / ".metadata").write_bytes(damaged)
        with suppress(McorefsError):
            index(iteration)


class Bomb:
    """Makes a file where it is unpickled by anything that runs what a pickle names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("value", [[], {}, None, "text", 3, torch.float32, b"x"])
def test_metadata_that_is_something_else(iteration: Path, value: object) -> None:
    (iteration / ".metadata").write_bytes(pickle.dumps(value))
    assert "expected torch's checkpoint Metadata" in refusal(iteration)


def test_nothing_in_a_pickle_runs(iteration: Path, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "exploded")

    def plant(metadata: Any) -> None:
        metadata.planner_data = {"x": bomb}
        metadata.state_dict_metadata["decoder.evil"] = bomb

    edit_metadata(iteration, plant)
    assert "decoder.evil: .metadata describes it as posix.mkdir" in refusal(iteration)
    (iteration / ".metadata").write_bytes(pickle.dumps(bomb))
    assert "found posix.mkdir" in refusal(iteration)
    torch.save({"args": bomb}, iteration / "common.pt")
    assert "found posix.mkdir" in refusal(iteration)
    assert not bomb.path.exists()


Edit = Callable[[Any], None]


def on_range(**changes: object) -> Edit:
    """Sets fields of the file range of the first chunk of QKV."""

    def edit(metadata: Any) -> None:
        old, info = stored(metadata, QKV)
        metadata.storage_data[old] = dataclasses.replace(info, **changes)

    return edit


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (on_range(relative_path="../../etc/passwd"), "'../../etc/passwd' is not that of a file in"),
        (on_range(relative_path="/etc/passwd"), "'/etc/passwd' is not that of a file in"),
        (on_range(relative_path="sub/__0_0.distcp"), "is not that of a file in the checkpoint"),
        (on_range(relative_path=".."), "'..' is not that of a file"),
        (on_range(relative_path=""), "'' is not that of a file"),
        (on_range(relative_path="a\0b"), "is not that of a file"),
        (on_range(relative_path="a\ud800"), "No such file"),
        (on_range(relative_path="a" * 300), "File name too long"),
        (on_range(relative_path="__77_0.distcp"), "__77_0.distcp: No such file"),
        (on_range(relative_path=7), "its place on disk is not given"),
        (on_range(offset=-1), "its place on disk is impossible (offset -1"),
        (on_range(length=0), "its place on disk is impossible"),
        (on_range(offset=1 << 70), "is cut short"),
        (on_range(offset=1.5), "its place on disk is not given"),
        (on_range(offset=True), "its place on disk is not given"),
        (on_range(length=1 << 70), "is cut short"),
        (on_range(length=1000), "1000 bytes on disk cannot hold [1, 128, 64] of bfloat16"),
        (on_range(transform_descriptors=["stream.zstd/1"]), "stored compressed"),
    ],
)
def test_file_ranges_that_cannot_be(iteration: Path, edit: Edit, why: str) -> None:
    edit_metadata(iteration, edit)
    message = refusal(iteration)
    assert message.count("\n  - ") == 1
    assert why in message
    assert QKV in message or "shard file" in message


def on_chunk(offsets: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None) -> Edit:
    """Moves or resizes the first chunk of QKV, in both tables of .metadata."""

    def edit(metadata: Any) -> None:
        chunk = metadata.state_dict_metadata[QKV].chunks[0]
        old = MetadataIndex(QKV, chunk.offsets)
        chunk.offsets = chunk.offsets if offsets is None else torch.Size(offsets)
        chunk.sizes = chunk.sizes if sizes is None else torch.Size(sizes)
        info = metadata.storage_data.pop(old)
        metadata.storage_data[MetadataIndex(QKV, chunk.offsets)] = info

    return edit


def without_chunk(metadata: Any) -> None:
    del metadata.state_dict_metadata[QKV].chunks[2]


def twice(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata[QKV].chunks
    chunks.append(chunks[0])


def instead_of_another(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata[QKV].chunks
    chunks[1] = chunks[0]


def without_range(metadata: Any) -> None:
    for place in (0, 1):
        metadata.storage_data.pop(stored(metadata, QKV, place)[0])


def larger_shape(metadata: Any) -> None:
    metadata.state_dict_metadata[QKV].size = torch.Size([4, 1 << 40, 64])


def set_on(name: str, value: object) -> Edit:
    return lambda metadata: setattr(metadata.state_dict_metadata[QKV], name, value)


def dtype(value: torch.dtype) -> Edit:
    return lambda metadata: setattr(metadata.state_dict_metadata[QKV].properties, "dtype", value)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (without_chunk, "they leave a gap"),
        (twice, "they overlap"),
        (instead_of_another, "overlap"),
        (
            without_range,
            "no shard file holds it, so the checkpoint was not saved completely (and 1",
        ),
        (larger_shape, "they leave a gap"),
        (on_chunk(sizes=(1, 127, 64)), "they leave a gap"),
        (
            on_chunk(offsets=(0, 64, 0)),
            "chunks at [0, 64, 0] of size [1, 128, 64] and at [0, 128, 0] of size",
        ),
        (on_chunk(offsets=(0, -128, 0)), "lies outside of shape [4, 256, 64]"),
        (on_chunk(offsets=(1 << 70, 0, 0)), "lies outside of shape"),
        (on_chunk(offsets=(0, 0)), "or do not fit each other"),
        (
            on_chunk(sizes=(1, 1 << 60, 64)),
            "bytes on disk cannot hold [1, 1152921504606846976, 64]",
        ),
        (set_on("size", None), ".metadata gives no shape or no chunks"),
        (set_on("size", torch.Size([1] * 20)), "is not possible"),
        (set_on("chunks", None), ".metadata gives no shape or no chunks"),
        (set_on("chunks", [None]), "a chunk's offsets or sizes are not given"),
        (set_on("properties", None), "its dtype NoneType is not one we know"),
        (dtype(torch.complex64), "its dtype torch.complex64 is not one we know"),
        (dtype(torch.float64), "bytes on disk cannot hold [1, 128, 64] of float64"),
    ],
)
def test_tensors_that_cannot_be(iteration: Path, edit: Edit, why: str) -> None:
    edit_metadata(iteration, edit)
    message = refusal(iteration)
    assert message.count("\n  - ") == 1
    assert f"{QKV}: " in message
    assert why in message


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", 7, ("a",)])
def test_names_that_are_no_names(iteration: Path, name: object) -> None:
    def add(metadata: Any) -> None:
        metadata.state_dict_metadata[name] = metadata.state_dict_metadata[QKV]

    edit_metadata(iteration, add)
    message = refusal(iteration)
    assert ".metadata names an entry" in message
    assert message.isprintable()


def test_odd_keys_among_the_file_ranges_are_passed_over(iteration: Path) -> None:
    before = described(iteration)

    def add(metadata: Any) -> None:
        _, info = stored(metadata, QKV)
        index = MetadataIndex("x", (0,))
        metadata.storage_data |= {"text": info, 3: None, index: None}
        odd = MetadataIndex(QKV, (0, 0, 0), 5)
        object.__setattr__(odd, "fqn", "unhashable")
        metadata.storage_data[odd] = info
        object.__setattr__(odd, "offset", [0, {}])

    edit_metadata(iteration, add)
    assert described(iteration) == before


@pytest.mark.parametrize("name", ["state_dict_metadata", "storage_data"])
@pytest.mark.parametrize("value", [None, [], ...])
def test_metadata_without_its_tables(iteration: Path, name: str, value: object) -> None:
    def edit(metadata: Any) -> None:
        metadata.__dict__[name] = value
        if value is ...:
            del metadata.__dict__[name]

    edit_metadata(iteration, edit)
    assert f"has no {name}: it is damaged" in refusal(iteration)


# -- common state ---------------------------------------------------------------------------------


def no_archive(path: Path) -> None:
    path.write_bytes(b"PK\5\6 not an archive" * 10)


def another_object(path: Path) -> None:
    torch.save([1, 2], path)


def no_namespace(path: Path) -> None:
    torch.save({"args": {"num_layers": 4}}, path)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (empty, "is not a well-formed torch.save archive"),
        (no_archive, "is not a well-formed torch.save archive"),
        (cut_one_byte, "is not a well-formed torch.save archive"),
        (directory, "is not a regular file"),
        (link, "is a symbolic link"),
        (pipe, "is not a regular file"),
    ],
)
def test_a_common_pt_that_cannot_be_read(
    iteration: Path, damage: Callable[[Path], None], why: str
) -> None:
    damage(iteration / "common.pt")
    message = refusal(iteration)
    assert message.count("\n  - ") == 1
    assert f"{iteration / 'common.pt'}" in message
    assert why in message


@pytest.mark.parametrize("change", [another_object, no_namespace])
def test_a_common_pt_without_args(iteration: Path, change: Callable[[Path], None]) -> None:
    change(iteration / "common.pt")
    found = index(iteration)
    assert found.args == {}
    assert found.args_source == f"{iteration / 'common.pt'} holds no training args"


def test_args_that_are_nested_without_end(iteration: Path) -> None:
    circle: list[object] = []
    circle.append(circle)
    torch.save({"args": Namespace(circle=circle)}, iteration / "common.pt")
    assert "common.pt: a training argument is nested too deeply" in refusal(iteration)


def test_damage_everywhere_is_told_at_once(iteration: Path) -> None:
    def edit(metadata: Any) -> None:
        on_range(relative_path="/etc/passwd")(metadata)
        metadata.state_dict_metadata[EMBEDDING].chunks.pop()

    edit_metadata(iteration, edit)
    cut_one_byte(iteration / "__1_0.distcp")
    remove(iteration / "__0_1.distcp")
    no_archive(iteration / "common.pt")
    message = refusal(iteration)
    assert message.startswith(f"{iteration} cannot be opened:")
    for text in (QKV, EMBEDDING, "__1_0.distcp", "__0_1.distcp", "common.pt"):
        assert text in message
    assert message.count("\n  - ") == 5


def test_thousands_of_problems_are_counted(iteration: Path) -> None:
    def add(metadata: Any) -> None:
        for number in range(1000):
            metadata.state_dict_metadata[f"x.{number}"] = None

    edit_metadata(iteration, add)
    message = refusal(iteration)
    assert message.count("\n  - ") == 50
    assert message.endswith("... and 950 more")


def common_range(**changes: object) -> Edit:
    def edit(metadata: Any) -> None:
        old, info = stored(metadata, COMMON_STATE)
        metadata.storage_data[old] = dataclasses.replace(info, **changes)

    return edit


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (common_range(relative_path="../common.pt"), "is not that of a file in the checkpoint"),
        (common_range(relative_path="gone.distcp"), "gone.distcp: No such file"),
        (common_range(offset=1 << 70), "is cut short"),
        (common_range(offset=1), "is not a well-formed torch.save archive"),
        (common_range(length=10), "is not a well-formed torch.save archive"),
    ],
)
def test_a_common_state_entry_that_cannot_be_read(
    fixtures: Mapping[str, Fixture], tmp_path: Path, edit: Edit, why: str
) -> None:
    iteration = copy(fixtures["qwen3-tp2-common-state"], tmp_path)
    edit_metadata(iteration, edit)
    message = refusal(iteration)
    assert message.count("\n  - ") == 1
    assert why in message


def test_a_checkpoint_without_weights(iteration: Path) -> None:
    rename(iteration, lambda fqn: f"optimizer.state.exp_avg.{fqn}")
    message = refusal(iteration)
    assert "holds no model weights" in message
    assert " optimizer entries" in message


def test_inspecting_reads_the_index_once(
    fixtures: Mapping[str, Fixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes seconds where there are 100,000 chunks."""
    calls: list[Path] = []
    index = TorchDist.index

    def counted(self: TorchDist, path: Path, weights: WeightsFrom = "model") -> Checkpoint:
        calls.append(path)
        return index(self, path, weights)

    monkeypatch.setattr(TorchDist, "index", counted)
    fixture = fixtures["qwen3-tp2"]
    assert not inspect(fixture.root, Options()).problems
    assert calls == [fixture.iteration]
