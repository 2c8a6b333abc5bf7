"""A directory that is a Hugging Face model already: served as it is, the same files byte for byte.

What trainers save through a bridge (verl by default, ms-swift with save_safetensors) needs no
conversion; it is served so that one command serves every checkpoint of a run. Hidden files are
left out. Nothing is opened but config.json, and the headers of safetensors files, whose lengths
must be what their headers say.

With an adapter, safetensors files have the same headers, and the weights that the adapter changes
are computed when they are read. Whatever else holds weights of the model is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mcorefs.adapters import Outline
from mcorefs.errors import CheckpointError, MappingError, NoWeightsError
from mcorefs.files import BytesFile, VirtualFile
from mcorefs.formats import HUGGINGFACE, Checkpoint
from mcorefs.formats.base import refusal
from mcorefs.formats.huggingface import INDEX, resolved
from mcorefs.layout import SafetensorsLayout
from mcorefs.locate import Location, is_root
from mcorefs.mapping import tokenizer
from mcorefs.mapping.plan import HfTensor
from mcorefs.mapping.tokenizer import Tokenizer
from mcorefs.merging import Merged, merge_into
from mcorefs.model import Options
from mcorefs.reader import Reader, SafetensorsFile
from mcorefs.sources import Adapted
from mcorefs.storage import FileIdentity, Storage, read_file, regular_file
from mcorefs.tracker import TRACKER, TRAIN_STATE
from mcorefs.views import Stored

SMALL = 1 << 20
"""Bytes up to which a file that holds no weights is kept in memory."""
WEIGHTS = (".safetensors", ".bin")
_OTHER_WEIGHTS = re.compile(
    r"\.(?:safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data)(?:\.index\.json)?$"
    r"|^adapter_(?:config|model)\."
)
"""Files with weights in other formats, and an adapter that transformers would put on top."""
_MAX_DEPTH = 8


@dataclass(frozen=True, eq=False)
class StoredFile:
    """A file read where it lies, and only while it is what it was (VirtualFile)."""

    path: str
    size: int
    storage: Storage

    def read_into(self, offset: int, out: memoryview) -> None:
        self.storage.read_into(self.path, offset, out)


@dataclass(frozen=True)
class Passthrough:
    """What is served of such a directory; the counterpart of `Model`."""

    location: Location
    checkpoint: Checkpoint
    tensors: tuple[HfTensor, ...]
    """Those in safetensors files; pickled ones are not looked into."""
    config: Mapping[str, object]
    tokenizer: Tokenizer
    """Only whether there is one: its files are among `files`."""
    files: Mapping[str, tuple[str, FileIdentity]]
    """By relative path: where it really lies, and as what."""
    remarks: tuple[str, ...]
    merged: Merged | None = None
    """The adapter that is in `tensors`, if any."""

    @property
    def adapted(self) -> Adapted | None:
        return None if self.merged is None else self.merged.adapted

    @property
    def outline(self) -> Outline | None:
        return None if self.merged is None else self.merged.outline

    @property
    def identities(self) -> dict[str, FileIdentity]:
        """All files that are read."""
        added = {} if self.merged is None else self.merged.files
        return {**dict(self.files.values()), **added}

    @property
    def architecture(self) -> str:
        named = self.config.get("architectures")
        first = named[0] if isinstance(named, list) and named else self.config.get("model_type")
        return str(first or "a model")

    def serve(self, storage: Storage, reader: Reader) -> dict[str, VirtualFile]:
        """The files of the tree, read through `storage` and the `reader` on top of it."""
        served: dict[str, VirtualFile] = {}
        layouts = self._layouts(storage)
        for name, (path, identity) in self.files.items():
            small = identity.size <= SMALL and not name.endswith(WEIGHTS)
            if path in layouts:
                served[name] = SafetensorsFile(layouts[path], reader)
            elif small or identity.size == 0 or name == "config.json":
                served[name] = BytesFile(storage.read(path, 0, identity.size))
            else:
                served[name] = StoredFile(path, identity.size, storage)
        return served

    def _layouts(self, storage: Storage) -> dict[str, SafetensorsLayout]:
        """By path, the files with weights that an adapter changes: as they lie, header included."""
        if self.merged is None:
            return {}
        placed: dict[str, list[tuple[int, HfTensor]]] = {}
        changed: set[str] = set()
        for tensor in self.tensors:
            for chunk in self.checkpoint.tensors[tensor.name].chunks:  # one, or none of no elements
                placed.setdefault(chunk.span.path, []).append((chunk.span.offset, tensor))
                if not isinstance(tensor.view, Stored):
                    changed.add(chunk.span.path)
        layouts: dict[str, SafetensorsLayout] = {}
        for path in changed:
            starts, tensors = zip(*sorted(placed[path], key=lambda one: one[0]), strict=True)
            header, size = storage.read(path, 0, starts[0]), self.checkpoint.files[path].size
            layouts[path] = SafetensorsLayout(header, tensors, starts, size)
        return layouts


def instead(location: Location, error: NoWeightsError) -> Location:
    """The Hugging Face directory that the trainer saved with an iteration that holds no weights.

    Raises `error` where it saved none.
    """
    if location.huggingface is None:
        raise error
    remark = f"{location.path} holds no weights; the trainer saved them in {location.huggingface}"
    return replace(
        location,
        path=location.huggingface,
        format=HUGGINGFACE,
        remarks=(*location.remarks, remark),
    )


def read(location: Location, options: Options) -> Passthrough:
    """The directory at `location`, all of whose files must be what they seem.

    Raises CheckpointError with every problem found.
    """
    directory = location.path
    problems = _unfit(options)
    files = dict(_files(directory, problems))
    config = _config(directory / "config.json", problems)
    found = tokenizer.within(directory)
    if options.require_tokenizer and not found.found:
        problems.append(f"--require-tokenizer: none found in {directory}")
    if problems:
        raise refusal(directory, problems)
    checkpoint = HUGGINGFACE.index(directory)
    tensors = tuple(HfTensor(name, Stored(held)) for name, held in checkpoint.tensors.items())
    if options.adapter is not None:
        plain = Passthrough(
            location, checkpoint, tensors, config, found, files, tuple(location.remarks)
        )
        return _with_adapter(plain, options)
    remark = "it is a Hugging Face model directory already: served as it is, without conversion"
    remarks = (*location.remarks, remark, *_unused(options))
    return Passthrough(location, checkpoint, tensors, config, found, files, remarks)


def _with_adapter(plain: Passthrough, options: Options) -> Passthrough:
    """`plain` with the adapter that is given. Raises CheckpointError with every problem found."""
    directory, checkpoint = plain.location.path, plain.checkpoint
    problems: list[str] = []
    if checkpoint.skipped:
        problems.append(f"some of its tensors are {', '.join(checkpoint.skipped)}")
    if not plain.tensors:
        problems.append("it holds no safetensors; other files with weights are never opened")
    merged = merge_into(directory, plain.tensors, plain.config, options)
    problems += merged.problems
    if problems:
        raise MappingError(
            f"the adapter in {options.adapter} cannot be merged into {directory}:", problems
        )
    used = {chunk.span.path for held in checkpoint.tensors.values() for chunk in held.chunks}
    files = {
        name: (path, identity)
        for name, (path, identity) in plain.files.items()
        if path in used or name == INDEX or not _OTHER_WEIGHTS.search(name)
    }
    remarks = [*plain.remarks, *merged.remarks, *_unused(options)]
    if left_out := ", ".join(sorted(plain.files.keys() - files.keys())):
        remarks.append(f"left out, since the adapter is not in them: {left_out}")
    return replace(
        plain, tensors=merged.tensors, files=files, remarks=tuple(remarks), merged=merged
    )


def _unfit(options: Options) -> list[str]:
    """Options that would need other bytes."""
    given = {
        "--dtype": options.dtype,
        "--vocab-size": options.vocab_size,
        "--tokenizer": options.tokenizer,
        "--weights": None if options.weights == "model" else options.weights,
    }
    return [
        f"{name} cannot be given for a Hugging Face model directory, which is served as it is"
        for name, value in given.items()
        if value is not None
    ]


def _unused(options: Options) -> list[str]:
    given = {
        "--hf-config": options.hf_config,
        "--family": options.family,
        "--task": options.task,
    }
    return [f"{name} is not used" for name, value in given.items() if value is not None]


def _files(directory: Path, problems: list[str]) -> Iterator[tuple[str, tuple[str, FileIdentity]]]:
    """The files to serve by relative path, each with where it lies.

    A directory that also holds iterations is a run's: only its own files are the model's.
    """
    is_run = is_root(directory)
    for name in _names(directory, "", 0 if is_run else _MAX_DEPTH, problems):
        if is_run and name in (TRACKER, TRAIN_STATE):
            continue
        try:
            path = resolved(directory / name)
        except (CheckpointError, OSError) as problem:
            problems.append(str(problem))
            continue
        identity, why = regular_file(path)
        if identity is None:
            problems.append(f"{directory / name}: {why}")
        else:
            yield name, (str(path), identity)


def _names(directory: Path, prefix: str, depth: int, problems: list[str]) -> Iterator[str]:
    try:
        ordered = sorted(directory.iterdir(), key=lambda entry: entry.name)
    except OSError as problem:
        problems.append(f"{directory} cannot be listed: {problem.strerror}")
        return
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield prefix + entry.name
        elif entry.is_symlink():
            if depth:
                problems.append(f"{directory / entry.name} is a symbolic link to a directory")
        elif depth:
            yield from _names(directory / entry.name, f"{prefix}{entry.name}/", depth - 1, problems)


def _config(path: Path, problems: list[str]) -> Mapping[str, object]:
    try:
        config = json.loads(read_file(resolved(path), SMALL << 4))
    except (CheckpointError, OSError, ValueError, RecursionError) as problem:
        problems.append(f"{path} cannot be read: {problem}")
        return {}
    if not isinstance(config, dict):
        problems.append(f"{path} is not the config.json of a model: it holds no JSON object")
        return {}
    return config
