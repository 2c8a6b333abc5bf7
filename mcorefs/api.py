"""`mcorefs.open`: a checkpoint as a Hugging Face model, in this process, without FUSE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike, fspath
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np

from mcorefs.abreast import Crew
from mcorefs.boxes import Box, Shape
from mcorefs.dtypes import DType
from mcorefs.files import VirtualFile
from mcorefs.mapping.plan import HfTensor
from mcorefs.model import Options, parse_adapter
from mcorefs.patience import READ_TIMEOUT
from mcorefs.reader import Reader
from mcorefs.remote import parse_path
from mcorefs.tree import open_tree
from mcorefs.views import Array

if TYPE_CHECKING:
    import torch

Framework = Literal["pt", "np"]
Index = int | slice | EllipsisType


def open(  # noqa: A001 (it is called as mcorefs.open)
    path: str | PathLike[str],
    *,
    framework: Framework = "pt",
    iteration: int | None = None,
    format: str | None = None,  # noqa: A002 (as the option)
    family: str | None = None,
    task: str | None = None,
    hf_config: str | PathLike[str] | None = None,
    tokenizer: str | PathLike[str] | None = None,
    vocab_size: int | None = None,
    dtype: str | None = None,
    weights: str = "model",
    adapter: str | PathLike[str] | None = None,
    mtp: bool = True,
    shard_size: int | str = "50GB",
    cache_size: int | None = None,
    read_timeout: float | None = READ_TIMEOUT,
    index_cache: bool = False,
) -> Checkpoint:
    """Open the checkpoint at `path`; the options are those of `mcorefs mount`.

        with mcorefs.open("ckpt/") as checkpoint:
            checkpoint.keys()
            checkpoint.get_tensor("model.norm.weight")
            checkpoint.get_slice("lm_head.weight")[:100]

    Reads metadata only. What the storage has not answered within `read_timeout` seconds is an
    error, here and in later reads; with None it is waited for. `framework` "pt" gives torch
    tensors, "np" NumPy arrays (bfloat16 and float8 as ml_dtypes). Raises CheckpointError or
    MappingError with every problem found.
    """
    path_of_adapter, scale = (None, None) if adapter is None else parse_adapter(fspath(adapter))
    options = Options(
        iteration=iteration,
        format=format,
        family=family,
        task=task,
        hf_config=None if hf_config is None else parse_path(fspath(hf_config)),
        tokenizer=None if tokenizer is None else parse_path(fspath(tokenizer)),
        vocab_size=vocab_size,
        dtype=dtype,
        weights=weights,
        adapter=path_of_adapter,
        adapter_scale=scale,
        mtp=mtp,
        shard_size=shard_size,
        cache_bytes=cache_size,
        read_timeout=read_timeout,
        index_cache=index_cache,
    )
    opened = open_tree(parse_path(fspath(path)), options)
    source = opened.source
    return Checkpoint(
        framework,
        opened.tree.files,
        source.config,
        source.remarks,
        opened.reader,
        {tensor.name: tensor for tensor in source.tensors},
    )


class Checkpoint:
    """An open checkpoint, in the manner of `safetensors.safe_open`. Thread-safe until closed."""

    files: Mapping[str, VirtualFile]
    """Every file of the model directory that a mount would show, by relative path."""
    config: Mapping[str, object]
    """config.json."""
    remarks: tuple[str, ...]
    """What was assumed, cut, kept or not found."""

    def __init__(
        self,
        framework: Framework,
        files: Mapping[str, VirtualFile],
        config: Mapping[str, object],
        remarks: tuple[str, ...],
        reader: Reader,
        tensors: Mapping[str, HfTensor],
    ) -> None:
        self.files, self.config, self.remarks = files, config, remarks
        self._framework, self._reader, self._tensors = framework, reader, tensors
        self._crew = Crew()

    def keys(self) -> list[str]:
        """Names of all tensors, in the order of `save_pretrained`."""
        return list(self._tensors)

    def get_tensor(self, name: str) -> torch.Tensor | Array:
        """The whole tensor `name`. Raises KeyError, or ReadFault if a shard cannot be read."""
        return self.get_slice(name)[...]

    def get_slice(self, name: str) -> TensorSlice:
        """Tensor `name`, of which nothing is read before it is indexed."""
        return TensorSlice(self._tensors[name], self._reader, self._framework, self._crew)

    def close(self) -> None:
        """Close the shard files. Tensors read before stay valid."""
        self._crew.close()
        self._reader.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class TensorSlice:
    """A tensor that reads what it is indexed with: `slice[2:4, :, 7]`."""

    def __init__(self, tensor: HfTensor, reader: Reader, framework: Framework, crew: Crew) -> None:
        self._tensor, self._reader, self._framework = tensor, reader, framework
        self._crew = crew

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """Name of the dtype in a safetensors header, such as "BF16"."""
        return self._tensor.dtype.name

    def __getitem__(self, index: Index | tuple[Index, ...]) -> torch.Tensor | Array:
        """The elements at `index`: integers, slices and one ellipsis, as in NumPy.

        Steps other than 1 read the elements between them too. Raises IndexError.
        """
        expressions = _expanded(index if isinstance(index, tuple) else (index,), self._tensor.shape)
        box, rest = _box(expressions, self._tensor.shape)
        array = np.asarray(self._read(box)[rest], order="C")
        return _typed(array, self._tensor.dtype, self._framework)

    def _read(self, box: Box) -> Array:
        """Elements `box`; if they are all there are, by several threads where that is faster."""
        view, reader = self._tensor.view, self._reader
        is_part = box != Box.whole(view.shape)
        if is_part or self._crew.shares(self._tensor.nbytes) == 1 or not reader.is_ranged(view):
            return reader.read_box(view, box)
        out = np.empty(view.shape, view.dtype.carrier)
        data = out.reshape(-1).view(np.uint8).data
        self._crew.read(
            out.nbytes, lambda start, end: reader.read_tensor(view, start, data[start:end])
        )
        return out


def _expanded(index: tuple[Index, ...], shape: Shape) -> tuple[int | slice, ...]:
    """`index` with one expression for each axis."""
    given = [part for part in index if part is not Ellipsis]
    if len(index) - len(given) > 1 or len(given) > len(shape):
        raise IndexError(f"index {index} does not fit a tensor of shape {list(shape)}")
    at = next((i for i, part in enumerate(index) if part is Ellipsis), len(index))
    filling = (slice(None),) * (len(shape) - len(given))
    return (*given[:at], *filling, *given[at:])


def _box(index: tuple[int | slice, ...], shape: Shape) -> tuple[Box, tuple[int | slice, ...]]:
    """(the smallest box that holds the elements at `index`, the index of them within the box)."""
    offsets: list[int] = []
    sizes: list[int] = []
    rest: list[int | slice] = []
    for axis, (part, length) in enumerate(zip(index, shape, strict=True)):
        if isinstance(part, slice):
            picked = range(length)[part]
            low = min(picked, default=0)
            size = max(picked, default=low - 1) + 1 - low
            rest.append(slice(None, None, part.step))
        else:
            if not -length <= part < length:
                raise IndexError(f"index {part} is out of range for axis {axis} of {length}")
            low, size = part % length, 1
            rest.append(0)
        offsets.append(low)
        sizes.append(size)
    return Box(tuple(offsets), tuple(sizes)), tuple(rest)


def _typed(array: Array, dtype: DType, framework: Framework) -> torch.Tensor | Array:
    """Elements in the carrier dtype as what they are, without copying where that is possible."""
    if framework == "np":
        return array.view(dtype.values)
    import torch

    kind: torch.dtype = getattr(torch, dtype.torch)
    if math.prod(array.shape) == 0:
        return torch.empty(array.shape, dtype=kind)
    bits = array.view(f"i{dtype.itemsize}" if dtype.itemsize > 1 else "u1")
    return torch.from_numpy(bits).view(kind)
