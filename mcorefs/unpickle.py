"""The one unpickler: reads pickles from checkpoints as data, and runs nothing in them.

`find_class` never imports. A name on the short list below becomes a constructor written here; any
other name becomes an inert record that keeps what the pickle says of the object (arguments, state,
items) and does nothing. torch and megatron are not needed, whatever versions wrote the file.
Names that occur: Megatron-LM:megatron/core/safe_globals.py and
pytorch:torch/distributed/checkpoint/metadata.py.
"""

from __future__ import annotations

import gc
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from mcorefs.boxes import Shape
from mcorefs.dtypes import BY_TORCH, DType
from mcorefs.errors import CheckpointError


class _Sealed(type):
    """A class that a pickle cannot alter: BUILD on a class would otherwise set attributes on it."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise TypeError(f"a pickle tried to set {name!r} on class {cls.__name__}")


@dataclass(frozen=True, slots=True)
class _Constructor:
    """A function of this module as a pickle sees it: callable, and nothing can be set on it."""

    call: Callable[..., object]

    def __call__(self, *args: object) -> object:
        return self.call(*args)


class Inert(metaclass=_Sealed):
    """An object of a class that mcorefs does not construct: what the pickle said, as data."""

    name = ""
    """Dotted name of the class or function in the pickle."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    state: object
    items: list[object]

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        self = object.__new__(cls)
        self.args, self.kwargs = args, kwargs
        self.state, self.items = None, []
        return self

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def append(self, item: object) -> None:
        self.items.append(item)

    def extend(self, items: list[object]) -> None:
        self.items.extend(items)

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Attributes(metaclass=_Sealed):
    """An attribute bag: argparse.Namespace, and the plain dataclasses of `.metadata`.

    Has no __setstate__ on purpose: the C unpickler then fills __dict__ without calling Python,
    which is what makes a `.metadata` of 10^5 chunks load in a second.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.__dict__.update(kwargs)


class TensorProperties(metaclass=_Sealed):
    """torch's TensorProperties: pickled as a tuple with the dtype first."""

    dtype: object = None

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and state:
            self.dtype = state[0]
        elif isinstance(state, dict):
            self.dtype = state.get("dtype")


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage that a tensor in a `torch.save` file views: record `data/<key>`."""

    dtype: DType | None
    """None for an untyped storage, whose numel counts bytes."""
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class StoredView:
    """A tensor in a `torch.save` file: a strided view (in elements) of a storage."""

    storage: Storage
    dtype: DType
    offset: int
    size: Shape
    stride: Shape


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: DType | None


def loads(data: bytes | memoryview, what: str, *, storages: bool = False) -> object:
    """The object that the pickle `data` describes, made of plain values and inert records.

    `what` names the pickle in errors. `storages` admits the persistent ids of `torch.save`.
    Raises CheckpointError if it is not a pickle, is cut short, or is malformed.
    """
    with _gc_paused():
        try:
            return _Unpickler(io.BytesIO(data), storages).load()
        except CheckpointError:
            raise
        except Exception as problem:  # any bytes at all may come in
            raise CheckpointError(
                f"{what} cannot be read as a pickle ({type(problem).__name__}: {problem}). "
                "The file is damaged or is not what its name says."
            ) from None


def plain(value: object) -> object:
    """`value` where it is plain data (or an enum's value), else None.

    An enum member is pickled as a call of its class with its value (Lib/enum.py `__reduce_ex__`).
    """
    if isinstance(value, Inert) and len(value.args) == 1 and value.state is None:
        return plain(value.args[0])
    if isinstance(value, DType):
        return value.torch
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, storages: bool) -> None:
        super().__init__(file, encoding="latin1")
        self._storages = storages
        self._inert: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in BY_TORCH:
            return BY_TORCH[name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = _CONSTRUCTORS.get((module, name))
        if known is not None:
            return known
        key = (module, name)
        if key not in self._inert:
            kind = _Sealed(name, (Inert,), {"name": f"{module}.{name}"})
            self._inert[key] = cast(type[Inert], kind)
        return self._inert[key]

    def persistent_load(self, pid: object) -> Storage:
        if (
            self._storages
            and isinstance(pid, tuple)
            and len(pid) == 5
            and pid[0] == "storage"
            and isinstance(pid[1], _StorageType)
            and isinstance(pid[2], str)
            and isinstance(pid[4], int)
        ):
            return Storage(pid[1].dtype, pid[2], pid[4])
        raise CheckpointError(f"unexpected persistent id {str(pid)[:80]!r} in a pickle")


def _rebuild_tensor(
    storage: object, offset: object, size: object, stride: object, *rest: object
) -> StoredView:
    """torch._utils._rebuild_tensor_v2 and _v3 (whose dtype comes as an argument)."""
    dtype = next((item for item in rest if isinstance(item, DType)), None)
    if isinstance(storage, Storage) and dtype is None:
        dtype = storage.dtype
    if not (isinstance(storage, Storage) and dtype is not None and isinstance(offset, int)):
        raise CheckpointError("a tensor in a torch.save file has a storage of unknown type")
    return StoredView(storage, dtype, offset, _shape(size), _shape(stride))


def _rebuild_from_type(rebuild: object, kind: object, args: object, state: object = None) -> object:
    """torch._tensor._rebuild_from_type_v2: a plain tensor on which attributes were set, or a
    tensor of another class, which stays inert."""
    plain_class = getattr(kind, "name", None) in ("torch.Tensor", "torch.nn.parameter.Parameter")
    if plain_class and isinstance(rebuild, _Constructor) and isinstance(args, tuple):
        return rebuild(*args)
    return kind(state) if isinstance(kind, type) and issubclass(kind, Inert) else Inert(kind, state)


def _shape(value: object) -> Shape:
    if isinstance(value, list | tuple) and all(type(n) is int for n in value):
        return tuple(value)
    raise CheckpointError(f"expected a shape, found {str(value)[:80]!r}")


def _first(value: object = None, *_: object) -> object:
    return value


def _path(*parts: object) -> str:
    return "/".join(str(part) for part in parts)


class Metadata(Attributes):
    """torch's Metadata, the top of a `.metadata` file."""


class MetadataIndex(Attributes):
    """torch's MetadataIndex: (fqn, offset); hashed by identity here."""


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
_CONSTRUCTORS: dict[tuple[str, str], object] = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Constructor(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Constructor(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Constructor(_first),
    ("torch._utils", "_rebuild_parameter_with_state"): _Constructor(_first),
    ("torch._tensor", "_rebuild_from_type_v2"): _Constructor(_rebuild_from_type),
    ("torch.storage", "UntypedStorage"): _StorageType(None),
    ("argparse", "Namespace"): Attributes,
    ("types", "SimpleNamespace"): Attributes,
    ("pathlib", "PosixPath"): _Constructor(_path),
    ("pathlib._local", "PosixPath"): _Constructor(_path),
    (_META, "Metadata"): Metadata,
    (_META, "TensorStorageMetadata"): Attributes,
    (_META, "BytesStorageMetadata"): Inert,
    (_META, "ChunkStorageMetadata"): Attributes,
    (_META, "MetadataIndex"): MetadataIndex,
    (_META, "TensorProperties"): TensorProperties,
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): TensorProperties,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Attributes,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Metadata,
}


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Loading makes only new objects; the collector would look at them again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
