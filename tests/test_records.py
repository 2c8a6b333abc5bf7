"""Objects of `.metadata` made in one step are what the pickle machine makes of the same bytes."""

from __future__ import annotations

import ast
import pickle
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from mcorefs.errors import CheckpointError
from mcorefs.formats.dcp import read_directory
from mcorefs.pickle_objects import SKIPPED, Built, Name
from mcorefs.places import IndexClass, InfoClass
from mcorefs.records import (
    ChunkClass,
    PropertiesClass,
    Record,
    RecordClass,
    TensorClass,
    TensorProperties,
)
from mcorefs.unpickle import Attributes, Inert, loads
from tests.checkpoints import SPECS, Fixture, ensure
from tests.edited import copy

CLASSES: tuple[type[RecordClass], ...] = (
    ChunkClass,
    IndexClass,
    InfoClass,
    PropertiesClass,
    TensorClass,
)
NAMES = [
    "qwen3_moe-tp2-pp2-ep2-etp2",
    "qwen3-tp2-dp2-reshardable",
    "qwen3-dp3-saved-again",
    "fsdp-qwen3_moe-ep2-dp4",
    "dcp-qwen3_moe-dp3",
]


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure(NAMES)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], object]:
    """Reads a pickle without making anything in one step."""

    def read(data: bytes) -> object:
        with monkeypatch.context() as patch:
            make_one_by_one(patch)
            return seen(data)

    return read


def make_one_by_one(patch: pytest.MonkeyPatch) -> None:
    for kind in CLASSES:
        patch.setattr(kind, "filled", lambda *_: None)
        patch.setattr(kind, "gathered", lambda _self, _data, start, *_: start)
        patch.setattr(kind, "skipped", lambda *_: None)


def seen(data: bytes, without: Callable[[str], bool] | None = None) -> object:
    """All of what a pickle amounts to, in a form that compares; or that it is refused."""
    try:
        return shown(loads(data, "it", without=without))
    except CheckpointError:
        return CheckpointError


def shown(value: object, depth: int = 12) -> object:
    if depth == 0:
        return "..."
    if isinstance(value, dict):
        return [(shown(key, depth - 1), shown(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [shown(item, depth - 1) for item in value]
    if value is SKIPPED:
        return "skipped"
    if isinstance(value, Inert):
        return value.name, shown([value.args, value.state, value.items], depth - 1)
    if isinstance(value, TensorProperties):
        return "properties", shown(value.dtype, depth - 1)
    if isinstance(value, Record):
        slots = {name: getattr(value, name) for name in value.__slots__}
        return type(value).__name__, shown(slots, depth - 1)
    if isinstance(value, Attributes):
        return type(value).__name__, shown(value.__dict__, depth - 1)
    return type(value).__name__ if isinstance(value, Built | Name) else repr(value)


def counting(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How often each class made its object, and did not."""
    counts = {kind.__name__: [0, 0] for kind in CLASSES}

    def counted(kind: type[RecordClass]) -> None:
        original, series = kind.filled, kind.gathered

        def gathered(
            self: Any,
            data: bytes,
            start: int,
            at: int,
            memo: list[object],
            items: Any,
            without: Any,
        ) -> int:
            before, length = len(items), len(memo)
            end = series(self, data, start, at, memo, items, without)
            made = items[before:]
            assert made or end != start or len(memo) == length
            for other in CLASSES:
                counts[other.__name__][0] += sum(isinstance(one, other.kind) for one in made)
            return end

        def filled(self: Any, data: bytes, at: int, memo: list[object]) -> Any:
            before = len(memo)
            made = original(self, data, at, memo)
            assert made is not None or len(memo) == before
            counts[kind.__name__][made is None] += 1
            return made

        monkeypatch.setattr(kind, "filled", filled)
        monkeypatch.setattr(kind, "gathered", gathered)

    for kind in CLASSES:
        counted(kind)
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_real_metadata(
    fixtures: Mapping[str, Fixture],
    name: str,
    one_by_one: Callable[[bytes], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = (fixtures[name].iteration / ".metadata").read_bytes()
    expected = one_by_one(data)
    counts = counting(monkeypatch)
    assert seen(data) == expected
    for kind, (made, left) in counts.items():
        # TensorClass leaves those of many chunks to the machine, and makes most properties itself.
        assert made > 8 * left or kind == "PropertiesClass", (kind, made, left)


# -- whatever torch may pickle --------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(0, 300), st.integers(0, 70_000), st.integers(0, 1 << 33), st.integers(0, 1 << 62)
)
SHAPES = st.lists(NUMBERS, max_size=5)
FQNS = st.one_of(
    st.text(max_size=20), st.sampled_from(["\x94", "j\0\0\0\0", "\x94h\1", "a.b", "χ" * 200])
)
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.float8_e4m3fn])


@st.composite
def metadata(draw: st.DrawFn) -> bytes:
    """A pickle of torch's classes with anything in them, shared or not."""
    sizes: list[Callable[[list[int]], Any]] = [torch.Size, tuple]
    as_shape = draw(st.sampled_from(sizes))
    paths = draw(st.lists(FQNS, min_size=1, max_size=3))
    shared = as_shape(draw(SHAPES))
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for fqn in draw(st.lists(FQNS, unique=True, max_size=4)):
        chunks = []
        for _ in range(draw(st.integers(0, 3))):
            offsets = shared if draw(st.booleans()) else as_shape(draw(SHAPES))
            chunks.append(dcp.ChunkStorageMetadata(offsets, as_shape(draw(SHAPES))))
            index = dcp.MetadataIndex(
                fqn if draw(st.booleans()) else fqn + "",
                draw(st.sampled_from([None, offsets])),
                draw(st.sampled_from([None, 0, 7, 70_000])),
            )
            path = draw(st.sampled_from(paths))
            places[index] = _StorageInfo(path, draw(NUMBERS), draw(NUMBERS))
        properties = dcp.TensorProperties(dtype=draw(DTYPES))
        entries[fqn] = dcp.TensorStorageMetadata(properties, as_shape(draw(SHAPES)), chunks)
    whole = dcp.Metadata(entries, storage_data=places)
    return pickle.dumps(whole, draw(st.sampled_from([2, 3, 4, 5])))


@settings(max_examples=150, deadline=None)
@given(data=metadata())
def test_any_metadata(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        make_one_by_one(patch)
        expected = seen(data)
    assert expected is not CheckpointError
    assert seen(data) == expected


def _damaged(data: bytes, count: int) -> Iterator[bytes]:
    rng = random.Random(1)
    for _ in range(count):
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.choice(
                (rng.randrange(256), *b"hjKMJ(tub)\x94")
            )
        yield bytes(broken)


def test_damaged_metadata(one_by_one: Callable[[bytes], object]) -> None:
    """Where the machine reads something else than before, so does this, or it refuses."""
    size = torch.Size
    entries: dict[str, Any] = {
        fqn: dcp.TensorStorageMetadata(
            dcp.TensorProperties(dtype=torch.float32),
            size((4, 600)),
            [dcp.ChunkStorageMetadata(size((row, 0)), size((2, 600))) for row in (0, 2)],
        )
        for fqn in ("a", "b")
    }
    places: dict[Any, Any] = {
        dcp.MetadataIndex(fqn, chunk.offsets): _StorageInfo("__0_0.distcp", 700 * row, 70_000)
        for fqn, entry in entries.items()
        for row, chunk in enumerate(entry.chunks)
    }
    data = pickle.dumps(dcp.Metadata(entries, storage_data=places), 4)
    agreed = 0
    for broken in _damaged(data, 3000):
        seen(broken, lambda name: name == "a")  # raises nothing else
        fast = seen(broken)
        if fast is not CheckpointError:
            assert fast == one_by_one(broken)
            agreed += 1
    assert agreed > 100


def test_what_a_pickler_never_refers_to_is_refused() -> None:
    """The attributes' dict and the arguments' tuple of an object that was made in one step."""
    index = dcp.MetadataIndex("a", torch.Size((1, 2)))
    data = pickle.dumps([index, dcp.MetadataIndex("b", torch.Size((1, 2)))], 4)
    assert data.endswith(b"e.")
    made = [i for i in range(256) if _refused(data[:-2] + b"h%ce." % i)]
    assert len(made) == 2


def _refused(data: bytes) -> bool:
    try:
        loads(data, "it")
    except CheckpointError as error:
        return "it refers to attributes or arguments once more" in str(error)
    return False


# -- without what is not needed -------------------------------------------------------------------


def needed(whole: Any, without: Callable[[str], bool]) -> object:
    """What `without` leaves of what `shown` made of torch's Metadata."""
    if whole is CheckpointError:
        return whole
    _, attributes = whole
    left = {}
    for name, value in attributes:
        if name == "'state_dict_metadata'":
            value = [(fqn, "skipped" if _tells(fqn, without) else entry) for fqn, entry in value]
        if name == "'storage_data'":
            value = [
                (index, info)
                for index, info in value
                if not _tells(dict(index[1])["'fqn'"], without)
            ]
        left[name] = value
    return left


def _tells(shown_name: str, without: Callable[[str], bool]) -> bool:
    return without(ast.literal_eval(shown_name))


def _is_of_optimizer(name: str) -> bool:
    return name.startswith("optimizer.")


@pytest.mark.parametrize("name", ["qwen3-tp2-dp2-reshardable", "qwen3_moe-tp2-pp2-ep2-etp2"])
def test_the_optimizer_is_left_out_of_real_checkpoints(
    fixtures: Mapping[str, Fixture], name: str, one_by_one: Callable[[bytes], object]
) -> None:
    data = (fixtures[name].iteration / ".metadata").read_bytes()
    whole = pickle.loads(data)  # noqa: S301  (ours)
    del whole.all_local_plans  # which refer to what is in the other attributes
    data = pickle.dumps(whole, 4)
    expected = needed(one_by_one(data), _is_of_optimizer)
    assert needed(seen(data, _is_of_optimizer), _is_of_optimizer) == expected
    found = loads(data, "it", without=_is_of_optimizer)
    assert isinstance(found, Attributes)
    entries, places = vars(found)["state_dict_metadata"], vars(found)["storage_data"]
    assert sum(entry is SKIPPED for entry in entries.values()) > 20
    assert len(places) < 0.6 * len(whole.storage_data)


def test_what_was_left_out_but_is_needed_is_read_after_all() -> None:
    """As in a checkpoint of one process, whose indices share their offsets with the chunks."""
    offsets = [torch.Size((100 * i, 7)) for i in range(9)]
    chunks = [dcp.ChunkStorageMetadata(one, torch.Size((1, 2))) for one in offsets]
    whole: dict[str, Any] = {
        name: dcp.TensorStorageMetadata(
            dcp.TensorProperties(), torch.Size((400, 9)), chunks[3 * i : 3 * i + 3]
        )
        for i, name in enumerate(("model", "optimizer.a", "optimizer.b"))
    }
    data = pickle.dumps(dcp.Metadata(whole, storage_data={"model": offsets[7]}), 4)
    apart = pickle.dumps(dcp.Metadata(whole, storage_data={"model": torch.Size((1, 2))}), 4)
    assert "skipped" in str(seen(apart, _is_of_optimizer))
    assert seen(data, _is_of_optimizer) == seen(data)


@pytest.mark.parametrize("width", [0, 1, 5])
def test_frames_amid_what_is_not_needed(
    width: int, one_by_one: Callable[[bytes], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each 64 KiB of a pickle something stands between two opcodes, wherever that is."""
    entries: dict[str, Any] = {"x" * width: dcp.BytesStorageMetadata()}
    places: dict[Any, Any] = {}
    for name in ("model.a", "optimizer.a", "optimizer.b", "model.b"):
        starts = [torch.Size((i, 0)) for i in range(1500)]
        chunks = [dcp.ChunkStorageMetadata(torch.Size(s), torch.Size((1, 149))) for s in starts]
        properties = dcp.TensorProperties()
        entries[name] = dcp.TensorStorageMetadata(properties, torch.Size((9999, 149)), chunks)
        for i, start in enumerate(starts):
            index = dcp.MetadataIndex("".join(list(name)) if i % 99 == 0 else name, start, i)
            places[index] = _StorageInfo(f"__{i // 500}_0.distcp", 149 * i, 38_037)
    data = pickle.dumps(dcp.Metadata(entries, storage_data=places), 4)
    assert len(data) > 1 << 19
    found = loads(data, "it", without=_is_of_optimizer)
    assert isinstance(found, Attributes)
    assert [
        fqn for fqn, entry in vars(found)["state_dict_metadata"].items() if entry is SKIPPED
    ] == [
        "optimizer.a",
        "optimizer.b",
    ]
    expected = needed(one_by_one(data), _is_of_optimizer)
    assert needed(shown(found), _is_of_optimizer) == expected


def test_a_dict_of_one_place_that_is_not_needed() -> None:
    """SETITEM takes a pair from the stack, which has to be there."""

    def places(fqn: str, count: int) -> dict[Any, Any]:
        return {
            dcp.MetadataIndex(fqn, torch.Size((i, 0))): _StorageInfo(f"__{fqn}", i, 9)
            for i in range(count)
        }

    whole = [places("model", 3), places("optimizer.a", 1), places("optimizer.a", 2), 5]
    found = loads(pickle.dumps(whole, 4), "it", without=_is_of_optimizer)
    assert isinstance(found, list)
    assert [len(places) for places in found[:3]] == [3, 1, 0]
    assert found[3] == 5


@settings(max_examples=150, deadline=None)
@given(data=metadata(), names=st.sets(FQNS))
def test_any_metadata_without_something(data: bytes, names: set[str]) -> None:
    def without(name: str) -> bool:
        return name in names

    with pytest.MonkeyPatch.context() as patch:
        make_one_by_one(patch)
        expected = needed(seen(data), without)
    assert needed(seen(data, without), without) == expected


# -- without the end ------------------------------------------------------------------------------


def _with_plans(**attributes: object) -> bytes:
    whole = dcp.Metadata({}, storage_data={})
    whole.__dict__.update(attributes)
    return pickle.dumps(whole, 4)


def test_what_follows_an_attribute_is_not_read() -> None:
    data = _with_plans(all_local_plans=[1, 2, 3], other=4)
    found = loads(data, "it", until="all_local_plans")
    assert isinstance(found, Attributes)
    assert list(vars(found)) == [
        "state_dict_metadata",
        "planner_data",
        "storage_data",
        "storage_meta",
        "version",
    ]
    end = data.index(b"all_local_plans") + len("all_local_plans")
    broken = data[:end] + b"\xff" * (len(data) - end)
    assert shown(loads(broken, "it", until="all_local_plans")) == shown(found)
    assert list(vars(loads(data, "it")))[-2:] == ["all_local_plans", "other"]


@pytest.mark.parametrize(
    "value",
    [
        {"state_dict_metadata": {"all_local_plans": 1}},
        {"planner_data": ["all_local_plans"]},
        {"planner_data": "all_local_plans"},
    ],
)
def test_the_same_word_elsewhere(value: dict[str, object]) -> None:
    data = _with_plans(**value)
    assert shown(loads(data, "it", until="all_local_plans")) == shown(loads(data, "it"))


def test_plans_are_left_out_of_real_checkpoints(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    name = "qwen3_moe-tp2-pp2-ep2-etp2"
    assert SPECS[name].format == "torch_dist"
    iteration = copy(fixtures[name], tmp_path)
    data = (iteration / ".metadata").read_bytes()
    end = data.index(b"all_local_plans") + len("all_local_plans")
    assert end < 0.6 * len(data)
    problems: list[str] = []
    whole = read_directory(iteration, "model", (), problems)
    (iteration / ".metadata").write_bytes(data[:end] + b"\xff" * (len(data) - end))
    cut = read_directory(iteration, "model", (), problems)
    assert not problems
    assert cut.tensors.keys() == whole.tensors.keys()
    for fqn, tensor in whole.tensors.items():
        assert cut.tensors[fqn].chunks == tensor.chunks


def test_many_chunks_in_a_moment() -> None:
    """A guard against time that grows faster than the checkpoint; scripts/bench.py measures."""
    size = torch.Size
    chunks = [
        dcp.ChunkStorageMetadata(size((layer, expert, 0)), size((1, 1, 4096)))
        for layer in range(100)
        for expert in range(200)
    ]
    entry = dcp.TensorStorageMetadata(dcp.TensorProperties(), size((100, 200, 4096)), chunks)
    places: dict[Any, Any] = {
        dcp.MetadataIndex("a", chunk.offsets): _StorageInfo("__0_0.distcp", 9000 * i, 9000)
        for i, chunk in enumerate(chunks)
    }
    data = pickle.dumps(dcp.Metadata({"a": entry}, storage_data=places), 4)
    started = time.process_time()
    loads(data, "it")
    assert time.process_time() - started < 3
