"""Headers that are no safetensors headers, fed to whatever reads such files: refused with words.

The cases are those that the format's description rules out (huggingface/safetensors:README.md), and
how its readers were attacked; written anew here.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from mcorefs.errors import CheckpointError, McorefsError
from mcorefs.files import read_all
from mcorefs.formats.huggingface import read_weights, resolved
from mcorefs.model import Options
from mcorefs.tree import open_tree


def file(header: object, data: int = 0, length: int | None = None) -> bytes:
    """A file of that header (bytes, or what JSON can hold) and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def tensor(shape: object, start: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


MANY = {f"t{i}": tensor([1], 0, 4) for i in range(100_000)}
INVALID: Mapping[str, bytes] = {
    "empty": b"",
    "no header": bytes(7),
    "header of no bytes": bytes(8),
    "header longer than the file": file(b"{}", length=3),
    "header of an exabyte": file(b"{}", length=1 << 60),
    "header of all ones": file(b"{}", length=(1 << 64) - 1),
    "header beyond the limit": file(b"{}".ljust(100_000_001)),
    "not UTF-8": file(b'{"\xff\xfe": 1}'),
    "surrogates": file(
        b'{"\xed\xa0\x80": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', 4
    ),
    "not JSON": file(b"{" * 8),
    "a list": file([]),
    "a number": file(b"1"),
    "null": file(b"null"),
    "deep": file(b"[" * 50_000 + b"]" * 50_000),
    "bytes behind the JSON": file(b'{} {"a": 1}'),
    "whitespace before it": file(b"   {}x"),
    "data that no tensor has": file({}, 4),
    "a hole at the start": file({"a": tensor([1], 4, 8)}, 8),
    "a hole between": file({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, 12),
    "bytes behind the last": file({"a": tensor([1], 0, 4)}, 8),
    "cut short": file({"a": tensor([2], 0, 8)}, 7),
    "overlap": file({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, 12),
    "the same bytes twice": file({"a": tensor([1], 0, 4), "b": tensor([1], 0, 4)}, 4),
    "the same bytes 100,000 times": file(MANY, 4),
    "offsets that go back": file({"a": tensor([1], 4, 0)}, 4),
    "a negative offset": file({"a": tensor([1], -4, 0)}, 4),
    "an offset of 2^64": file({"a": tensor([1], 1 << 64, (1 << 64) + 4)}, 4),
    "an offset that is no integer": file({"a": tensor([1], 0.0, 4.0)}, 4),
    "three offsets": file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, 4),
    "no offsets": file({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "too few bytes": file({"a": tensor([2], 0, 4)}, 4),
    "too many bytes": file({"a": tensor([1], 0, 8)}, 8),
    "a shape whose product overflows": file({"a": tensor([1 << 32, 1 << 32], 0, 0)}),
    "a shape whose bytes overflow": file({"a": tensor([1 << 62], 0, 0)}),
    "a negative shape": file({"a": tensor([-1], 0, 4)}, 4),
    "a shape of text": file({"a": tensor("1", 0, 4)}, 4),
    "a shape of floats": file({"a": tensor([1.0], 0, 4)}, 4),
    "a shape that is none": file({"a": tensor(None, 0, 4)}, 4),
    "a dtype that is none": file({"a": tensor([1], 0, 4, "F33")}, 4),
    "a dtype that is a number": file({"a": tensor([1], 0, 4, 32)}, 4),
    "metadata of numbers": file({"__metadata__": {"a": 1}}),
    "metadata that is a list": file({"__metadata__": []}),
    "metadata that nests": file({"__metadata__": {"a": {"b": "c"}}}),
    "a tensor that is text": file({"a": "b"}),
    "a name twice": file(
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        8,
    ),
    "a key twice": file(
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "shape": [2]}}', 4
    ),
    "NaN": file(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', 4),
    "a pickle": b"\x80\2cos\nsystem\nX\2\0\0\0id\x85R.",
    "a zip": b"PK\3\4" + bytes(60),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    return tmp_path


@pytest.mark.parametrize("name", INVALID)
def test_invalid_files_are_refused_with_words(directory: Path, name: str) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(INVALID[name])
    start = time.process_time()
    problems: list[str] = []
    read_weights(directory, problems, resolved)
    assert len(problems) == 1, problems
    assert problems[0].startswith((f"{path} is not a valid safetensors file", f"{path}: a: "))
    assert len(problems[0]) < 1000
    assert problems[0].isprintable()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_tree(directory, Options())
    assert time.process_time() - start < 10


def test_what_the_library_opens_is_opened(directory: Path) -> None:
    """Whether a header is one is the library's to say: of no valid file are we stricter."""
    valid = {
        "nothing": file({}),
        "padding": file(b"{}     "),
        "no elements": file({"a": tensor([0, 1 << 40], 0, 0), "b": tensor([1], 0, 4)}, 4),
        "scalar": file({"a": tensor([], 0, 4)}, 4),
        "order": file({"b": tensor([1], 4, 8), "a": tensor([1], 0, 4)}, 8),
        "odd names": file({"\n": tensor([1], 0, 4), "": tensor([1], 4, 8)}, 8),
    }
    for name, content in valid.items():
        path = directory / "model.safetensors"
        path.write_bytes(content)
        with safe_open(path, "np") as opened:
            names = set(opened.keys())
        problems: list[str] = []
        assert set(read_weights(directory, problems, resolved).tensors) == names, name
        assert not problems, name


def test_flipped_bits_of_a_header(directory: Path) -> None:
    """Each byte changed: refused as the library refuses it, or served as it is."""
    content = file({"__metadata__": {"format": "pt"}, "a": tensor([2, 3], 0, 24)}, 24)
    path = directory / "model.safetensors"
    refused = 0
    for at in range(len(content) - 24):
        for flip in (1, 0x20, 0x80):
            path.write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
            try:
                with safe_open(path, "np"):
                    pass
            except SafetensorError:
                refused += 1
                with pytest.raises(McorefsError):
                    open_tree(directory, Options())
            else:
                served = open_tree(directory, Options()).tree.files["model.safetensors"]
                assert read_all(served) == path.read_bytes()
    assert refused > 100
    os.unlink(path)
