"""Every parser of what comes with a checkpoint, as one function of bytes, with small seeds.

What holds of any bytes at all: the parser ends, soon, with a result or with an error that is meant
for it (`Parser.errors`). Where another program reads the same thing, both understand the same.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mcorefs import lightning, steps, tar, torchzip, tracker, unpickle
from mcorefs.encoding import CODECS, Encoding, EncodingError, decode
from mcorefs.errors import CheckpointError, McorefsError
from mcorefs.formats.base import Checkpoint
from mcorefs.formats.dcp import PLANS
from mcorefs.formats.fsdp_dtensor import FsdpDtensor
from mcorefs.formats.huggingface import HuggingFace
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.formats.torch_legacy import TorchLegacy
from mcorefs.formats.zarr import Zarr
from mcorefs.locate import Location
from mcorefs.mapping import tokenizer
from mcorefs.mapping.reference import own_code, read_reference
from mcorefs.model import Options
from mcorefs.pickle_objects import Built, Without
from mcorefs.records import MetadataIndex
from mcorefs.remote import parse_path
from mcorefs.trainers import TRAINERS
from mcorefs.tree import open_tree
from mcorefs.verify.integrity import read_manifest
from scripts.fuzzing import mutators, seeds
from scripts.fuzzing.listed import listed
from scripts.fuzzing.mutators import Mutate


@dataclass(frozen=True)
class Parser:
    """One of them."""

    parse: Callable[[bytes, Path], object]
    """Parses the bytes; the directory is its own, and empty at first."""
    seeds: Callable[[], Iterable[bytes]]
    mutate: Mutate | None = None
    errors: tuple[type[Exception], ...] = (McorefsError,)


# -- pickles and archives --------------------------------------------------------------------------


def _pickle(data: bytes, _: Path) -> None:
    """Series of objects that are made in one step are what their opcodes make one by one; and what
    is needed of a `.metadata` is the same if the rest is passed over."""
    by_opcode = _loaded(_by_opcode(data))
    if isinstance(by_opcode, CheckpointError):
        raise by_opcode
    if _is_taken(found := _loaded(data)):
        assert shown(found) == shown(by_opcode), "a series of opcodes makes something else"
    for without in (_is_needless, lambda fqn: True):
        if _is_taken(part := _loaded(data, PLANS, without)):
            some, all_ = _needed(part, without), _needed(by_opcode, without)
            assert some == all_, f"{some} where all is read: {all_}"


def _is_taken(found: object) -> bool:
    """Whether it was read. Series may be refused where single opcodes are not, for one reason; and
    frames where the other pickle, which is longer, has room for them."""
    if not isinstance(found, CheckpointError):
        return True
    assert "once more" in str(found) or "the frame at" in str(found), found
    return False


def _is_needless(fqn: str) -> bool:
    return "_extra_state" in fqn or "optim" in fqn


def _needed(metadata: object, without: Callable[[str], bool]) -> object:
    """The entries of a `.metadata`, and where they lie."""
    if not isinstance(metadata, unpickle.Metadata):
        return shown(metadata) if metadata is None or isinstance(metadata, int | str) else None
    entries = getattr(metadata, "state_dict_metadata", None)
    places = getattr(metadata, "storage_data", None)
    if not (isinstance(entries, dict) and isinstance(places, dict)):
        return None
    described = {
        fqn: shown(entry)
        for fqn, entry in entries.items()
        if not (isinstance(fqn, str) and without(fqn))
    }
    lies = [
        shown((index.fqn, index.offset, place))
        for index, place in places.items()
        if isinstance(index, MetadataIndex) and not (type(index.fqn) is str and without(index.fqn))
    ]
    return described, lies


def _loaded(data: bytes, until: str | None = None, without: Without | None = None) -> object:
    try:
        return unpickle.loads(data, "it", storages=True, until=until, without=without)
    except CheckpointError as problem:
        return problem


def _by_opcode(data: bytes) -> bytes:
    """The same pickle with another opcode for putting into the memo, as no series has it."""
    ops = mutators.opcodes(data, frames=True)
    count = 0
    for at, op in enumerate(ops):
        if op[:1] == b"\x94" and len(op) == 1:
            ops[at] = b"r" + struct.pack("<I", count)
        count += op[:1] in (b"\x94", b"q", b"r")
    return b"".join(ops)


def shown(value: object, most: int = 20_000) -> list[object]:
    """The first of what there is in it, in order; what holds itself comes again and again."""
    found: list[object] = []
    left = [value]
    while left and len(found) < most:
        one = left.pop()
        if isinstance(one, dict | list | tuple | unpickle.Attributes | Built):
            found.append(type(one).__name__)
            left += list(_inside(one))[:most]
        elif isinstance(one, set | frozenset):
            found.append((type(one).__name__, sorted(map(unpickle.describe, one))))
        else:
            is_plain = isinstance(one, str | bytes | int)
            found.append(
                one
                if is_plain
                else ascii(one)
                if isinstance(one, float)
                else unpickle.describe(one)
            )
    return found


def _inside(one: object) -> Iterable[object]:
    if isinstance(one, dict):
        return [part for pair in one.items() for part in pair]
    if isinstance(one, list | tuple):
        return one
    if isinstance(one, unpickle.Attributes):
        return [one.__dict__]
    return [getattr(one, slot, None) for slot in getattr(type(one), "__slots__", ())]


def _pread(data: bytes) -> torchzip.Pread:
    return lambda at, count: data[at : at + count] if at >= 0 else b""


def _archive(data: bytes, _: Path) -> None:
    """Where Python's own zip reader takes an archive too, it finds the same records in it."""
    records = torchzip.records(_pread(data), len(data), "it")
    with suppress(zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            theirs = {
                one.filename.partition("/")[2]: (one.header_offset, one.file_size)
                for one in archive.infolist()
            }
        ours = {name: (record.header, record.nbytes) for name, record in records.items()}
        assert theirs == ours, f"{ours} is {theirs} to another reader"
    locator = torchzip.Locator()
    with suppress(CheckpointError):
        first = locator.locate(_pread(data), len(data), "it")
        assert locator.locate(_pread(data), len(data), "it") == first
    torchzip.load(_pread(data), len(data), "it")


def _rank_file(data: bytes, directory: Path) -> Checkpoint:
    file = directory / "mp_rank_00/model_optim_rng.pt"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    return TorchLegacy().index(directory)


def _train_state(data: bytes, directory: Path) -> object:
    (directory / tracker.TRAIN_STATE).write_bytes(data)
    return tracker.latest(directory)


def _metadata(data: bytes, directory: Path, fsdp: bool = False) -> Checkpoint:
    (directory / ".metadata").write_bytes(data)
    for name in seeds.SHARDS:
        if not (directory / name).exists():
            with (directory / name).open("wb") as file:
                file.truncate(seeds.SHARD_BYTES)
    kind = FsdpDtensor() if fsdp else TorchDist()
    with suppress(CheckpointError):
        kind.index(directory, "optimizer")
    return kind.index(directory)


# -- files of tensors ------------------------------------------------------------------------------


def _in(name: str, read: Callable[[Path], object], data: bytes, directory: Path) -> object:
    """`read` of the directory with the bytes as its file of that name."""
    file = directory / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return read(directory)


def _index(data: bytes, directory: Path) -> object:
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    if not (directory / names[0]).exists():
        for name, content in zip(names, seeds.safetensors(), strict=True):
            (directory / name).write_bytes(content)
    return _in("model.safetensors.index.json", HuggingFace().index, data, directory)


def _tar(data: bytes, directory: Path) -> None:
    """Where Python's own tar reader takes an archive too, all that it finds is the same."""
    file = directory / "x.nemo"
    file.write_bytes(data)
    tar._read.cache_clear()
    index = tar._index_of(str(file), file.stat())
    with suppress(tarfile.TarError, OSError, ValueError, UnicodeError):
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            theirs = {
                "/".join(part for part in one.name.split("/") if part not in ("", ".")): (
                    one.offset_data,
                    one.size,
                )
                for one in archive.getmembers()
                if one.isfile()
            }
        assert theirs.items() <= index.files.items(), f"{index.files} is {theirs} to another"


def _array(data: bytes, directory: Path) -> object:
    for name in ("0.0", "0.1", "1.0", "1.1"):
        chunk = directory / "decoder.final_layernorm.weight" / name
        if not chunk.exists():
            chunk.parent.mkdir(exist_ok=True)
            chunk.write_bytes(bytes(24))
    return _in("decoder.final_layernorm.weight/.zarray", Zarr().index, data, directory)


def _chunk(data: bytes, _: Path) -> None:
    if data:
        codec = CODECS[data[0] % len(CODECS)]
        out = decode(data[1:], Encoding(codec, 2 * 100))
        assert len(out) == 2 * 100


# -- what describes a model ------------------------------------------------------------------------


def _companions(weights_in: str, name: str, data: bytes, directory: Path) -> None:
    """All trainers look at a checkpoint with the bytes in a file of that name beside it."""
    weights, file = directory / weights_in, directory / name
    for place in (weights, file.parent):
        place.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    checkpoint = Checkpoint("torch_dist", weights, {}, {}, "nothing", {}, {})
    location = Location(directory, weights, 100, TorchDist())
    for trainer in TRAINERS:
        with suppress(CheckpointError):
            found = trainer.read(location, checkpoint)
            if found is not None:
                tokenizer.find(None, weights, None, found.args, ())


def _config(data: bytes, directory: Path) -> None:
    (directory / "config.json").write_bytes(data)
    for name in ("modeling_x.py", "configuration_x.py"):
        (directory / name).touch()
    reference = read_reference(directory)
    for part in (reference, reference.text):
        part.section("vision_config")
    own_code(reference)


def _tokenizer(data: bytes, directory: Path) -> object:
    """The files of a tokenizer by their names, and the arguments of the run."""
    files = _object(data)
    for file in directory.iterdir():
        file.unlink()
    for name in tokenizer.COMPANIONS:
        if name in files:
            said = files[name]
            text = said if isinstance(said, str) else json.dumps(said)
            (directory / name).write_bytes(text.encode(errors="surrogatepass"))
    args = files.get("args")
    args = dict(args) if isinstance(args, dict) else {}
    args |= {
        "vocab_file": str(directory / "vocab.json"),
        "merge_file": str(directory / "merges.txt"),
    }
    tokenizer.find(None, directory / "weights", directory, args, ())
    return tokenizer.find(directory, directory / "weights", None, args)


def _tiktoken(data: bytes, directory: Path) -> object:
    found = _object(data)
    args = found.get("args")
    (directory / "tokenizer.json").write_text(json.dumps(found.get("vocabulary")))
    args = {str(k): v for k, v in args.items()} if isinstance(args, dict) else {}
    return tokenizer.find(directory, directory, None, args)


def _sentencepiece(data: bytes, directory: Path) -> object:
    (directory / "tokenizer.model").write_bytes(data)
    args: Sequence[Mapping[str, object]] = (
        {"tokenizer_type": "Llama2Tokenizer"},
        {"tokenizer_type": "SentencePieceTokenizer", "vocab_extra_ids": 3},
    )
    return [tokenizer.find(directory, directory, None, one) for one in args]


def _listing(data: bytes, _: Path) -> None:
    """A bucket with such keys: to tell what is in it asks for no weights."""
    opened = open_tree(parse_path(f"{listed(_object(data))}://bucket/run"), Options())
    opened.reader.close()


def _object(data: bytes) -> dict[str, object]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _step(path: Path) -> object:
    return steps.read_json(path / "x.json"), lightning.choose([path], None)


def _beside(
    weights_in: str,
    name: str,
    begin: Callable[[], Iterable[bytes]],
    mutate: Mutate | None = mutators.described,
) -> Parser:
    return Parser(partial(_companions, weights_in, name), begin, mutate)


PARSERS: Mapping[str, Parser] = {
    "pickle": Parser(_pickle, seeds.pickles, mutators.pickled),
    "archive": Parser(_archive, seeds.archives, mutators.zipped),
    "rank-file": Parser(_rank_file, seeds.rank_files, mutators.zipped),
    "train-state": Parser(_train_state, seeds.archives, mutators.zipped),
    "metadata": Parser(_metadata, seeds.metadata, mutators.pickled),
    "metadata-fsdp": Parser(
        partial(_metadata, fsdp=True), partial(seeds.metadata, seeds.FSDP), mutators.pickled
    ),
    "safetensors": Parser(
        partial(_in, "model.safetensors", HuggingFace().index),
        seeds.safetensors,
        mutators.with_header,
    ),
    "index": Parser(_index, seeds.indexes, mutators.described),
    "tar": Parser(_tar, seeds.tars, mutators.tarred),
    "array": Parser(_array, seeds.arrays, mutators.described),
    "chunk": Parser(_chunk, seeds.chunks, None, (EncodingError,)),
    "integrity": Parser(
        partial(_in, "integrity.json", read_manifest), seeds.manifests, mutators.described
    ),
    "run-config": _beside(
        "iter_0000100", "iter_0000100/run_config.yaml", seeds.yamls, mutators.written
    ),
    "nemo-context": _beside("x/weights", "x/context/model.yaml", seeds.yamls, mutators.written),
    "nemo-graph": _beside("x/weights", "x/context/io.json", seeds.objects),
    "nemo-adapter": _beside("x/weights", "x/weights/adapter_metadata.json", seeds.objects),
    "nemo-config": _beside("x/weights", "x/model_config.yaml", seeds.yamls, mutators.written),
    "swift-args": _beside("iter_0000100", "args.json", seeds.objects),
    "verl-config": _beside(
        "global_step_5/actor/dist_ckpt",
        "global_step_5/actor/transformer_config.json",
        seeds.objects,
    ),
    "config": Parser(_config, seeds.configs, mutators.described),
    "tokenizer": Parser(_tokenizer, seeds.tokenizers, mutators.described),
    "tiktoken": Parser(_tiktoken, seeds.tiktokens, mutators.described),
    "sentencepiece": Parser(_sentencepiece, seeds.sentencepieces),
    "listing": Parser(_listing, seeds.listings, mutators.described),
    "tracker": Parser(partial(_in, tracker.TRACKER, tracker.latest), seeds.trackers),
    "backend": Parser(partial(_in, "x.json", _step), seeds.objects, mutators.described),
}
