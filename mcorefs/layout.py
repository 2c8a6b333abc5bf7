"""The safetensors files: which tensors go in which file, the header bytes, the index.

Split as `save_pretrained` splits (huggingface_hub's own function) and laid out as the safetensors
library lays out (safetensors/src/tensor.rs: wider and "higher" dtypes first, then by name), so the
files equal byte for byte those that transformers would have written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from json.encoder import encode_basestring, encode_basestring_ascii

from mcorefs.boxes import Shape
from mcorefs.errors import CheckpointError, MappingError
from mcorefs.mapping.plan import HfTensor

MAX_HEADER = 100_000_000
"""safetensors refuses a longer header (src/tensor.rs MAX_HEADER_SIZE)."""

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class SafetensorsLayout:
    """One safetensors file: its header, then the tensors, each beginning where the last ends."""

    header: bytes
    """Length prefix and JSON; a multiple of 8 bytes."""
    tensors: tuple[HfTensor, ...]
    starts: tuple[int, ...]
    """Offset of each tensor in the file; strictly rising except for empty tensors."""
    size: int
    """Bytes in the whole file."""


def lay_out(
    tensors: Sequence[HfTensor], shard_size: int | str
) -> tuple[dict[str, SafetensorsLayout], bytes | None]:
    """(files by name, the index's bytes; None where all fits in one file).

    `tensors` in save_pretrained's order; `shard_size` in bytes, or as "5GB". Raises CheckpointError
    if it is no size, MappingError if a file would have more tensors than readers accept.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name = {tensor.name: tensor for tensor in tensors}
    sizes = {tensor.name: tensor.nbytes for tensor in tensors}
    storages: Counter[str] = Counter()
    for tensor in tensors:
        storages[tensor.storage or tensor.name] += sizes[tensor.name]
    try:
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda tensor: storages[tensor.storage or tensor.name],
            get_storage_id=lambda tensor: tensor.storage or None,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_size,
        )
    except (ValueError, OverflowError) as problem:
        raise CheckpointError(f"--shard-size {shard_size}: {problem}") from None
    files = {
        name: _file([by_name[tensor] for tensor in names], sizes)
        for name, names in split.filename_to_tensors.items()
    }
    if not split.is_sharded:
        return files, None
    return files, _index(tensors, sizes, split.tensor_to_filename)


def _file(tensors: Sequence[HfTensor], sizes: Mapping[str, int]) -> SafetensorsLayout:
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.rank, tensor.name))
    entries = ['{"__metadata__":{"format":"pt"}']
    offsets = [0]
    end = 0
    for tensor in ordered:
        start, end = end, end + sizes[tensor.name]
        offsets.append(end)
        view = tensor.view
        kind = _kind(view.dtype.name, view.shape)
        entries.append(f"{encode_basestring(tensor.name)}:{kind}[{start},{end}]}}")
    text = (",".join(entries) + "}").encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise MappingError(
            f"a safetensors file with {len(tensors)} tensors would need a header of {len(text)} "
            f"bytes, readers accept {MAX_HEADER}; pass a smaller --shard-size",
            [],
        )
    data = 8 + len(text)
    starts = tuple(data + offset for offset in offsets[:-1])
    return SafetensorsLayout(
        len(text).to_bytes(8, "little") + text, tuple(ordered), starts, data + offsets[-1]
    )


@lru_cache(1024)  # of layers and experts, all are alike
def _kind(dtype: str, shape: Shape) -> str:
    """How a header describes a tensor, up to where it lies."""
    described = {"dtype": dtype, "shape": shape, "data_offsets": None}
    return json.dumps(described, separators=(",", ":")).removesuffix("null}")


def _index(
    tensors: Sequence[HfTensor], sizes: Mapping[str, int], weight_map: Mapping[str, str]
) -> bytes:
    """What json.dumps with sorted keys and an indent of 2 makes, which takes it a while."""
    total_size = parameters = 0
    for tensor in tensors:
        nbytes = sizes[tensor.name]
        total_size += nbytes
        parameters += 0 if tensor.is_buffer else nbytes // tensor.dtype.itemsize
    metadata = {"total_parameters": parameters, "total_size": total_size}
    head = json.dumps({"metadata": metadata, "weight_map": {}}, indent=2).removesuffix("{}\n}")
    spelled = {file: json.dumps(file) for file in set(weight_map.values())}
    lines = [
        f"    {encode_basestring_ascii(name)}: {spelled[weight_map[name]]}"
        for name in sorted(weight_map)
    ]
    return (head + "{\n" + ",\n".join(lines) + "\n  }\n}\n").encode()
