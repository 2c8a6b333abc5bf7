"""`huggingface`: a model directory that is one already.

    config.json
    model.safetensors, or model-0000I-of-0000N.safetensors and model.safetensors.index.json;
    pytorch_model*.bin likewise, which are never opened: they are pickles

A safetensors file is the length of its header (u64), the header (JSON), the data
(huggingface/safetensors:README.md). It is as long as its header says, or it is refused.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mcorefs.boxes import Box
from mcorefs.dtypes import BY_NAME
from mcorefs.errors import CheckpointError
from mcorefs.formats.base import Checkpoint, WeightsFrom, refusal, side_by_side
from mcorefs.index import Chunk, Span, StoredTensor, stored_tensor
from mcorefs.patience import again
from mcorefs.remote import is_url
from mcorefs.storage import FileIdentity, is_file_name, read_file, regular_file, sees

INDEX = "model.safetensors.index.json"
_BIN_INDEX = "pytorch_model.bin.index.json"
_MAX_INDEX = 1 << 28
"""Bytes of an index that are read: a model of a million tensors needs 100 MB."""
_MAX_HEADER = 100_000_000
"""The library's own limit."""

Resolve = Callable[[Path], Path]
"""Where the file at a path really lies. Raises CheckpointError where it may not be followed."""


@dataclass(frozen=True)
class Weights:
    """The tensors of a directory's safetensors files."""

    tensors: Mapping[str, StoredTensor]
    unknown: Mapping[str, str]
    """dtype, as the header names it, of each tensor whose elements mcorefs cannot handle."""
    files: Mapping[str, FileIdentity]
    ghosts: tuple[str, ...]
    """What is wrong with the index: tensors that it names but that its files do not hold."""


class HuggingFace:
    """Format `huggingface`. Not one that training writes: asked for by name, or found last."""

    name = "huggingface"

    def detect(self, path: Path) -> bool:
        return sees(lambda: (path / "config.json").is_file() and bool(weight_files(path)))

    def index(self, path: Path, weights: WeightsFrom = "model") -> Checkpoint:
        problems: list[str] = []
        if weights == "optimizer":
            problems.append("--weights optimizer: a model directory holds no optimizer's state")
        found = read_weights(path, problems, resolved)
        files = {**found.files, **_bin_files(path, problems)}
        problems.extend(found.ghosts)
        if problems:
            raise refusal(path, problems)
        skipped = {"of an unknown dtype": len(found.unknown)} if found.unknown else {}
        return Checkpoint(self.name, path, found.tensors, {}, "none are needed", files, skipped)


def weight_files(directory: Path) -> list[str]:
    """Names of all files that hold weights of a model; adapters are none."""
    return sorted(
        child.name
        for child in directory.iterdir()
        if not child.name.startswith((".", "adapter_"))
        and (
            child.name.endswith(".safetensors")
            or (child.name.startswith("pytorch_model") and child.name.endswith(".bin"))
        )
    )


def resolved(path: Path) -> Path:
    """Where the file at `path` lies: in its own directory, or where the hub's cache puts files
    (huggingface_hub: snapshots/REVISION/NAME is a link to blobs/HASH beside snapshots)."""
    if not path.is_symlink():
        return path
    try:
        directory, target = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError):  # before Python 3.13 a loop is a RuntimeError
        raise CheckpointError(f"{path} is a symbolic link that leads nowhere") from None
    blobs = [above.parent / "blobs" for above in directory.parents if above.name == "snapshots"]
    if any(target.is_relative_to(home) for home in (directory, *blobs)):
        return target
    raise CheckpointError(
        f"{path} is a symbolic link to {target}; pass the directory that holds the files themselves"
    )


def read_weights(directory: Path, problems: list[str], resolve: Resolve) -> Weights:
    """The tensors in the files that the index names, else in all safetensors files.

    Reads headers only. Adds to `problems` each file that is missing, damaged or of another length
    than its header says.
    """
    named = read_index(directory / INDEX)
    if named is None:
        present = [name for name in weight_files(directory) if name.endswith(".safetensors")]
        named = {name: set[str]() for name in present}
    tensors: dict[str, StoredTensor] = {}
    unknown: dict[str, str] = {}
    files: dict[str, FileIdentity] = {}
    ghosts: list[str] = []

    def look(name: str) -> tuple[Path, FileIdentity, Mapping[str, StoredTensor | str]] | str:
        try:
            path = resolve(directory / name)
            identity, why = regular_file(path)
            return (
                f"{path}: {why}"
                if identity is None
                else (
                    path,
                    identity,
                    again(lambda: dict(read_header(path))),
                )
            )
        except (CheckpointError, OSError) as problem:
            return str(problem)

    ordered = sorted(named.items())
    looked = side_by_side(directory, look, [name for name, _ in ordered])
    for (name, promised), seen in zip(ordered, looked, strict=True):
        if isinstance(seen, str):
            problems.append(seen)
            continue
        path, identity, held = seen
        files[str(path)] = identity
        if missing := sorted(promised - held.keys()):
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            ghosts.append(
                f"{directory / name} does not hold {missing[0]}{more}, which {INDEX} says it does"
            )
        for tensor, found in held.items():
            if tensor in tensors or tensor in unknown:
                problems.append(f"{tensor} is both in {directory / name} and in another file")
            elif isinstance(found, str):
                unknown[tensor] = found
            else:
                tensors[tensor] = found
    return Weights(tensors, unknown, files, tuple(ghosts))


def read_index(path: Path) -> dict[str, set[str]] | None:
    """Which tensors are in which file, None where there is no index. Raises CheckpointError."""
    try:
        weight_map = json.loads(read_file(path, _MAX_INDEX))["weight_map"]
        found: dict[str, set[str]] = {}
        for tensor, name in weight_map.items():
            found.setdefault(str(name), set()).add(tensor)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise CheckpointError(f"{path} cannot be read: {problem!r:.200}") from None
    for name in found:
        if not is_file_name(name):
            raise CheckpointError(f"{path} names a file {name!r:.80}: not a plain name")
    return found


def _bin_files(directory: Path, problems: list[str]) -> dict[str, FileIdentity]:
    """The pickled weights, each of which must be there; nothing looks into them."""
    named = read_index(directory / _BIN_INDEX)
    if named is None:
        named = {name: set() for name in weight_files(directory) if name.endswith(".bin")}
    files: dict[str, FileIdentity] = {}
    for name in sorted(named):
        try:
            path = resolved(directory / name)
        except CheckpointError as problem:
            problems.append(str(problem))
            continue
        identity, why = regular_file(path)
        if identity is None:
            problems.append(f"{path}: {why}")
        else:
            files[str(path)] = identity
    return files


@contextmanager
def _local(path: Path) -> Iterator[str]:
    """A local file with the header and the size of the one at `path`: that itself, if it is one.

    Raises OSError or ValueError.
    """
    if not is_url(str(path)):
        yield str(path)
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if length > _MAX_HEADER:
            raise ValueError(f"its header has {length} bytes")
        head += file.read(length)
    hollow = os.memfd_create("safetensors", os.MFD_CLOEXEC)
    try:
        os.write(hollow, head)
        os.truncate(hollow, size)
        yield f"/proc/self/fd/{hollow}"
    finally:
        os.close(hollow)


def read_header(path: Path) -> Iterator[tuple[str, StoredTensor | str]]:
    """The tensors of a file whose header the safetensors library accepts, which proves that they
    fill it exactly; for a dtype that is not known, its name."""
    from safetensors import SafetensorError, safe_open

    try:
        with _local(path) as local, safe_open(local, framework="np"):
            pass  # it reads and validates the header, no data
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError) as problem:
        raise CheckpointError(f"{path} is not a valid safetensors file: {problem}") from None
    for name, described in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = BY_NAME.get(described["dtype"]), tuple(described["shape"])
        if dtype is None:
            yield name, described["dtype"]
            continue
        start, end = described["data_offsets"]
        chunk = Chunk(Box.whole(shape), Span(str(path), 8 + length + start, end - start))
        tensor, why = stored_tensor(name, dtype, shape, (chunk,))
        if tensor is None:
            raise CheckpointError(f"{path}: {why}")
        yield name, tensor
