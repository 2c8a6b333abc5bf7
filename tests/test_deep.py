"""`verify --deep`: numbers that are none, and ranks that disagree."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mcorefs.boxes import Box
from mcorefs.dtypes import BY_NAME
from mcorefs.formats.base import KeepsReplicas, Replica
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.formats.torch_legacy import TorchLegacy
from mcorefs.index import Chunk, Span, StoredTensor, stored_tensor
from mcorefs.mapping.plan import HfTensor
from mcorefs.model import Options
from mcorefs.reader import Reader
from mcorefs.storage import FileIdentity, Storage
from mcorefs.tree import open_tree
from mcorefs.verify import Findings, deep
from mcorefs.verify.checks import deep_checks
from mcorefs.views import Stored
from tests.checkpoints import SPECS, Fixture, ensure
from tests.checkpoints.families import family_to_name
from tests.test_torch_legacy import StateDict, rewritten

LEGACY = [name for name, spec in SPECS.items() if spec.format == "torch"]


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure(LEGACY)


def check(fixture: Fixture, root: Path) -> tuple[Findings, Findings]:
    """(numbers, copies)."""
    reference = fixture.hf if fixture.spec.needs_reference else None
    family = family_to_name(fixture.spec)
    options = Options(vocab_size=fixture.spec.vocab_size, hf_config=reference, family=family)
    opened = open_tree(root, options)
    numbers, copies = (check.run(lambda count: None) for check in deep_checks(opened))
    return numbers, copies


# -- copies ---------------------------------------------------------------------------------------


def test_which_formats_keep_copies() -> None:
    assert isinstance(TorchLegacy(), KeepsReplicas)
    assert not isinstance(TorchDist(), KeepsReplicas)


@pytest.mark.parametrize("name", LEGACY)
def test_ranks_that_agree(fixtures: dict[str, Fixture], name: str) -> None:
    fixture = fixtures[name]
    numbers, copies = check(fixture, fixture.root)
    assert numbers.differences == copies.differences == ()
    spec = fixture.spec
    several_files = len(list(fixture.iteration.glob("mp_rank_*"))) > spec.pp
    # Two stages hold the embedding: the last one too, as its output layer, or to predict with.
    twice = spec.pp > 1 and (spec.tied or spec.mtp > 0) and spec.common != "no_args"
    assert (copies.sound > 0) == (several_files or twice)


Change = Callable[[StateDict], torch.Tensor]


@pytest.mark.parametrize(
    ("name", "rank", "key", "known", "served"),
    [
        (  # a norm, over tensor-parallel ranks
            "torch-qwen3-tp2",
            "mp_rank_01",
            "decoder.layers.2.self_attention.q_layernorm.weight",
            "decoder.layers.2.self_attention.q_layernorm.weight",
            "mp_rank_00",
        ),
        (  # layer 1 of the second stage is layer 3
            "torch-qwen3_moe-tp2-pp2-ep2-etp1",
            "mp_rank_01_001_001",
            "decoder.layers.1.mlp.router.weight",
            "decoder.layers.3.mlp.router.weight",
            "mp_rank_00_001_000",
        ),
        (  # what is no expert, over expert-parallel ranks
            "torch-qwen3_moe-ep4-dp4",
            "mp_rank_00_003",
            "decoder.layers.0.self_attention.linear_qkv.weight",
            "decoder.layers.0.self_attention.linear_qkv.weight",
            "mp_rank_00_000",
        ),
        (  # an expert, over tensor-parallel ranks that do not cut it: the second rank's third
            "torch-qwen3_moe-tp4-ep2-etp1",
            "mp_rank_03_001",
            "decoder.layers.1.mlp.experts.linear_fc2.weight2",
            "decoder.layers.1.mlp.experts.6.linear_fc2.weight",
            "mp_rank_01_001",
        ),
    ],
)
def test_a_rank_that_disagrees(
    fixtures: dict[str, Fixture],
    tmp_path: Path,
    name: str,
    rank: str,
    key: str,
    known: str,
    served: str,
) -> None:
    def change(state: StateDict, directory: str) -> None:
        if directory == rank:
            tensor = state["model"][key]
            tensor.view(-1).view(torch.uint8)[-1] ^= 1

    root = rewritten(fixtures[name], tmp_path / "root", change)
    numbers, copies = check(fixtures[name], root)
    assert numbers.differences == ()
    (difference,) = copies.differences
    shape = torch.load(next(root.glob(f"*/{rank}/model_optim_rng.pt")), weights_only=False)[
        "model"
    ][key].shape
    last = [n - 1 for n in shape]
    assert difference.name == known
    assert difference.problem == (
        f"differs in {served} and in {rank}: in 1 of {shape.numel():,} elements, first at {last}"
    )


def test_a_copy_of_the_embedding_that_was_not_kept_equal(
    fixtures: dict[str, Fixture], tmp_path: Path
) -> None:
    name = "torch-qwen3-tp2-pp2-vpp2-tied"

    def change(state: StateDict, directory: str) -> None:
        if directory == "mp_rank_01_001":
            state["model1"]["output_layer.weight"][3:5] += 1

    root = rewritten(fixtures[name], tmp_path / "root", change)
    _, copies = check(fixtures[name], root)
    (difference,) = copies.differences
    rows = fixtures[name].spec.padded_vocab_size // 2
    assert difference.name == "output_layer.weight"
    assert "differs in the first pipeline stage and in a later one" in difference.problem
    assert f"in 128 of {2 * rows * 64:,} elements, first at [{rows + 3}, 0]" in difference.problem


def test_a_copy_that_cannot_be_read(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["torch-qwen3-tp2"]
    root = Path(shutil.copytree(fixture.root, tmp_path / "root"))
    opened = open_tree(root, Options(vocab_size=fixture.spec.vocab_size))
    _, copies = deep_checks(opened)
    next(root.glob("*/mp_rank_01/model_optim_rng.pt")).touch()
    found = copies.run(lambda count: None)
    assert found.sound == 0
    assert all("cannot be compared in mp_rank_00 and" in d.problem for d in found.differences)


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["torch-qwen3-tp2", "torch-qwen3-tp4-gqa2", "torch-qwen3-pp2-uneven"]
)
def test_numbers_that_are_none(fixtures: dict[str, Fixture], tmp_path: Path, name: str) -> None:
    key = "decoder.layers.1.self_attention.linear_proj.weight"

    def change(state: StateDict, directory: str) -> None:
        tensor = state["model"].get(key)
        if tensor is not None and directory.startswith("mp_rank_00"):
            tensor[3, 2], tensor[7, 0], tensor[9, 1] = float("inf"), float("nan"), -float("inf")

    root = rewritten(fixtures[name], tmp_path / "root", change)
    numbers, _ = check(fixtures[name], root)
    stages = 2 if "pp2" in name else 1
    first = numbers.differences[0]
    assert len(numbers.differences) == stages
    assert first.name == "model.layers.1.self_attn.o_proj.weight"
    assert first.problem == "has 3 elements that are NaN or infinite, first at [3, 2]"


@pytest.mark.parametrize("name", ["BF16", "F16", "F8_E5M2", "F8_E4M3", "F32", "F64", "I16", "BOOL"])
def test_every_number_of_every_kind(tmp_path: Path, name: str) -> None:
    """All there are of 8 and 16 bits; of more bits, all that differ in their highest 16."""
    dtype = BY_NAME[name]
    count = 1 << min(16, 8 * dtype.itemsize)
    bits = np.arange(count, dtype=dtype.carrier) << max(0, 8 * dtype.itemsize - 16)
    if name == "BOOL":
        bits &= 1
    values = bits.astype(dtype.carrier).view(dtype.values)
    expected = 0 if not dtype.is_float else int(np.count_nonzero(~np.isfinite(values)))
    tensor = stored(tmp_path / "x", bits.astype(dtype.carrier).tobytes(), name, (count,))
    reader = Reader(Storage({}), 1 << 20)
    found = deep.check_finite([HfTensor("x", Stored(tensor))], reader)
    assert (found.differences == ()) == (expected == 0)
    if expected:
        first = int(np.argmin(np.isfinite(values)))
        wanted = f"has {expected:,} elements that are NaN or infinite, first at [{first}]"
        assert found.differences[0].problem == wanted


def stored(path: Path, data: bytes, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    path.write_bytes(data)
    chunk = Chunk(Box.whole(shape), Span(str(path), 0, len(data)))
    tensor, why = stored_tensor("x", BY_NAME[dtype], shape, (chunk,))
    assert tensor is not None, why
    return tensor


@pytest.mark.parametrize("shape", [(), (1,), (7, 5, 3), (0, 4), (5_000, 1_000), (2, 3_000_000)])
def test_copies_of_any_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, size=shape, dtype=np.uint8)
    one = stored(tmp_path / "one", data.tobytes(), "U8", shape)
    same = stored(tmp_path / "same", data.tobytes(), "U8", shape)
    places = [tuple(int(rng.integers(0, n)) for n in shape) for _ in range(2)] if data.size else []
    for place in places:
        data[place] ^= 0x80
    changed = stored(tmp_path / "changed", data.tobytes(), "U8", shape)
    files = {str(p): FileIdentity.of(p.stat()) for p in tmp_path.iterdir()}
    replicas = [Replica(name, one, "a", x, "b") for name, x in (("same", same), ("no", changed))]
    found = deep.check_replicas(replicas, Reader(Storage(files), 1 << 20))
    expected = {place for place in places if places.count(place) == 1}
    assert found.sound == 2 - bool(expected)
    if expected:
        (difference,) = found.differences
        assert difference.name == "no"
        assert f"in {len(expected)} of {data.size:,} elements, first at {list(min(expected))}" in (
            difference.problem
        )
