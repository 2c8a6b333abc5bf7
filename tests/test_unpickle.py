"""Pickles as data: what real ones come to, and that no pickle does anything else."""

from __future__ import annotations

import argparse
import copyreg
import enum
import functools
import io
import os
import pathlib
import pickle
import pickletools
import signal
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex as TorchMetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from mcorefs.dtypes import BF16, F32
from mcorefs.errors import CheckpointError
from mcorefs.records import MetadataIndex, TensorProperties
from mcorefs.torchzip import load_object
from mcorefs.unpickle import (
    Attributes,
    Inert,
    Metadata,
    Storage,
    StoredView,
    describe,
    loads,
    plain,
)

PROTOCOLS = [2, 3, 4, 5]
_seen: list[str] | None = None


def _note(event: str, args: tuple[object, ...]) -> None:
    if _seen is not None and not event.startswith("object.__getattr__"):
        _seen.append(f"{event} {args!r:.100}")


sys.addaudithook(_note)


@contextmanager
def nothing_happens() -> Iterator[None]:
    """Fails if anything is imported, executed, opened, started or unpickled by Python meanwhile."""
    global _seen
    modules = set(sys.modules)
    _seen = []
    try:
        yield
        events = _seen
    finally:
        _seen = None
    assert not events
    assert set(sys.modules) == modules


def read(data: bytes, *, storages: bool = False) -> object:
    with nothing_happens():
        return loads(data, "test.pkl", storages=storages)


def refused(data: bytes) -> str:
    with nothing_happens(), pytest.raises(CheckpointError, match=r"^test.pkl ") as caught:
        loads(data, "test.pkl")
    assert len(str(caught.value)) < 500
    return str(caught.value)


def proto(body: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


# ---------------------------------------------------------------- what real pickles come to


class Color(enum.Enum):
    RED = "red"


def _values(protocol: int) -> st.SearchStrategy[object]:
    numbers = st.integers(-(1 << 2039), (1 << 2039) - 1) | st.integers(-300, 70_000)
    keys = st.one_of(st.none(), st.booleans(), numbers, st.floats(allow_nan=False), st.text())
    kinds: list[st.SearchStrategy[object]] = [keys, st.text(min_size=250, max_size=300)]
    if protocol >= 3:
        kinds.append(st.binary())
    if protocol >= 4:
        kinds += [st.sets(keys, max_size=4), st.frozensets(st.tuples(keys, keys), max_size=4)]
    return st.recursive(
        st.one_of(kinds),
        lambda inner: st.one_of(
            st.lists(inner, max_size=5),
            st.lists(inner, max_size=5).map(tuple),
            st.dictionaries(st.one_of(keys, st.tuples(keys, keys)), inner, max_size=4),
            st.builds(lambda item: [item, item, (item, [item])], inner),
        ),
        max_leaves=10,
    )


def same(one: object, other: object) -> bool:
    """Equal, and of the same types all the way down."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return same([*one.items()], [*other.items()])
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return all(map(same, one, other))
    return True


@settings(deadline=None)
@given(st.data(), st.sampled_from(PROTOCOLS))
def test_plain_values_come_back_equal(data: st.DataObject, protocol: int) -> None:
    value = data.draw(_values(protocol))
    assert same(loads(pickle.dumps(value, protocol), "test.pkl"), value)
    assert same(loads(_by_python(value, protocol), "test.pkl"), value)


def _by_python(value: object, protocol: int) -> bytes:
    out = io.BytesIO()
    pickle._Pickler(out, protocol).dump(value)
    return out.getvalue()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_long_and_shared_values_come_back(protocol: int) -> None:
    names = [f"name{i}" for i in range(3000)]
    value: dict[str, object] = {
        "many": names,
        "again": names,
        "pairs": {name: (name, i) for i, name in enumerate(names)},
        "long": "x" * 100_000,
    }
    if protocol >= 3:
        value["bytes"] = b"y" * 100_000
    found = read(pickle.dumps(value, protocol))
    assert found == value
    assert isinstance(found, dict)
    assert found["many"] is found["again"]
    circle: list[object] = []
    circle.append(circle)
    found = read(pickle.dumps(circle, protocol))
    assert isinstance(found, list)
    assert found[0] is found


def test_bytearrays_and_sets_of_later_protocols() -> None:
    assert read(pickle.dumps(bytearray(b"abc"), 5)) == b"abc"
    assert read(pickle.dumps({(1, "a"), (2, "b")}, 4)) == {(1, "a"), (2, "b")}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_as_torch_writes_it(tmp_path: Path) -> None:
    state = {
        "a.weight": torch.zeros(4, 6, dtype=torch.bfloat16),
        "b": torch.zeros(()),
        "fp8": torch.zeros(3).to(torch.float8_e4m3fn),
        "step": 7,
    }
    save(state, checkpoint_id=tmp_path, no_dist=True)
    found = read((tmp_path / ".metadata").read_bytes())
    assert isinstance(found, Metadata)
    entries = vars(found)["state_dict_metadata"]
    assert {name: describe(entry) for name, entry in entries.items()} == {
        "a.weight": "TensorStorageMetadata",
        "b": "TensorStorageMetadata",
        "fp8": "TensorStorageMetadata",
        "step": "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    }
    weight = entries["a.weight"]
    assert isinstance(weight.properties, TensorProperties)
    assert weight.properties.dtype is BF16
    assert weight.size == (4, 6)
    assert [(chunk.offsets, chunk.sizes) for chunk in weight.chunks] == [((0, 0), (4, 6))]
    assert entries["b"].properties.dtype is F32
    assert entries["b"].size == ()
    places = {index.fqn: info for index, info in vars(found)["storage_data"].items()}
    assert all(isinstance(index, MetadataIndex) for index in vars(found)["storage_data"])
    for info in places.values():
        place = tmp_path / info.relative_path
        assert place.read_bytes()[info.offset :].startswith(b"PK\3\4") or "step" in places
        assert info.offset + info.length <= place.stat().st_size


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_training_args_become_plain(protocol: int) -> None:
    args = argparse.Namespace(
        layers=4,
        eps=1e-5,
        name="χ",
        none=None,
        flag=True,
        ratio=[1, 2],
        dtype=torch.bfloat16,
        color=Color.RED,
        path=pathlib.PurePosixPath("/data/x") / "y",
        posix=pathlib.PosixPath("/data/x"),
        nested={"a": {"b": (1, 2)}, 3: types.SimpleNamespace(x=1)},
        function=len,
        loss=functools.partial(int, base=3),
        array=np.arange(3),
        ordered=OrderedDict(a=1),
    )
    found = read(pickle.dumps(args, protocol))
    assert isinstance(found, Attributes)
    assert {name: plain(value) for name, value in vars(found).items()} == {
        "layers": 4,
        "eps": 1e-5,
        "name": "χ",
        "none": None,
        "flag": True,
        "ratio": [1, 2],
        "dtype": "bfloat16",
        # Up to Python 3.11.3 a member is pickled as an attribute of its class: only that knows it.
        "color": "red" if Color.RED.__reduce_ex__(protocol)[0] is Color else None,
        "path": None,
        "posix": "/data/x",
        "nested": {"a": {"b": [1, 2]}, "3": None},
        "function": None,
        "loss": None,
        "array": None,
        "ordered": {"a": 1},
    }


def test_an_unknown_object_is_a_record_of_what_the_pickle_says() -> None:
    found = read(pickle.dumps(functools.partial(int, base=3), 4))
    assert isinstance(found, Inert)
    assert describe(found) == "functools.partial"
    assert isinstance(found.state, tuple)
    assert found.state[2] == {"base": 3}
    found = read(pickle.dumps(OrderedDict, 4))
    assert not isinstance(found, type | Inert)


def _tensor_pickle(storage: bytes = b"X\1\0\0\0k", body: bytes = b"K\0K\2\x85K\1\x85") -> bytes:
    """A rebuilt tensor: `body` puts offset, size and stride."""
    pid = b"(X\7\0\0\0storagectorch\nBFloat16Storage\n" + storage + b"X\3\0\0\0cpuK\x09tQ"
    return proto(b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + body + b"\x89}tR", 2)


def test_a_tensor_is_a_view_of_a_storage() -> None:
    assert read(_tensor_pickle(), storages=True) == StoredView(
        Storage(BF16, "k", 9), BF16, 0, (2,), (1,)
    )
    assert Storage(BF16, "k", 9).nbytes == 18
    assert Storage(None, "k", 9).nbytes == 9


@pytest.mark.parametrize(
    "body",
    [
        b"J\xff\xff\xff\xffK\2\x85K\1\x85",  # offset -1
        b"K\0J\xff\xff\xff\xff\x85K\1\x85",  # size -1
        b"K\0K\2\x85J\xff\xff\xff\xff\x85",  # stride -1
        b"K\0K\2\x85K\1K\1\x86",  # more strides than sizes
        b"K\0K\2\x85)",
        b"K\0G?\xf0\0\0\0\0\0\0\x85K\1\x85",  # size 1.0
        b"K\0\x88\x85K\1\x85",  # size True
        b"\x88K\2\x85K\1\x85",  # offset True
        b"K\0K\2K\1",  # size 2
        b"K\0\x8a\x09\0\0\0\0\0\0\0\x80\0\x85K\1\x85",  # size 2**63
        b"K\0(" + b"K\1" * 65 + b"t(" + b"K\1" * 65 + b"t",  # 65 axes
        b"NK\2\x85K\1\x85",
    ],
)
def test_impossible_tensors_are_refused(body: bytes) -> None:
    with pytest.raises(CheckpointError):
        loads(_tensor_pickle(body=body), "test.pkl", storages=True)


@pytest.mark.parametrize(
    "pid",
    [
        b"X\1\0\0\0a",
        b"(X\7\0\0\0storageX\1\0\0\0aX\1\0\0\0kX\1\0\0\0cK\1t",
        b"(X\7\0\0\0storagectorch\nFloatStorage\nK\1X\1\0\0\0cK\1t",
        b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0kX\1\0\0\0cJ\xff\xff\xff\xfft",
        b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0kX\1\0\0\0ct",
        b"(X\7\0\0\0storagectorch\nno\nX\1\0\0\0kX\1\0\0\0cK\1t",
        b"N",
    ],
)
def test_persistent_ids_other_than_storages_are_refused(pid: bytes) -> None:
    with pytest.raises(CheckpointError, match="persistent id"):
        loads(proto(pid + b"Q", 2), "test.pkl", storages=True)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.zeros(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
        (torch.zeros(2, dtype=torch.complex32), "torch.complex32"),
        (torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8), None),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_such_as_no_weight_is_are_inert(value: torch.Tensor, kind: str | None) -> None:
    """A trainer's state may hold some; it must not keep the weights from being read."""
    file = io.BytesIO()
    torch.save({"tensor": value, "step": 3}, file)
    content = file.getvalue()
    found = load_object(lambda at, count: content[at : at + count], len(content), "file")
    assert isinstance(found, dict)
    assert found["step"] == 3
    assert isinstance(found["tensor"], Inert)
    assert kind is None or describe(found["tensor"]) == kind


def test_keys_of_enums_and_numbers() -> None:
    found = read(pickle.dumps({(signal.SIGINT, 1): "a", (torch.float32, None): "b"}, 4))
    assert isinstance(found, dict)
    assert list(found.values()) == ["a", "b"]


def test_a_storage_outside_of_torch_save_is_refused() -> None:
    assert "outside" in refused(_tensor_pickle())


# ---------------------------------------------------------------- nothing happens


class Reduce:
    """Pickled as a call of `function`, with any of the rest that __reduce__ may give."""

    def __init__(self, function: Callable[..., object], *args: object, rest: object = ()) -> None:
        self.value = (function, args, *rest)  # type: ignore[misc]

    def __reduce__(self) -> tuple[object, ...]:
        return self.value


def _evil() -> dict[str, object]:
    system = Reduce(os.system, "touch /tmp/mcorefs-pwned")
    code = "open('/tmp/mcorefs-pwned', 'w')"
    return {
        "os.system": system,
        "eval": Reduce(eval, code),
        "exec": Reduce(exec, code),
        "import": Reduce(__import__, "antigravity"),
        "partial": Reduce(functools.partial, os.system, "id"),
        "called partial": Reduce(Reduce, functools.partial(os.system, "id")),
        "getattr": Reduce(getattr, Reduce(__import__, "os"), "system"),
        "load from bytes": Reduce(torch.storage._load_from_bytes, pickle.dumps(system)),
        "pickle in pickle": Reduce(pickle.loads, pickle.dumps(system)),
        "chain": Reduce(list, Reduce(map, eval, Reduce(iter, [code]))),
        "popen": Reduce(subprocess.Popen, ["id"]),
        "resolve": Reduce(__import__("pkgutil").resolve_name, "os:system"),
        "breakpoint": Reduce(breakpoint),
        "state": Reduce(Attributes, rest=[{"__class__": system, "set_state": system}]),
        "items": Reduce(OrderedDict, rest=[None, None, iter([("a", system)])]),
        "setter": Reduce(OrderedDict, rest=[{"a": 1}, None, None, exec]),
        "metadata": Reduce(TorchMetadataIndex, rest=[{"fqn": system}]),
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", sorted(_evil()))
def test_nothing_in_a_pickle_is_called(name: str, protocol: int) -> None:
    data = pickle.dumps({"args": _evil()[name]}, protocol)
    assert any(opcode.name == "REDUCE" for opcode, _, _ in pickletools.genops(data))
    try:
        found = read(data)
    except CheckpointError:
        return
    plain(found)
    assert isinstance(found, dict)
    assert not callable(found["args"])


_ATTRIBUTES = b"cargparse\nNamespace\n)\x81"
_OS_SYSTEM = b"\x8c\x02os\x8c\x06system\x93"


@pytest.mark.parametrize(
    "body",
    [
        _OS_SYSTEM + b"\x8c\x02id\x85R",
        b"cos\nsystem\n\x8c\x02id\x85R",
        _OS_SYSTEM + b"\x8c\x02id\x85\x81",
        _OS_SYSTEM + b"\x8c\x02id\x85}\x92",
        # Module and name are themselves what calls made.
        b"cbuiltins\nstr\n\x8c\x02os\x85R\x8c\x06system\x93\x8c\x02id\x85R",
        # What a call gave is called.
        b"cbuiltins\ngetattr\ncos\n__dict__\n\x8c\x06system\x86R\x8c\x02id\x85R",
        # State for a class, a function, a dtype, a string, a list; as a dict and as slots.
        b"cargparse\nNamespace\n}\x8c\x01aK\1sb",
        b"ctorch.storage\nUntypedStorage\n}\x8c\x01aK\1sb",
        b"ctorch\nfloat32\n}\x8c\x04nameK\1sb",
        b"\x8c\x01a}\x8c\x01aK\1sb",
        b"]}\x8c\x01aK\1sb",
        _ATTRIBUTES + b"N}\x8c\x09__class__cos\nsystem\ns\x86b",
        _ATTRIBUTES + b"N}\x8c\x08__dict__K\1s\x86b",
        _ATTRIBUTES + b"K\1b",
        _ATTRIBUTES + b"cos\nsystem\n)\x81b",
        # Attributes that would replace methods or the class, then used.
        _ATTRIBUTES + b"}\x8c\x09set_statecos\nsystem\nsb}\x8c\x01aK\1sb",
        _ATTRIBUTES + b"}\x8c\x09__class__cos\nsystem\nsb}\x8c\x01aK\1sb",
        _ATTRIBUTES + b"}\x8c\x06extendcos\nsystem\nsb(K\1e",
        # Items for what has none.
        _ATTRIBUTES + b"(K\1K\2u",
        b"cargparse\nNamespace\nK\1a",
        b"K\1K\2a",
        b"K\1(K\2\x90",
        b")K\1K\2s",
        # Arguments that constructors do not take.
        b"cargparse\nNamespace\nK\1\x85R",
        b"ccollections\nOrderedDict\n](K\1K\2\x86e\x85R",
        b"ctorch\nSize\nK\1\x85R",
        b"ctorch\nSize\n)R",
        b"cpathlib\nPosixPath\nK\1\x85R",
        b"cpathlib\nPosixPath\n]\x85R",
        # Not a tuple of arguments; not a name.
        b"cos\nsystem\n]R",
        b"cos\nsystem\nNR",
        b"K\1)R",
        b"ctorch\nfloat32\n)R",
        b"K\1K\2\x93",
        # Opcodes that are not spoken: EXT, INST, OBJ, PERSID, text, buffers, DUP.
        b"\x82\x01",
        b"\x83\x01\x00",
        b"\x84\x01\x00\x00\x00",
        b"(ios\nsystem\n",
        b"(cos\nsystem\n\x8c\x02ido",
        b"Pid\n",
        b"I1\n",
        b"\x97",
        b"\x98",
        b"K\x012\x86",
        b"\xff",
    ],
)
def test_opcodes_do_nothing_but_make_values(body: bytes) -> None:
    copyreg.add_extension("os", "system", 1)
    try:
        found = read(proto(body))
    except CheckpointError:
        return
    finally:
        copyreg.remove_extension("os", "system", 1)
    assert type(found) in (Inert, Attributes)


# ---------------------------------------------------------------- malformed


def _real() -> bytes:
    value = {"a": [1, 2.5, "x", (1, 2, 3), None], "args": argparse.Namespace(x=torch.float32, y=-1)}
    return pickle.dumps(value, 4)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_cut_is_refused(protocol: int) -> None:
    data = pickle.dumps(pickle.loads(_real()), protocol)  # noqa: S301  (our own)
    for end in range(len(data)):
        refused(data[:end])
    read(data)


def test_bytes_that_follow_are_refused() -> None:
    assert "1 bytes follow" in refused(_real() + b"\0")
    refused(_real() + _real())


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_any_bytes_give_a_value_or_a_checkpoint_error(data: st.DataObject) -> None:
    damaged = bytearray(_real())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(2, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    with suppress(CheckpointError):
        loads(bytes(damaged), "test.pkl")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"N.",
        b"\x80",
        b"\x80\x01N.",
        b"\x80\x06N.",
        b"PK\3\4",
        b"\0" * 100,
        proto(b""),
        proto(b"NN"),
        proto(b"(N"),
        proto(b"0N"),
        proto(b"h\0"),
        proto(b"j\xff\xff\xff\xff"),
        proto(b"t"),
        proto(b"\x85"),
        proto(b"K\1\x86"),
        proto(b"(K\1K\2K\3u"),
        proto(b"}(K\1K\2K\3u"),
        proto(b"cos"),
        proto(b"cos\nsystem"),
        proto(b"c" + b"a" * 3000 + b"\nb\n"),
        proto(b"}]K\1s"),  # a list as a key
        proto(b"}}K\1s"),
        proto(b"}]\x85K\1s"),
        proto(b"(]\x91"),
    ],
)
def test_malformed_pickles_are_refused(data: bytes) -> None:
    refused(data)


# ---------------------------------------------------------------- bombs


def test_bombs_are_harmless() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.pickle_bombs"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]
    assert done.stdout.endswith("all harmless\n")


def test_plain_ends_on_a_list_of_few_bytes_and_many_values() -> None:
    laugh: object = ["ha"] * 10
    for _ in range(20):
        laugh = [laugh] * 10
    found = read(pickle.dumps(laugh, 4))
    with pytest.raises(CheckpointError, match="too much"):
        plain(found)
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises(CheckpointError, match="too deeply"):
        plain(circle)


def test_descriptions_are_short_and_printable() -> None:
    found = read(proto(b"c\x1b[31m" + b"a" * 300 + b"\nb\x7f\n)R"))
    assert describe(found).startswith("\\x1b[31m")
    assert len(describe(found)) < 100
    assert repr(found) == f"<{describe(found)}>"
    assert describe([[]]) == "list"
    assert describe(BF16) == "bfloat16"
