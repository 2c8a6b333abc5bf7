"""The files' bytes are those that the safetensors library and save_pretrained write."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save
from transformers import LlamaConfig, LlamaForCausalLM

from mcorefs import layout
from mcorefs.boxes import Box
from mcorefs.dtypes import BY_NAME, BY_TORCH
from mcorefs.errors import CheckpointError, MappingError
from mcorefs.index import stored_tensor
from mcorefs.layout import INDEX, SafetensorsLayout, lay_out
from mcorefs.mapping.plan import HfTensor
from mcorefs.views import Stored
from tests.tilings import raw_chunks, shapes

Tensors = Mapping[str, torch.Tensor]


def planned(tensors: Tensors, buffers: frozenset[str] = frozenset()) -> list[HfTensor]:
    """As if each tensor of the model were one of the checkpoint."""
    found = []
    for name, tensor in tensors.items():
        dtype = BY_TORCH[str(tensor.dtype).removeprefix("torch.")]
        shape = tuple(tensor.shape)
        tiles = [Box.whole(shape)] if math.prod(shape) else []
        stored, problem = stored_tensor(name, dtype, shape, raw_chunks(tiles, dtype.itemsize))
        assert stored, problem
        found.append(HfTensor(name, Stored(stored), is_buffer=name in buffers))
    return found


def content(file: SafetensorsLayout, tensors: Tensors) -> bytes:
    """The file's bytes: `tensors` put where the layout says."""
    data = bytearray(file.size)
    data[: len(file.header)] = file.header
    at = len(file.header)
    for tensor, start in zip(file.tensors, file.starts, strict=True):
        assert start == at
        raw = bits(tensors[tensor.name])
        assert len(raw) == tensor.nbytes
        data[start : start + len(raw)] = raw
        at += len(raw)
    assert at == file.size
    return bytes(data)


def bits(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def one_file(tensors: Tensors) -> bytes:
    files, index = lay_out(planned(tensors), "1TB")
    assert index is None
    assert list(files) == ["model.safetensors"]
    return content(files["model.safetensors"], tensors)


def random_tensor(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    known = BY_NAME[dtype]
    top = 2 if dtype == "BOOL" else 256
    rng = np.random.default_rng(math.prod(shape))
    raw = rng.integers(0, top, math.prod(shape) * known.itemsize, np.uint8)
    if not raw.size:  # torch cannot view nothing as something else
        return torch.zeros(shape, dtype=getattr(torch, known.torch))
    return torch.from_numpy(raw).view(getattr(torch, known.torch)).reshape(shape)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None)
@given(
    st.dictionaries(
        names.filter(lambda name: name != "__metadata__"),
        st.builds(random_tensor, st.sampled_from(sorted(BY_NAME)), shapes() | st.just((3, 0, 2))),
        min_size=1,
        max_size=12,
    )
)
def test_a_file_is_that_of_the_safetensors_library(tensors: Tensors) -> None:
    assert one_file(tensors) == save(dict(tensors), metadata={"format": "pt"})


def test_every_dtype_and_every_odd_name_at_once(tmp_path: Path) -> None:
    odd = [chr(code) for code in range(0x21)] + ['"', "\\", "/", "\x7f", "\x80", "é", "\u2028", "𝄞"]
    tensors = {
        f"{name}{other}": random_tensor(dtype, (2, 3))
        for dtype in BY_NAME
        for name, other in zip(odd, odd[1:] + odd[:1], strict=True)
        if (name, dtype) != ("", "")
    }
    tensors |= {
        f"{dtype}.{n}": random_tensor(dtype, (n,) * n) for dtype in BY_NAME for n in (0, 1, 2)
    }
    found = one_file(tensors)
    assert found == save(tensors, metadata={"format": "pt"})
    path = tmp_path / "model.safetensors"
    path.write_bytes(found)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            loaded = file.get_tensor(name)
            assert loaded.dtype == tensor.dtype
            assert loaded.shape == tensor.shape
            assert bits(loaded) == bits(tensor)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Some thirty tensors of six sizes, the largest of them the embeddings; and a buffer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.layers[3].mlp.gate_proj.float()
    model.model.layers[4].mlp.register_buffer("bias", torch.randn(8))
    return model


@pytest.mark.parametrize("size", ["5GB", "100KB", "30KB", "6.4KB", 6400, 6399, 5000, "1KB", 1])
@pytest.mark.parametrize("tied", [False, True])
def test_files_and_index_are_those_of_save_pretrained(
    size: int | str, tied: bool, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    if tied:
        model = LlamaForCausalLM(
            LlamaConfig(**model.config.to_dict() | {"tie_word_embeddings": True})
        )
    model.save_pretrained(tmp_path, max_shard_size=size)
    state = model.state_dict()
    if tied:
        del state["lm_head.weight"]
    buffers = frozenset(name for name, _ in model.named_buffers())
    files, index = lay_out(planned(state, buffers), size)
    wanted = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors*")}
    found = {name: content(file, state) for name, file in files.items()}
    if index is not None:
        found[INDEX] = index
    assert found.keys() == wanted.keys()
    assert found == wanted


def test_a_header_that_no_reader_accepts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = planned({f"layer{i}": torch.zeros(1) for i in range(50)})
    (file,) = lay_out(tensors, "5GB")[0].values()
    length = len(file.header) - 8
    monkeypatch.setattr(layout, "MAX_HEADER", length)
    lay_out(tensors, "5GB")
    monkeypatch.setattr(layout, "MAX_HEADER", length - 1)
    with pytest.raises(MappingError, match=f"header of {length} bytes.*--shard-size"):
        lay_out(tensors, "5GB")
    lay_out(tensors, 100)


@pytest.mark.parametrize("size", ["banana", "", "5", "5XB", "nanGB", "infGB"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(CheckpointError, match="--shard-size"):
        lay_out(planned({"x": torch.zeros(1)}), size)


def test_the_limit_is_that_of_the_library() -> None:
    """A header of the most bytes is read; one byte more is refused."""

    def file(length: int) -> bytes:
        return length.to_bytes(8, "little") + b"{}".ljust(length)

    assert load(file(layout.MAX_HEADER)) == {}
    with pytest.raises(Exception, match=r"(?i)header.*large"):
        load(file(layout.MAX_HEADER + 8))


def test_headers_are_aligned_json() -> None:
    for count in range(1, 9):
        (file,) = lay_out(planned({"x" * count: torch.zeros(3)}), "5GB")[0].values()
        length = int.from_bytes(file.header[:8], "little")
        assert length % 8 == 0
        assert len(file.header) == 8 + length
        assert json.loads(file.header[8:])["x" * count]["data_offsets"] == [0, 12]
