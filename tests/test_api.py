"""`mcorefs.open` against safetensors' own reader on the model the checkpoint was made from."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open

import mcorefs
from mcorefs import ReadFault, abreast
from mcorefs.files import read_all
from tests.checkpoints import Fixture, ensure


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure(["qwen3_moe-tp2-pp2-ep2-etp2"])["qwen3_moe-tp2-pp2-ep2-etp2"]


def test_reads_as_safe_open_does(fixture: Fixture) -> None:
    with (
        safe_open(fixture.hf / "model.safetensors", framework="pt") as expected,
        mcorefs.open(fixture.root, vocab_size=fixture.spec.vocab_size) as found,
    ):
        assert sorted(found.keys()) == sorted(expected.keys())
        for name in list(expected.keys()):
            tensor, ours = expected.get_tensor(name), found.get_tensor(name)
            assert isinstance(ours, torch.Tensor)
            assert ours.dtype == tensor.dtype
            assert torch.equal(ours, tensor)
            ours.fill_(0)  # it is the caller's own
            assert torch.equal(found.get_tensor(name), tensor)  # type: ignore[arg-type]
            theirs, part = expected.get_slice(name), found.get_slice(name)
            assert part.get_shape() == theirs.get_shape()
            assert part.get_dtype() == theirs.get_dtype()


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_tensors_are_read_in_shares(
    fixture: Fixture, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Straight from the shards, gathered (o_proj, casts) and in tiles, ends within an element."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8))
    monkeypatch.setattr(abreast, "PAGE", 1)
    shared: set[str] = set()
    with (
        safe_open(fixture.hf / "model.safetensors", framework="pt") as expected,
        mcorefs.open(fixture.root, vocab_size=fixture.spec.vocab_size, dtype=dtype) as found,
    ):
        for share in (24, 1000):
            monkeypatch.setattr(abreast, "LEAST_SHARE", share)
            for name in found.keys():  # noqa: SIM118 (a method)
                tensor = expected.get_tensor(name)
                if dtype is not None and not name.endswith("mlp.gate.weight"):
                    tensor = tensor.to(getattr(torch, dtype))
                assert torch.equal(found.get_tensor(name), tensor)  # type: ignore[arg-type]
        shared |= {thread.name for thread in threading.enumerate()}
    assert any(name.startswith("mcorefs-read") for name in shared)
    for thread in threading.enumerate():
        if thread.name.startswith("mcorefs-read"):
            thread.join(10)
            assert not thread.is_alive()


def test_what_one_thread_cannot_read_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(4))
    ended: list[int] = []

    def read(start: int, end: int) -> None:
        if start == bad:
            raise ReadFault(f"byte {start}")
        time.sleep(0.05)
        ended.append(start)

    crew = abreast.Crew()
    for bad in (0, 2 << 20):
        ended.clear()
        with pytest.raises(ReadFault, match=f"byte {bad}$"):
            crew.read(4 << 20, read)
        assert sorted([*ended, bad]) == [0, 1 << 20, 2 << 20, 3 << 20]
    crew.close()


def test_a_forked_process_reads_on(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As workers of a DataLoader do, with none of the threads of the process they come from."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(4))
    monkeypatch.setattr(abreast, "LEAST_SHARE", 1000)
    with mcorefs.open(fixture.root, framework="np") as found:
        whole = np.asarray(found.get_tensor("lm_head.weight")).tobytes()
        child = os.fork()
        if child == 0:
            same = False
            try:
                signal.alarm(20)
                same = np.asarray(found.get_tensor("lm_head.weight")).tobytes() == whole
            finally:
                os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_slices(fixture: Fixture) -> None:
    with mcorefs.open(fixture.root, framework="np") as found:
        for name in ("model.layers.1.mlp.experts.3.down_proj.weight", "lm_head.weight"):
            whole, part = found.get_tensor(name), found.get_slice(name)
            assert isinstance(whole, np.ndarray)
            assert whole.dtype.name == "bfloat16"
            rows, columns = whole.shape
            for index in (
                np.s_[...],
                np.s_[2:7],
                np.s_[:, 3:9],
                np.s_[..., -1],
                np.s_[5],
                np.s_[-1, 4],
                np.s_[1:20:3, ::7],
                np.s_[::-2],
                np.s_[rows:, :],
                np.s_[3, ..., columns - 2 :],
                np.s_[7:2],
            ):
                ours = part[index]
                assert isinstance(ours, np.ndarray)
                expected = whole[index]
                assert ours.shape == expected.shape
                assert np.array_equal(
                    np.asarray(ours, np.float32), np.asarray(expected, np.float32)
                )
        with mcorefs.open(fixture.root) as torch_found:
            element = torch_found.get_slice(name)[-1, 4]
            assert isinstance(element, torch.Tensor)
            assert element.shape == ()
            assert element.item() == float(whole[-1, 4])
        for wrong in (np.s_[rows], np.s_[-rows - 1], np.s_[0, 0, 0], np.s_[..., ...]):
            with pytest.raises(IndexError):
                part[wrong]


def test_files_and_config_are_those_of_a_mount(fixture: Fixture) -> None:
    with mcorefs.open(str(fixture.root), vocab_size=fixture.spec.vocab_size) as found:
        assert found.config["model_type"] == "qwen3_moe"
        assert (
            read_all(found.files["model.safetensors"])
            == (fixture.hf / "model.safetensors").read_bytes()
        )
        assert (
            read_all(found.files["tokenizer.json"])
            == (fixture.tokenizer / "tokenizer.json").read_bytes()
        )
        with pytest.raises(KeyError):
            found.get_tensor("model.absent.weight")


def test_options(fixture: Fixture) -> None:
    with mcorefs.open(fixture.root, dtype="float32") as cast, mcorefs.open(fixture.root) as stored:
        name = "model.layers.0.self_attn.q_proj.weight"
        exact = stored.get_tensor(name)
        assert isinstance(exact, torch.Tensor)
        assert torch.equal(cast.get_tensor(name), exact.float())  # type: ignore[arg-type]
    with pytest.raises(mcorefs.CheckpointError, match="holds no iter_0000007"):
        mcorefs.open(fixture.root, iteration=7)
    with pytest.raises(mcorefs.McorefsError, match="cache-size asks for"):
        mcorefs.open(fixture.root, cache_size=1 << 60)


def test_the_public_names() -> None:
    assert sorted(mcorefs.__all__) == [
        "Checkpoint",
        "CheckpointError",
        "MappingError",
        "McorefsError",
        "MountError",
        "OutputError",
        "ReadFault",
        "TensorSlice",
        "open",
    ]
