"""The one unpickler: reads pickles from checkpoints as data, and runs nothing in them.

Nothing is ever imported. A name on the short list below becomes a constructor written here; any
other name becomes an inert record that keeps what the pickle says of the object (arguments, state,
items) and does nothing. torch and megatron are not needed, whatever versions wrote the file.
Names that occur: Megatron-LM:megatron/core/safe_globals.py and
pytorch:torch/distributed/checkpoint/metadata.py.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from mcorefs.boxes import Shape
from mcorefs.dtypes import BY_TORCH, DType
from mcorefs.errors import CheckpointError
from mcorefs.memory import gc_paused
from mcorefs.pickle_machine import run
from mcorefs.pickle_objects import Built, Name, PickleError, SkippedError, Without
from mcorefs.places import IndexClass, InfoClass
from mcorefs.records import (
    ChunkClass,
    PropertiesClass,
    RecordClass,
    Size,
    TensorClass,
)

MAX_TENSOR_DIMS = 64
MAX_PLAIN = 1_000_000
"""Values in one training argument; a list that holds another twice makes few bytes many values."""
MAX_PLAIN_DEPTH = 50


class Inert(Built, Name):
    """An object of a class that mcorefs does not construct: what the pickle said, as data.

    Called (bound methods are pickled as a call of getattr), it gives another.
    """

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[object, ...]) -> None:
        self.name = name
        """Dotted name of the class or function in the pickle."""
        self.args = args
        self.state: object = None
        self.items: list[object] = []

    def call(self, args: tuple[object, ...]) -> Inert:
        return Inert(self.name, (self, *args))

    def set_state(self, state: object) -> None:
        self.state = state

    def extend(self, items: list[object]) -> None:
        self.items.extend(items)

    def update(self, pairs: Iterable[tuple[object, object]]) -> None:
        self.items.extend(pairs)

    def __repr__(self) -> str:
        return f"<{describe(self)}>"


class Attributes(Built):
    """An attribute bag: argparse.Namespace, and the plain dataclasses of `.metadata`."""

    def set_state(self, state: object) -> None:
        if type(state) is not dict:
            raise PickleError("attributes that are not a dict")
        self.__dict__ = state  # not copied: one dict may be the state of many objects


class Metadata(Attributes):
    """torch's Metadata, the top of a `.metadata` file."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage that a tensor in a `torch.save` file views: record `data/<key>`."""

    dtype: DType | None
    """None for an untyped storage, whose numel counts bytes."""
    key: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * (self.dtype.itemsize if self.dtype else 1)


@dataclass(frozen=True, slots=True)
class StoredView:
    """A tensor in a `torch.save` file: a strided view (in elements) of a storage.

    No number in it is negative, and `size` and `stride` are of one length.
    """

    storage: Storage
    dtype: DType
    offset: int
    size: Shape
    stride: Shape


def loads(
    data: bytes,
    what: str,
    *,
    storages: bool = False,
    until: str | None = None,
    without: Without | None = None,
) -> object:
    """The object that the pickle `data` describes, made of plain values and inert records.

    `what` names the pickle in errors. `storages` admits the persistent ids of `torch.save`.
    `until` names an attribute of the object with which, and with all that follow it, it does
    without: they are not read. `without` is true of names of which neither tensors nor their
    places in files are needed: these may be missing, and those be SKIPPED.
    Raises CheckpointError if it is not a pickle, is cut short, or is malformed.
    """
    names: dict[tuple[str, str], object] = {}
    shapes: dict[bytes, Shape] = {}

    def find(module: str, name: str) -> object:
        key = module, name
        if key not in names:
            names[key] = _find(module, name, shapes)
        return names[key]

    with gc_paused():
        try:
            persistent = _storage if storages else _no_storage
            try:
                return run(data, find, persistent, until, without)
            except SkippedError:
                names.clear()  # what they stand for knows where things are in the memo
                return run(data, find, persistent, until)
        except Exception as problem:  # any bytes at all may come in
            kind = "" if isinstance(problem, PickleError) else f"{type(problem).__name__}: "
            raise CheckpointError(
                f"{what} cannot be read as a pickle ({kind}{problem!s:.200}). "
                "The file is damaged or is not what its name says."
            ) from None


def describe(value: object) -> str:
    """What `value` is, in a few printable characters, whatever a pickle put in it."""
    if isinstance(value, Inert | _Unknown):
        return ascii(value.name[:80])[1:-1]
    return value.torch if isinstance(value, DType) else type(value).__name__


def plain(value: object) -> object:
    """`value` where it is plain data (or an enum's value), else None.

    An enum member is pickled as a call of its class with its value (Lib/enum.py `__reduce_ex__`).
    Raises CheckpointError if it is nested without end.
    """
    return _plain(value, MAX_PLAIN_DEPTH, iter(range(MAX_PLAIN)))


def _plain(value: object, depth: int, left: Iterator[int]) -> object:
    if depth == 0 or next(left, None) is None:
        raise CheckpointError("a training argument is nested too deeply or holds too much")
    if isinstance(value, Inert) and len(value.args) == 1 and value.state is None:
        return _plain(value.args[0], depth - 1, left)
    if isinstance(value, DType):
        return value.torch
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, depth - 1, left) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth - 1, left) for key, item in value.items()}
    return None


@dataclass(frozen=True, slots=True, eq=False)
class _Unknown(Name):
    """A class or function that is not constructed."""

    name: str

    def call(self, args: tuple[object, ...]) -> Inert:
        return Inert(self.name, args)


@dataclass(frozen=True, slots=True, eq=False)
class _Class(Name):
    """A class of this module."""

    kind: Callable[[], object]

    def call(self, args: tuple[object, ...]) -> object:
        if args:
            raise PickleError(f"{self.kind} takes no arguments")
        return self.kind()


@dataclass(frozen=True, slots=True, eq=False)
class _Function(Name):
    """A function of this module."""

    function: Callable[..., object]

    def call(self, args: tuple[object, ...]) -> object:
        if len(args) > 16:
            raise PickleError(f"{self.function.__name__} with {len(args)} arguments")
        return self.function(*args)


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: DType | None


def _find(module: str, name: str, shapes: dict[bytes, Shape]) -> object:
    if module == "torch" and name in BY_TORCH:
        return BY_TORCH[name]
    if module == "torch" and name in _STORAGES:
        return _STORAGES[name]
    if (record := _RECORDS.get((module, name))) is not None:
        return record(shapes)
    return _KNOWN.get((module, name)) or _Unknown(f"{module}.{name}")


def _storage(pid: object) -> Storage | Inert:
    """The storage that a persistent id means; inert where its elements (complex, quantised) are of
    a kind that no weight has."""
    match pid:
        case ("storage", _StorageType(dtype), str(key), _, int(numel)) if numel >= 0:
            return Storage(dtype, key, numel)
        case ("storage", _Unknown(name), str(), _, int()) if name.endswith("Storage"):
            return Inert(name, ())
    raise PickleError("a persistent id is not that of a storage")


def _no_storage(pid: object) -> Storage:
    raise PickleError("it refers to a storage outside of itself")


def _rebuild_tensor(
    storage: object, offset: object, size: object, stride: object, *rest: object
) -> StoredView | Inert:
    """torch._utils._rebuild_tensor_v2 and _v3 (whose dtype comes as an argument); inert where its
    elements are of a kind that no weight has."""
    dtype = next((item for item in rest if isinstance(item, DType | _Unknown)), None)
    if isinstance(storage, Storage) and dtype is None:
        dtype = storage.dtype
    if not isinstance(storage, Storage) or not isinstance(dtype, DType):
        return Inert(describe(storage if dtype is None else dtype), ())
    (start,) = _numbers((offset,))
    sizes, strides = _numbers(size), _numbers(stride)
    if len(sizes) != len(strides):
        raise PickleError("a tensor has a stride for some axes only")
    return StoredView(storage, dtype, start, sizes, strides)


def _numbers(value: object) -> Shape:
    """Numbers of elements, such as no tensor is without."""
    if (
        isinstance(value, list | tuple)
        and len(value) <= MAX_TENSOR_DIMS
        and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
    ):
        return tuple(value)
    raise PickleError("a tensor has an impossible shape")


def _rebuild_from_type(function: object, kind: object, args: object, state: object) -> object:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, or of a class of its own."""
    ours = isinstance(kind, _Unknown) and kind.name in _PLAIN_TENSORS
    if ours and isinstance(function, Name) and isinstance(args, tuple):
        return function.call(args)
    return Inert(describe(kind), (function, args, state))


_PLAIN_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter")


def _first(value: object = None, *_: object) -> object:
    return value


def _path(*parts: object) -> str:
    if not all(isinstance(part, str) and len(part) < 4096 for part in parts):
        raise PickleError("a path of what are no strings, or too long")
    return posixpath.join("", *map(str, parts))[:4096]


_STORAGES = {
    f"{legacy}Storage": _StorageType(BY_TORCH[torch])
    for legacy, torch in {
        "BFloat16": "bfloat16",
        "Half": "float16",
        "Float": "float32",
        "Double": "float64",
        "Byte": "uint8",
        "Char": "int8",
        "Short": "int16",
        "Int": "int32",
        "Long": "int64",
        "Bool": "bool",
    }.items()
}
_META = "torch.distributed.checkpoint.metadata"
_KNOWN: dict[tuple[str, str], object] = {
    ("torch", "Size"): Size(),
    ("collections", "OrderedDict"): _Class(dict),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_first),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(_first),
    ("torch._tensor", "_rebuild_from_type_v2"): _Function(_rebuild_from_type),
    ("torch.storage", "UntypedStorage"): _StorageType(None),
    ("argparse", "Namespace"): _Class(Attributes),
    ("types", "SimpleNamespace"): _Class(Attributes),
    ("pathlib", "PosixPath"): _Function(_path),
    ("pathlib._local", "PosixPath"): _Function(_path),
    (_META, "Metadata"): _Class(Metadata),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _Class(Metadata),
}


_RECORDS: dict[tuple[str, str], type[RecordClass]] = {
    (_META, "ChunkStorageMetadata"): ChunkClass,
    (_META, "MetadataIndex"): IndexClass,
    (_META, "TensorProperties"): PropertiesClass,
    (_META, "TensorStorageMetadata"): TensorClass,
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): PropertiesClass,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): InfoClass,
}
