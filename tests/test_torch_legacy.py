"""Format `torch`: one torch.save file per rank, against what save_pretrained wrote."""

from __future__ import annotations

import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from mcorefs.boxes import Box
from mcorefs.errors import CheckpointError, MappingError, ReadFault
from mcorefs.files import read_all
from mcorefs.formats import Checkpoint
from mcorefs.formats.torch_legacy import TorchLegacy
from mcorefs.formats.torch_legacy.files import RankFile
from mcorefs.formats.torch_legacy.ranks import Ranks
from mcorefs.formats.torch_legacy.stages import stages
from mcorefs.leaf import StorageLeaf
from mcorefs.model import Options, load
from mcorefs.storage import FileIdentity, Storage
from mcorefs.tree import build
from mcorefs.views import Stored
from tests.checkpoints import SPECS, Fixture, ensure
from tests.checkpoints.families import family_to_name

NAMES = [name for name, spec in SPECS.items() if spec.format == "torch"]
FILE = "model_optim_rng.pt"
StateDict = dict[str, Any]


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure(NAMES)


def served(fixture: Fixture, root: Path | None = None) -> dict[str, bytes]:
    """The safetensors files (and their index) that mcorefs makes of a fixture, or of a copy."""
    reference = fixture.hf if fixture.spec.needs_reference else None
    family = family_to_name(fixture.spec)
    options = Options(vocab_size=fixture.spec.vocab_size, hf_config=reference, family=family)
    model = load(root or fixture.root, options)
    tree, _ = build(model, fixture.spec.hf_max_shard_size or "50GB", 1 << 20)
    return {
        name: read_all(file)
        for name, file in tree.files.items()
        if "safetensors" in Path(name).name
    }


def oracle(fixture: Fixture) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in fixture.hf.glob("*.safetensors*")}


Edit = Callable[[StateDict, str], None]
"""Changes what the rank in the directory of that name saved."""


def rewritten(fixture: Fixture, root: Path, edit: Edit) -> Path:
    """A copy of a fixture's root in which every rank's state dict went through `edit`."""
    shutil.copytree(fixture.root, root)
    for file in root.glob(f"*/*/{FILE}"):
        state = torch.load(file, weights_only=False)
        edit(state, file.parent.name)
        torch.save(state, file)
    return root


def error_of(root: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(root, Options())
    return str(caught.value)


# -- what is served -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_serves_the_bytes_of_save_pretrained(fixtures: Mapping[str, Fixture], name: str) -> None:
    assert served(fixtures[name]) == oracle(fixtures[name])


@pytest.mark.parametrize("name", ["torch-qwen3-tp2", "torch-qwen3_moe-grouped-mlp"])
def test_reads_transposed_tensors_and_parameters_with_attributes(
    fixtures: Mapping[str, Fixture], tmp_path: Path, name: str
) -> None:
    def transpose(state: StateDict, _: str) -> None:
        for key, value in state["model"].items():
            # GroupedMLP views its weights under other shapes, so those are never transposed.
            if isinstance(value, Tensor) and value.dim() == 2 and ".experts.weight" not in key:
                state["model"][key] = value = torch.nn.Parameter(value.t().contiguous().t())
            if isinstance(value, Tensor):
                vars(value)["tensor_model_parallel"] = True

    root = rewritten(fixtures[name], tmp_path / "root", transpose)
    assert served(fixtures[name], root) == oracle(fixtures[name])


def test_reads_experts_stacked_in_one_tensor(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """TEGroupedLinear with moe_single_grouped_weight."""
    fixture = fixtures["torch-qwen3_moe-tp4-ep2-etp1"]

    def stack(state: StateDict, _: str) -> None:
        model = state["model"]
        for layer, fc in product(range(fixture.spec.layers), (1, 2)):
            module = f"decoder.layers.{layer}.mlp.experts.linear_fc{fc}.weight"
            local = fixture.spec.experts // fixture.spec.ep
            model[module] = torch.stack([model.pop(f"{module}{i}") for i in range(local)])

    assert served(fixture, rewritten(fixture, tmp_path / "root", stack)) == oracle(fixture)


def test_strips_the_prefixes_of_wrappers(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["torch-qwen3-tp4-gqa2"]

    def wrap(state: StateDict, _: str) -> None:
        state["model"] = {f"module.module.{key}": value for key, value in state["model"].items()}

    assert served(fixture, rewritten(fixture, tmp_path / "root", wrap)) == oracle(fixture)


def test_tells_expert_ranks_from_pipeline_stages_without_args(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["torch-qwen3_moe-ep4-dp4"]
    root = rewritten(fixture, tmp_path / "root", lambda state, _: state.pop("args"))
    with pytest.raises(MappingError, match=r"rope_theta is unknown.*--hf-config"):
        load(root, Options())
    model = load(root, Options(vocab_size=fixture.spec.vocab_size, hf_config=fixture.hf))
    tree, _ = build(model, "50GB", 1 << 20)
    wanted = oracle(fixture)["model.safetensors"]
    assert read_all(tree.files["model.safetensors"]) == wanted


def test_keeps_an_output_layer_that_is_not_tied(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """Only args show that the last stage's output layer is a copy; else it stays, bit for bit."""
    fixture = fixtures["torch-qwen3-tp2-pp2-vpp2-tied"]
    tied = TorchLegacy().index(fixture.iteration)
    assert "output_layer.weight" not in tied.tensors
    assert tied.skipped["copy of the tied embedding"] == 1

    def untie(state: StateDict, _: str) -> None:
        state["args"].untie_embeddings_and_output_weights = True

    root = rewritten(fixture, tmp_path / "root", untie)
    untied = TorchLegacy().index(root / fixture.spec.iteration_dir)
    assert untied.tensors["output_layer.weight"].shape == (320, 64)


def test_optimizer_and_extra_state_are_left_aside(fixtures: Mapping[str, Fixture]) -> None:
    checkpoint = TorchLegacy().index(fixtures["torch-qwen3-tp2"].iteration)
    assert checkpoint.skipped["optimizer"] == 2
    assert checkpoint.skipped["_extra_state"] > 0
    assert {Path(path).name for path in checkpoint.files} == {FILE}
    assert not [name for name in checkpoint.tensors if "exp_avg" in name or "_extra" in name]
    assert checkpoint.args["tensor_model_parallel_size"] == 2


# -- how ranks are put together -------------------------------------------------------------------


def _offsets_of_megatron(
    config: Any, virtual: int | None
) -> dict[tuple[int, int], tuple[int, int]]:
    """(first layer, number of layers) by (virtual stage, pipeline rank), by megatron-core."""
    found = {}
    for stage, pp in product(range(virtual or 1), range(config.pipeline_model_parallel_size)):
        vp_stage = None if virtual is None else stage
        first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp)
        found[stage, pp] = first, get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp)
    return found


def _ways_to_divide() -> Iterator[tuple[str, Any, int | None]]:
    for pp, virtual, per in product((1, 2, 3, 4), (None, 2, 3), (1, 2, 3)):
        if pp == 1 and virtual:
            continue
        base = {
            "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": virtual,
            "pipeline_model_parallel_layout": None,
            "num_layers_in_first_pipeline_stage": None,
            "num_layers_in_last_pipeline_stage": None,
            "account_for_embedding_in_pipeline_split": False,
            "account_for_loss_in_pipeline_split": False,
        }
        slots = pp * (virtual or 1) * per
        where = f"pp{pp}-vpp{virtual}-{per}"
        yield where, SimpleNamespace(**base, num_layers=slots), virtual
        if pp == 1:
            continue
        for embedding, loss in ((True, False), (False, True), (True, True)):
            changes = {
                "account_for_embedding_in_pipeline_split": embedding,
                "account_for_loss_in_pipeline_split": loss,
                "num_layers": slots - embedding - loss,
            }
            config = SimpleNamespace(**{**base, **changes})
            yield f"{where}-embedding{embedding}-loss{loss}", config, virtual
        ends: list[tuple[int | None, int | None]] = [(1, None), (None, 2), (2, 1)]
        for first, last in ends[: 2 if pp == 2 else 3]:  # both ends need a stage between them
            chunks = virtual or 1
            middle = (pp - (first is not None) - (last is not None)) * per * chunks
            uneven = {
                "num_layers_in_first_pipeline_stage": first and first * chunks,
                "num_layers_in_last_pipeline_stage": last and last * chunks,
                "num_layers": middle + ((first or 0) + (last or 0)) * chunks,
            }
            config = SimpleNamespace(**{**base, **uneven})
            yield f"{where}-first{first}-last{last}", config, virtual


def _stages_as_counted(counts: Mapping[tuple[int, int], int], virtual: int, pp: int) -> Any:
    """What mcorefs makes of files whose stages hold so many layers."""
    files = {
        (0, p): RankFile(
            f"/mp_rank_00_{p:03d}/{FILE}",
            (0, p),
            FileIdentity(0, 0, 0),
            {},
            "",
            1,
            tuple(
                {f"decoder.layers.{i}.x": None for i in range(counts[v, p])}  # type: ignore[misc]
                for v in range(virtual)
            ),
            {},
        )
        for p in range(pp)
    }
    args = {"num_layers": sum(counts.values())}
    ranks = Ranks(list(files.values()), args, 1, pp, 1, 1, virtual, files, {}, {})
    problems: list[str] = []
    found = {(stage, p): first for p, stage, first in stages(ranks, problems)}
    assert not problems
    return found


@pytest.mark.parametrize(
    ("config", "virtual"),
    [pytest.param(config, virtual, id=name) for name, config, virtual in _ways_to_divide()],
)
def test_counted_layer_numbers_are_those_of_megatron(config: Any, virtual: int | None) -> None:
    expected = _offsets_of_megatron(config, virtual)
    counts = {at: count for at, (_, count) in expected.items()}
    found = _stages_as_counted(counts, virtual or 1, config.pipeline_model_parallel_size)
    # A stage without layers has no layer to number.
    assert {at: found[at] for at in found if counts[at]} == {
        at: first for at, (first, count) in expected.items() if count
    }


@pytest.mark.parametrize(
    ("layout", "pp", "virtual"),
    [("Et|t|tt|tL", 4, 1), ("Et*2|t*3|t|tL", 2, 2), ("E|t*3|t|t*2|t|L", 3, 2)],
)
def test_counted_layer_numbers_follow_a_pipeline_layout(layout: str, pp: int, virtual: int) -> None:
    parsed = PipelineParallelLayerLayout(layout, pp)
    size = None if virtual == 1 else virtual
    parallel_state.set_virtual_pipeline_model_parallel_world_size(size)
    try:
        expected = {
            (v, p): parsed.get_layer_offset(vp_stage=v, pp_rank=p)
            for v, p in product(range(virtual), range(pp))
        }
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    kinds = {(v, p): [kind.name for kind in parsed.layout[p][v]] for v, p in expected}
    counts = {at: names.count("decoder") for at, names in kinds.items()}
    assert _stages_as_counted(counts, virtual, pp) == expected


def _saved(root: Path, ranks: Mapping[str, StateDict], args: Mapping[str, object]) -> Path:
    """An iteration directory with one file per directory name, made of plain state dicts."""
    for name, model in ranks.items():
        (root / name).mkdir(parents=True)
        state = {"args": SimpleNamespace(**args), "iteration": 1, "model": model}
        torch.save(state, root / name / FILE)
    return root


def _values(checkpoint: Checkpoint) -> dict[str, Any]:
    leaf = StorageLeaf(Storage(checkpoint.files))
    values = {}
    for name, tensor in checkpoint.tensors.items():
        out = np.empty(tensor.shape, tensor.dtype.carrier)
        Stored(tensor).read_into(Box.whole(tensor.shape), out, leaf)
        values[name] = out.view(np.dtype(tensor.dtype.torch))
    return values


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("rope_in_args", [True, False])
def test_latent_attention_down_projections(
    tmp_path: Path, sharded: bool, rope_in_args: bool
) -> None:
    """Whole on every rank (TELinear, duplicated) or cut along rows (ColumnParallelLinear)."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"q_down": (24, 32), "q_up": (48, 24), "kv_down": (16 + 4, 32), "kv_up": (64, 16)}
    whole = {
        f"decoder.layers.0.self_attention.linear_{name}_proj.weight": torch.randn(
            shape, generator=generator
        )
        for name, shape in sizes.items()
    }

    def part(name: str, rank: int) -> Tensor:
        cut = "_up_" in name or sharded
        return whole[name].chunk(2)[rank].clone() if cut else whole[name]

    ranks = {f"mp_rank_0{r}": {name: part(name, r) for name in whole} for r in (0, 1)}
    args = {"num_layers": 1, "tensor_model_parallel_size": 2}
    root = _saved(tmp_path, ranks, {**args, **({"qk_pos_emb_head_dim": 4} if rope_in_args else {})})
    found = _values(TorchLegacy().index(root))
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(found[name], value.numpy())


def test_ungated_mlp_and_biases(tmp_path: Path) -> None:
    """Column parallel biases are cut with their rows; row parallel ones are on every rank."""
    generator = torch.Generator().manual_seed(2)
    layer = "decoder.layers.0.mlp."
    whole = {
        f"{layer}linear_fc1.weight": torch.randn(16, 6, generator=generator),
        f"{layer}linear_fc1.bias": torch.randn(16, generator=generator),
        f"{layer}linear_fc2.weight": torch.randn(6, 16, generator=generator),
        f"{layer}linear_fc2.bias": torch.randn(6, generator=generator),
    }
    axes = {"linear_fc1.weight": 0, "linear_fc1.bias": 0, "linear_fc2.weight": 1}

    def part(name: str, rank: int) -> Tensor:
        axis = axes.get(name.removeprefix(layer))
        return whole[name] if axis is None else whole[name].chunk(4, axis)[rank].clone()

    ranks = {f"mp_rank_0{r}": {name: part(name, r) for name in whole} for r in range(4)}
    root = _saved(tmp_path, ranks, {"num_layers": 1, "tensor_model_parallel_size": 4})
    found = _values(TorchLegacy().index(root))
    for name, value in whole.items():
        np.testing.assert_array_equal(found[name], value.numpy())


# -- laziness -------------------------------------------------------------------------------------


def _records(path: Path) -> dict[str, tuple[int, int]]:
    """Where the data of each record lie, as Python's own zipfile sees it: (start, stop)."""
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<2H", file.read(4))
            start = info.header_offset + 30 + name + extra
            found[info.filename.split("/", 1)[1]] = start, start + info.file_size
    return found


def test_opening_reads_no_tensor_data(
    fixtures: Mapping[str, Fixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = fixtures["torch-qwen3_moe-tp2-pp2-ep2-etp2"]
    reads: list[tuple[str, int, int]] = []
    real = os.pread

    def pread(fd: int, count: int, offset: int) -> bytes:
        reads.append((os.readlink(f"/proc/self/fd/{fd}"), offset, offset + count))
        return real(fd, count, offset)

    def refuse(*_: object) -> int:
        raise AssertionError("tensor data are read with preadv, and none may be read now")

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(os, "preadv", refuse)
    load(fixture.root, Options())
    files = sorted(fixture.iteration.glob(f"*/{FILE}"))
    assert {path for path, _, _ in reads} == {str(path) for path in files}
    for path in files:
        data = [place for name, place in _records(path).items() if name.startswith("data/")]
        touched = [
            (start, stop)
            for file, start, stop in reads
            if file == str(path)
            for first, last in data
            if start < last and first < stop
        ]
        assert not touched


def test_finds_tensors_beyond_four_gib(tmp_path: Path) -> None:
    """A sparse file of more than 4 GiB, as torch itself writes it: zip64 all through."""
    directory = tmp_path / "mp_rank_00"
    directory.mkdir()
    file = directory / FILE
    wanted = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = {
        "iteration": 1,
        "model": {
            "embedding.word_embeddings.weight": torch.empty(5 << 20, 1 << 10, dtype=torch.uint8),
            "decoder.final_layernorm.weight": wanted,
        },
    }
    with torch.serialization.skip_data():
        torch.save(state, file)
    start, _ = _records(file)["data/1"]
    assert start > 1 << 32
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(wanted.numpy().tobytes())
    checkpoint = TorchLegacy().index(tmp_path)
    assert checkpoint.tensors["embedding.word_embeddings.weight"].shape == (5 << 20, 1 << 10)
    del checkpoint.tensors["embedding.word_embeddings.weight"]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(
        _values(checkpoint)["decoder.final_layernorm.weight"], wanted.numpy()
    )


def test_a_tile_of_a_transposed_expert_costs_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of GroupedMLP's weight1 lies all over its expert, which must not be read per row."""
    hidden, width = 512, 16_384
    stacked = torch.arange(2 * hidden * width, dtype=torch.int32).view(torch.float32)
    layer = "decoder.layers.0.mlp."
    state = {
        f"{layer}router.weight": torch.ones(2, hidden),
        f"{layer}experts.weight1": stacked.reshape(hidden, 2 * width),
    }
    checkpoint = TorchLegacy().index(_saved(tmp_path, {"mp_rank_00": state}, {}))
    read = 0
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        count = real(fd, buffers, offset)
        read += count
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    expert = checkpoint.tensors[f"{layer}experts.1.linear_fc1.weight"]
    out = np.empty((64, hidden), np.uint32)
    StorageLeaf(Storage(checkpoint.files))(expert, Box((100, 0), out.shape), out)
    wanted = stacked.view(torch.int32).reshape(2, hidden, width)[1].T[100:164]
    np.testing.assert_array_equal(out, wanted.numpy())
    assert read < 1.1 * hidden * width * 4


def test_a_file_replaced_after_opening_is_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["torch-qwen3-tp2"]
    root = rewritten(fixture, tmp_path / "root", lambda *_: None)
    checkpoint = TorchLegacy().index(root / fixture.spec.iteration_dir)
    file = root / fixture.spec.iteration_dir / "mp_rank_01" / FILE
    shutil.copy(file, tmp_path / "copy")
    os.replace(tmp_path / "copy", file)
    with pytest.raises(ReadFault, match="was replaced"):
        _values(checkpoint)


# -- damage ---------------------------------------------------------------------------------------


def test_all_missing_ranks_are_named_at_once(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["torch-qwen3_moe-tp2-pp2-ep2-etp1"]
    root = rewritten(fixture, tmp_path / "root", lambda *_: None)
    iteration = root / fixture.spec.iteration_dir
    present = {path.name for path in iteration.iterdir()}
    assert present == {f"mp_rank_0{t}_00{p}_00{t}" for t, p in product((0, 1), (0, 1))}
    shutil.rmtree(iteration / "mp_rank_01_000_001")
    shutil.rmtree(iteration / "mp_rank_00_001_000")
    (iteration / "mp_rank_01_001_001" / FILE).unlink()
    text = error_of(root)
    assert "2 of the ranks' directories are missing" in text
    assert "mp_rank_01_000_001" in text
    assert "mp_rank_00_001_000" in text
    assert f"mp_rank_01_001_001/{FILE}: No such file" in text


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("torch-qwen3-tp4-gqa2", "mp_rank_03"),
        ("torch-qwen3-pp2-uneven", "mp_rank_00_000"),
        ("torch-qwen3_moe-ep4-dp4", "mp_rank_00_003"),
        ("torch-qwen3_moe-tp4-ep2-etp1", "mp_rank_02_000"),
    ],
)
def test_a_missing_rank_is_named_as_its_directory_would_be(
    fixtures: Mapping[str, Fixture], tmp_path: Path, name: str, lost: str
) -> None:
    root = tmp_path / "root"
    shutil.copytree(fixtures[name].root, root)
    shutil.rmtree(root / fixtures[name].spec.iteration_dir / lost)
    assert f"directories are missing: {lost} (" in error_of(root)


def test_an_iteration_without_rank_files_is_incomplete(tmp_path: Path) -> None:
    (tmp_path / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    assert f"none holds {FILE}" in error_of(tmp_path)


def test_a_rank_directory_is_not_a_checkpoint(fixtures: Mapping[str, Fixture]) -> None:
    iteration = fixtures["torch-qwen3"].iteration
    assert f"pass the directory above it, {iteration}" in error_of(iteration / "mp_rank_00")


def test_files_cut_short_are_all_reported(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(fixtures["torch-qwen3-tp4-gqa2"].root, root)
    for rank, size in ((1, 100_000), (3, 0)):
        os.truncate(root / "release" / f"mp_rank_0{rank}" / FILE, size)
    text = error_of(root)
    for rank in (1, 3):
        assert f"mp_rank_0{rank}/{FILE} is not a well-formed torch.save archive" in text
    assert "mp_rank_00" not in text
    assert "missing" not in text


def _rezipped(file: Path, method: int, shorten: str | None = None) -> None:
    """Write the archive again: with a compression method, with one record cut in half."""
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", method) as new:
        for name, data in members.items():
            cut = shorten is not None and name.endswith(f"/{shorten}")
            new.writestr(name, data[: len(data) // 2] if cut else data)


def test_compressed_and_shortened_records_are_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(fixtures["torch-qwen3-tp4-gqa2"].root, root)
    _rezipped(root / "release" / "mp_rank_02" / FILE, zipfile.ZIP_DEFLATED)
    _rezipped(root / "release" / "mp_rank_03" / FILE, zipfile.ZIP_STORED, "data/1")
    text = error_of(root)
    assert re.search(rf"mp_rank_02/{FILE} .* is compressed", text)
    assert re.search(rf"mp_rank_03/{FILE}.*data/1 has \d+ bytes, its pickle says", text)


def test_storages_that_lie_in_one_place_are_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """As a damaged directory of the archive says: what is read of one would be the other's."""
    root = tmp_path / "root"
    shutil.copytree(fixtures["torch-qwen3-tp4-gqa2"].root, root)
    file = root / "release" / "mp_rank_02" / FILE
    with zipfile.ZipFile(file) as archive:
        places = {member.filename: member.header_offset for member in archive.infolist()}
    one, other = (places[name] for name in places if name.endswith(("/data/0", "/data/1")))
    data = bytearray(file.read_bytes())
    start = data.rindex(struct.pack("<I", other))  # in the directory, which is last
    data[start : start + 4] = struct.pack("<I", one)
    file.write_bytes(data)
    assert re.search(rf"mp_rank_02/{FILE}.*record '\S*data/[01]' lies outside", error_of(root))


def test_views_of_one_storage_may_overlap(tmp_path: Path) -> None:
    """They are what was saved: torch.load gives the same elements to both."""
    flat = torch.arange(12.0)
    model: StateDict = {
        "embedding.word_embeddings.weight": flat[:8].reshape(4, 2),
        "decoder.final_layernorm.weight": flat[6:8],
        "output_layer.weight": flat[:8].reshape(4, 2),
    }
    root = _saved(tmp_path, {"mp_rank_00": model}, {"untie_embeddings_and_output_weights": True})
    found = _values(TorchLegacy().index(root))
    assert found.keys() == model.keys()
    assert all(np.array_equal(found[name], model[name].numpy()) for name in model)


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_pickle_is_executed(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["torch-qwen3-tp2"]
    touched = tmp_path / "touched"
    name = "decoder.layers.0.mlp.linear_fc2.weight"

    def attack(state: StateDict, rank: str) -> None:
        state["args"].hostile = _Touch(touched)
        state["hostile"] = _Touch(touched)
        if rank == "mp_rank_01":
            state["model"][name] = _Touch(touched)

    text = error_of(rewritten(fixture, tmp_path / "root", attack))
    assert f"{name} is no plain tensor but a posix.system" in text
    assert not touched.exists()


def test_replicas_that_disagree_are_all_reported(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["torch-qwen3-tp2"]

    def damage(state: StateDict, rank: str) -> None:
        if rank == "mp_rank_01":
            model = state["model"]
            model["decoder.final_layernorm.weight"] = torch.ones(32, dtype=torch.bfloat16)
            model["decoder.layers.1.input_layernorm.weight"] = torch.ones(64)
            model["decoder.layers.2.self_attention.linear_proj.weight"] = torch.ones(64, 16)

    text = error_of(rewritten(fixture, tmp_path / "root", damage))
    assert "decoder.final_layernorm.weight is bfloat16 [64] in mp_rank_00 but bfloat16 [32]" in text
    assert "layers.1.input_layernorm.weight is bfloat16 [64] in mp_rank_00 but float32 [64]" in text
    assert "layers.2.self_attention.linear_proj.weight is bfloat16 [64, 64]" in text


def test_ranks_with_different_layers_are_reported(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["torch-qwen3-tp2"]

    def drop(state: StateDict, rank: str) -> None:
        if rank == "mp_rank_01":
            for name in list(state["model"]):
                if name.startswith("decoder.layers.3."):
                    del state["model"][name]

    text = error_of(rewritten(fixture, tmp_path / "root", drop))
    assert "mp_rank_00 holds 8 tensors that mp_rank_01 does not" in text


def test_stages_must_hold_as_many_layers_as_the_args_say(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["torch-qwen3_moe-mixed-pp2"]

    def drop(state: StateDict, rank: str) -> None:
        if rank == "mp_rank_00_001":
            for name in list(state["model"]):
                if name.startswith("decoder.layers.1."):
                    del state["model"][name]

    text = error_of(rewritten(fixture, tmp_path / "root", drop))
    assert "hold 3 layers in all but the training arguments say num_layers 4" in text


def test_files_of_another_save_are_reported(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["torch-qwen3-tp2"]
    root = rewritten(fixture, tmp_path / "root", lambda *_: None)
    iteration = root / fixture.spec.iteration_dir

    def older(state: StateDict, _: str) -> None:
        state["iteration"] = 50
        state["args"].tensor_model_parallel_size = 4

    other = rewritten(fixture, tmp_path / "other", older) / fixture.spec.iteration_dir
    shutil.copytree(other / "mp_rank_01", iteration / "mp_rank_03")
    text = error_of(root)
    assert "mp_rank_03 is of another save than mp_rank_00" in text
    assert "tensor_model_parallel_size 4 instead of 2" in text
    assert "iteration 50 instead of 100" in text
    assert "mp_rank_03 cannot be of this save" in text


def test_directories_of_two_saves_are_reported(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(fixtures["torch-qwen3"].root, root)
    iteration = root / fixtures["torch-qwen3"].spec.iteration_dir
    shutil.copytree(iteration / "mp_rank_00", iteration / "mp_rank_00_000")
    assert "not of one save: mp_rank_00, mp_rank_00_000" in error_of(root)


def test_a_pipeline_stage_may_copy_the_embedding_and_nothing_else(tmp_path: Path) -> None:
    """The stage with the multi-token prediction layers holds the embedding too."""
    embedding, norm = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
    shared = torch.arange(6.0).reshape(3, 2)
    stages_: dict[str, StateDict] = {
        "mp_rank_00_000": {embedding: shared},
        "mp_rank_00_001": {embedding: shared, norm: torch.ones(2)},
    }
    args = {"pipeline_model_parallel_size": 2}
    found = _values(TorchLegacy().index(_saved(tmp_path / "a", stages_, args)))
    assert found.keys() == {embedding, norm}
    stages_["mp_rank_00_000"][norm] = torch.ones(2)
    with pytest.raises(CheckpointError, match="held by more than one pipeline stage"):
        TorchLegacy().index(_saved(tmp_path / "b", stages_, args))


def test_a_tied_output_layer_must_look_like_the_embedding(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["torch-qwen3-tp2-pp2-vpp2-tied"]

    def grow(state: StateDict, _: str) -> None:
        if "output_layer.weight" in state["model1"]:
            state["model1"]["output_layer.weight"] = torch.ones(200, 64, dtype=torch.bfloat16)

    text = error_of(rewritten(fixture, tmp_path / "root", grow))
    assert "output_layer.weight should be a copy of the embedding" in text


def test_expert_ranks_must_hold_as_many_experts(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["torch-qwen3_moe-tp4-ep2-etp1"]

    def drop(state: StateDict, rank: str) -> None:
        if rank.endswith("_001"):
            for fc in (1, 2):
                del state["model"][f"decoder.layers.2.mlp.experts.linear_fc{fc}.weight3"]

    text = error_of(rewritten(fixture, tmp_path / "root", drop))
    assert "layers.2.mlp.experts: mp_rank_01_001 holds 3 experts but expert-parallel rank 0" in text


def test_a_parameter_nobody_knows_is_refused_when_it_is_cut(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["torch-qwen3-tp2"]
    name = "decoder.layers.0.self_attention.gizmo.weight"

    def add(state: StateDict, _: str) -> None:
        state["model"][name] = torch.ones(4)

    text = error_of(rewritten(fixture, tmp_path / "root", add))
    assert f"{name}: how it is cut over 2 tensor-parallel ranks is not known" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_tensor_parallel_size": 4}, "expert_tensor_parallel_size 4 does not divide"),
        ({"moe_extended_tp": True}, "moe_extended_tp"),
    ],
)
def test_expert_layouts_that_are_not_read(
    fixtures: Mapping[str, Fixture], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    fixture = fixtures["torch-qwen3_moe-grouped-mlp"]

    def apply(state: StateDict, _: str) -> None:
        for name, value in change.items():
            setattr(state["args"], name, value)

    assert message in error_of(rewritten(fixture, tmp_path / "root", apply))


def test_experts_cut_in_an_unknown_way_are_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["torch-qwen3_moe-grouped-mlp"]
    root = rewritten(fixture, tmp_path / "root", lambda state, _: state.pop("args"))
    assert "no rank file holds training args" in error_of(root)


def test_other_contents_are_refused_by_name(tmp_path: Path) -> None:
    cases: dict[str, tuple[object, bool]] = {
        "holds a model from before Megatron-Core": ({"model": {"language_model": {}}}, True),
        "holds no model weights; it holds optimizer, iteration": (
            {"optimizer": {}, "iteration": 3},
            True,
        ),
        "holds no dict": ([1, 2], True),
        "from before 1.6 (not a zip)": ({"model": {"x": torch.ones(2)}}, False),
    }
    for number, (message, (state, is_zip)) in enumerate(cases.items()):
        directory = tmp_path / f"iter_{number:07d}" / "mp_rank_00"
        directory.mkdir(parents=True)
        torch.save(state, directory / FILE, _use_new_zipfile_serialization=is_zip)
        assert message in error_of(directory.parent)
