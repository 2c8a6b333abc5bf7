"""`zarr`: checkpoints of the last megatron-core that wrote it, arrays of the zarr package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mcorefs.boxes import Box
from mcorefs.encoding import MAX_NBYTES
from mcorefs.errors import CheckpointError, NoWeightsError, ReadFault
from mcorefs.formats import Checkpoint, detect
from mcorefs.formats.zarr import Zarr
from mcorefs.leaf import StorageLeaf
from mcorefs.model import Options
from mcorefs.storage import Storage
from mcorefs.tree import open_tree
from tests.checkpoints import Fixture, ensure
from tests.checkpoints.pool import OLD_MEGATRON
from tests.edited import copy
from tests.format_contract import served

NAME = "zarr-qwen3-tp2"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
NORM = "decoder.final_layernorm.weight"
PACKAGES = Path(sys.prefix) / OLD_MEGATRON


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure([NAME])[NAME]


@pytest.fixture
def iteration(fixture: Fixture, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return copy(fixture, tmp_path)


def index(iteration: Path) -> Checkpoint:
    return Zarr().index(iteration)


def refusal(iteration: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        index(iteration)
    return str(caught.value)


def described(directory: Path, **changes: object) -> None:
    """Change what `.zarray` in `directory` says; ... takes a key away."""
    file = directory / ".zarray"
    found = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def read(checkpoint: Checkpoint, fqn: str, box: Box | None = None) -> np.ndarray[Any, Any]:
    """Elements `box` of a tensor, as unsigned integers."""
    tensor = checkpoint.tensors[fqn]
    box = box or Box.whole(tensor.shape)
    storage = Storage(checkpoint.files)
    out = np.empty(box.sizes, tensor.dtype.carrier)
    try:
        StorageLeaf(storage)(tensor, box, out)
    finally:
        storage.close()
    return out


def by_zarr(script: str, *args: object) -> None:
    """Run a script with the zarr package, of which there is none in this process."""
    subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGES)},
    )


# -- what is there --------------------------------------------------------------------------------


def test_an_index_of_a_real_checkpoint(fixture: Fixture) -> None:
    found = detect(fixture.iteration)
    assert found is not None
    assert found.name == "zarr"
    checkpoint = found.index(fixture.iteration)
    arrays = {file.parent.name for file in fixture.iteration.glob("*/.zarray")}
    assert set(checkpoint.tensors) == {n for n in arrays if not n.startswith("optimizer.")}
    assert checkpoint.skipped["optimizer"] == len(arrays) - len(checkpoint.tensors) > 0
    objects = list(fixture.iteration.glob("*/shard_*.pt"))
    assert checkpoint.skipped["_extra_state"] + checkpoint.skipped["object"] == len(objects)
    assert checkpoint.args["num_layers"] == fixture.spec.layers
    assert checkpoint.args_source == str(fixture.iteration / "common.pt")
    assert checkpoint.tensors[QKV].dtype.name == "BF16"
    assert len(checkpoint.tensors[QKV].chunks) == fixture.spec.layers * fixture.spec.tp


def test_main_parameters_are_served_from_the_optimizer(fixture: Fixture) -> None:
    checkpoint = Zarr().index(fixture.iteration, "optimizer")
    assert {tensor.dtype.name for tensor in checkpoint.tensors.values()} == {"F32"}
    model = index(fixture.iteration)
    assert set(checkpoint.tensors) == set(model.tensors)
    for fqn in (QKV, NORM):
        main = torch.from_numpy(read(checkpoint, fqn).view(np.float32))
        rounded = read(model, fqn).view(np.int16)
        assert torch.equal(main.bfloat16(), torch.from_numpy(rounded).view(torch.bfloat16))


def test_without_common_pt_the_weights_are_still_served(fixture: Fixture, iteration: Path) -> None:
    (iteration / "common.pt").unlink()
    checkpoint = index(iteration)
    assert not checkpoint.args
    assert checkpoint.args_source == f"{iteration} has no common.pt"


def test_only_an_optimizer(iteration: Path) -> None:
    for file in list(iteration.glob("*/.zarray")):
        if not file.parent.name.startswith("optimizer."):
            shutil.rmtree(file.parent)
    with pytest.raises(NoWeightsError, match="only an optimizer"):
        index(iteration)


RECHUNK = """
import json, shutil, sys
from pathlib import Path
import numcodecs, tensorstore, zarr
iteration, order, codec = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
for file in list(iteration.glob("*/.zarray")):
    old, new = file.parent, file.parent.with_suffix(".new")
    if old.name.startswith("optimizer."):
        continue
    source = zarr.open(str(old), "r")
    array = zarr.create(
        source.shape, store=str(new), dtype=source.dtype, order=order, fill_value=None,
        chunks=tuple(max(1, n * 2 // 5) for n in source.shape),
        compressor=numcodecs.get_codec(codec) if codec else None,
    )
    array._dtype = source.dtype  # as megatron-core does
    array[...] = source[...]
    assert b"<V2" in (new / ".zarray").read_bytes()
    shutil.rmtree(old)
    new.rename(old)
"""


@pytest.mark.parametrize(
    ("order", "codec"),
    [
        ("C", None),
        ("F", None),
        ("C", {"id": "blosc", "cname": "lz4"}),
        ("F", {"id": "blosc", "cname": "zstd", "shuffle": 2}),
        ("C", {"id": "zstd"}),
        ("C", {"id": "lz4"}),
        ("F", {"id": "zlib"}),
    ],
)
def test_a_checkpoint_that_was_chunked_again(
    fixture: Fixture, iteration: Path, order: str, codec: object
) -> None:
    """By the zarr package, in chunks that do not divide the shape, whose dtype it calls `<V2`."""
    by_zarr(RECHUNK, iteration, order, json.dumps(codec))
    opened = open_tree(iteration.parent, Options(vocab_size=fixture.spec.vocab_size))
    expected = {file.name: file.read_bytes() for file in fixture.hf.glob("*.safetensors")}
    assert served(opened) == expected


ARRAYS = """
import itertools, sys
from pathlib import Path
import numpy as np, tensorstore, zarr
directory = Path(sys.argv[1])
random = np.random.default_rng(7)
dtypes = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
cases = [((), ()), ((5,), (2,)), ((5,), (9,)), ((4, 6), (4, 6)), ((7, 5), (3, 2))]
cases.append(((3, 4, 5), (2, 3, 4)))
for number, ((shape, chunks), dtype, order) in enumerate(itertools.product(cases, dtypes, "CF")):
    values = random.integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)
    name = f"{number}.weight"
    zarr.array(values, store=str(directory / name), chunks=chunks, order=order, compressor=None,
               fill_value=None)
    np.save(directory / f"{name}.npy", values)
"""


def test_arrays_of_every_dtype_with_chunks_at_the_edge(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    by_zarr(ARRAYS, tmp_path)
    checkpoint = index(tmp_path)
    assert len(checkpoint.tensors) == 6 * 9 * 2
    for fqn, tensor in checkpoint.tensors.items():
        expected = np.load(tmp_path / f"{fqn}.npy")
        assert (tensor.shape, tensor.dtype.torch) == (expected.shape, str(expected.dtype))
        assert read(checkpoint, fqn).tobytes() == expected.tobytes()
        if len(tensor.shape) == 2:
            found = read(checkpoint, fqn, Box((1, 1), (3, 4)))
            assert found.tobytes() == expected[1:4, 1:5].tobytes()


# -- damaged --------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_said_at_once(iteration: Path) -> None:
    (iteration / QKV / "1.0.0").unlink()
    (iteration / QKV / "2.1.0").unlink()
    os.truncate(iteration / NORM / "0", 100)
    described(iteration / "output_layer.weight", dtype="|O")
    shutil.rmtree(iteration / "embedding.word_embeddings.weight")
    said = refusal(iteration)
    assert f"{QKV}: chunk file {iteration / QKV / '1.0.0'}: No such file" in said
    assert "(and 1 more of its chunks)" in said
    assert f"{iteration / NORM / '0'} is cut short: it has 100 bytes" in said
    assert "[64] bfloat16 has 128; copy it again" in said
    assert "output_layer.weight: .zarray says that its dtype is '|O'" in said
    assert len(said.splitlines()) == 4


def test_a_chunk_that_is_too_long(iteration: Path) -> None:
    os.truncate(iteration / NORM / "0", 130)
    assert "is too long: it has 130 bytes" in refusal(iteration)


def test_a_missing_chunk_is_no_fill_value(iteration: Path) -> None:
    described(iteration / NORM, fill_value=0.0)
    assert read(index(iteration), NORM).shape == (64,)
    (iteration / NORM / "0").unlink()
    assert f"chunk file {iteration / NORM / '0'}: No such file" in refusal(iteration)


@pytest.mark.parametrize("name", ["4.0.0", "0.2.0", "0.0", "0.0.0.0", "00.0.0", "7"])
def test_a_chunk_of_another_save(iteration: Path, name: str) -> None:
    shutil.copy(iteration / QKV / "0.0.0", iteration / QKV / name)
    said = refusal(iteration)
    assert f"{iteration / QKV / name} is outside of shape" in said
    assert "left from another save" in said


def test_other_files_do_not_matter(fixture: Fixture, iteration: Path) -> None:
    (iteration / QKV / ".zattrs").write_text("{}")
    (iteration / QKV / ".nfs0001").write_text("")
    (iteration / f"{QKV}.sync").mkdir()
    (iteration / "notes").mkdir()
    assert set(index(iteration).tensors) == set(index(fixture.iteration).tensors)


def test_an_array_without_its_description(iteration: Path) -> None:
    (iteration / QKV / ".zarray").unlink()
    assert f"{QKV}: it has chunks but no .zarray" in refusal(iteration)


def test_chunks_in_one_place(iteration: Path) -> None:
    """The name of a chunk's file says which chunk it is, so two have one file only by a link. A
    symbolic one is refused. (Hard ones stay, as programs leave them that find equal files.)"""
    first, second = sorted((iteration / QKV).glob("[0-9]*"))[:2]
    second.unlink()
    second.symlink_to(first.name)
    assert f"{second}: is a symbolic link" in refusal(iteration)


def test_an_array_behind_a_link(iteration: Path, tmp_path: Path) -> None:
    (iteration / QKV).rename(tmp_path / "elsewhere")
    (iteration / QKV).symlink_to(tmp_path / "elsewhere")
    assert f"{iteration / QKV} is a symbolic link" in refusal(iteration)


@pytest.mark.parametrize("what", ["link", "fifo", "directory"])
def test_a_description_that_is_no_file(iteration: Path, tmp_path: Path, what: str) -> None:
    file = iteration / QKV / ".zarray"
    file.rename(tmp_path / "kept")
    if what == "link":
        file.symlink_to(tmp_path / "kept")
    elif what == "fifo":
        os.mkfifo(file)
    else:
        file.mkdir()
    assert str(file) in refusal(iteration)


HUGE = 1 << 62
WRONG: list[tuple[dict[str, object], str]] = [
    ({"zarr_format": 3}, "it is not of zarr's format 2"),
    ({"zarr_format": ...}, "it is not of zarr's format 2"),
    ({"dtype": "|O"}, "its dtype is '|O'"),
    ({"dtype": ">f4"}, "its dtype is '>f4'"),
    ({"dtype": "<V4"}, "its dtype is '<V4'"),
    ({"dtype": [["a", "<f4"]]}, "its dtype is [['a', '<f4']]"),
    ({"dtype": ...}, "its dtype is None"),
    ({"shape": [-4, 256, 64]}, "its shape is [-4, 256, 64], which is not possible"),
    ({"shape": [4.0, 256, 64]}, "which is not possible"),
    ({"shape": [True, 256, 64]}, "which is not possible"),
    ({"shape": [1 << 64, 256, 64]}, "which is not possible"),
    ({"shape": "4"}, "its shape is '4'"),
    ({"shape": [1] * 9}, "its shape is"),
    ({"shape": [4, 256]}, "it is [4, 256] in chunks of"),
    ({"shape": [HUGE, HUGE, HUGE]}, "chunks, there are 8"),
    ({"shape": [1 << 40, 256, 64]}, "chunks, there are 8"),
    ({"shape": [8, 256, 64]}, "(and 7 more of its chunks)"),
    ({"chunks": [1, 0, 64]}, "it is [4, 256, 64] in chunks of [1, 0, 64]"),
    ({"chunks": [1, -64, 64]}, "which is not possible"),
    ({"chunks": [HUGE, HUGE, HUGE]}, "each chunk is"),
    ({"chunks": [1, 64, 1 << 50]}, "is cut short"),
    ({"chunks": [1, 1, 1]}, "chunks, there are 8"),
    ({"chunks": None}, "its chunks is None"),
    ({"order": "K"}, "its order is 'K'"),
    ({"order": ["C"]}, "its order is ['C']"),
    ({"filters": [{"id": "delta"}]}, "its chunks went through filters"),
    ({"dimension_separator": "/"}, "its chunks lie in directories of their own"),
    ({"compressor": {"id": "pickle"}}, "its chunks are compressed with 'pickle'; read are blosc"),
    ({"compressor": {"id": ["blosc"]}}, "its chunks are compressed with ['blosc']"),
    ({"compressor": "blosc9"}, "its chunks are compressed with 'blosc9'"),
    ({"compressor": {}}, "its chunks are compressed with None"),
    ({"compressor": {"id": "zlib"}, "chunks": [1 << 20, 64, 64]}, "(zlib) and 8589934592 bytes"),
]


@pytest.mark.parametrize(("changes", "expected"), WRONG)
def test_a_description_that_cannot_be(
    iteration: Path, changes: dict[str, object], expected: str
) -> None:
    described(iteration / QKV, **changes)
    said = refusal(iteration)
    assert QKV in said
    assert expected in said
    assert len(said) < 2000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[" * 60_000,
        '{"a":' * 10_000,
        '{"shape": [' + "9" * 5000 + "]}",
        " " * 70_000,
        "\0",
        "[]",
    ],
)
def test_a_description_that_is_none(iteration: Path, text: str) -> None:
    (iteration / QKV / ".zarray").write_text(text)
    assert QKV in refusal(iteration)


# -- compressed -----------------------------------------------------------------------------------


def compressed(iteration: Path) -> Path:
    """The only chunk of the last norm, compressed."""
    file = iteration / NORM / "0"
    file.write_bytes(zlib.compress(file.read_bytes()))
    described(iteration / NORM, compressor={"id": "zlib", "level": 1})
    return file


def test_a_compressed_chunk_that_is_damaged_is_a_fault(iteration: Path) -> None:
    file = compressed(iteration)
    whole = file.read_bytes()
    for data in (whole[:-1], whole[:9], b"", zlib.compress(bytes(127)), zlib.compress(bytes(129))):
        file.write_bytes(data)
        checkpoint = index(iteration)
        with pytest.raises(ReadFault, match=r"0 cannot be decoded \(zlib\)"):
            read(checkpoint, NORM)


def test_a_compressed_chunk_that_is_far_too_long(iteration: Path) -> None:
    file = compressed(iteration)
    os.truncate(file, 1 << 40)
    assert f"chunk file {file} has {1 << 40} bytes, which is too much" in refusal(iteration)


def test_decoded_chunks_are_kept_within_bounds(tmp_path: Path) -> None:
    """Four chunks of half of what may be kept: the last two are, and no more."""
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    array = tmp_path / "a.weight"
    array.mkdir()
    half = MAX_NBYTES // 2
    meta = {"zarr_format": 2, "shape": [4 * half], "chunks": [half], "dtype": "|u1"}
    meta |= {"compressor": {"id": "zlib"}, "order": "C", "filters": None, "fill_value": None}
    (array / ".zarray").write_text(json.dumps(meta))
    for number in range(4):
        (array / str(number)).write_bytes(zlib.compress(bytes([number]) * half, 1))
    checkpoint = index(tmp_path)
    tensor = checkpoint.tensors["a.weight"]
    storage = Storage(checkpoint.files)
    leaf = StorageLeaf(storage)
    out = np.empty(2, np.uint8)
    for number in (0, 1, 2, 3, 2, 3):
        leaf(tensor, Box((number * half,), (2,)), out)
        assert out.tolist() == [number] * 2
    for number in (0, 1, 2, 3):
        (array / str(number)).write_bytes(b"")  # under its open handle
    leaf(tensor, Box((2 * half,), (2,)), out)
    assert out.tolist() == [2, 2]
    with pytest.raises(ReadFault):
        leaf(tensor, Box((half,), (2,)), out)
    storage.close()


def test_the_oracle_is_not_what_mcorefs_says(fixture: Fixture) -> None:
    """A norm straight from the file, as the Hugging Face model has it."""
    expected = load_file(fixture.hf / "model.safetensors")["model.norm.weight"]
    stored = torch.frombuffer(
        bytearray((fixture.iteration / NORM / "0").read_bytes()), dtype=torch.bfloat16
    )
    assert torch.equal(stored, expected)
