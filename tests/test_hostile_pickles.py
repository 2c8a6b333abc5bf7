"""No pickle of a stranger's does anything, wherever in a checkpoint it lies.

Each payload is put into each place that mcorefs unpickles, and the whole is opened by a process
that would notice (`hostile_pickles`).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import Fixture, ensure
from tests.hostile_pickles import CANARY, MARK, PAYLOADS, archived, as_text, spliced
from tests.test_nemo1 import legacy_folder, packed

DENSE, LEGACY, NEMO = "qwen3-tp2", "torch-qwen3-tp2", "torch-qwen3"


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure([DENSE, LEGACY, NEMO])


Put = Callable[[Path, bytes], None]
"""Puts a payload into the iteration at a path."""


def _metadata(iteration: Path) -> Any:
    return pickle.loads((iteration / ".metadata").read_bytes())  # noqa: S301 (our own)


def all_of_metadata(iteration: Path, payload: bytes) -> None:
    renew(iteration / ".metadata", b"\x80\2" + payload + b".")


def planner_data(iteration: Path, payload: bytes) -> None:
    metadata = _metadata(iteration)
    metadata.planner_data = {"a": MARK}
    renew(iteration / ".metadata", spliced(as_text(metadata), payload))


def entry(iteration: Path, payload: bytes) -> None:
    """What describes a tensor."""
    metadata = _metadata(iteration)
    metadata.state_dict_metadata["decoder.final_layernorm.weight"] = MARK
    renew(iteration / ".metadata", spliced(as_text(metadata), payload))


def embedding(metadata: Any) -> tuple[Any, Any]:
    """Where a part of it lies."""
    places: dict[Any, Any] = metadata.storage_data
    return next(item for item in places.items() if "embedding" in item[0].fqn)


def file_name(iteration: Path, payload: bytes) -> None:
    metadata = _metadata(iteration)
    index, info = embedding(metadata)
    metadata.storage_data[index] = replace(info, relative_path=MARK)
    renew(iteration / ".metadata", spliced(as_text(metadata), payload))


def shard(iteration: Path, payload: bytes) -> None:
    """The archive of a tensor, which is opened when it is read."""
    metadata = _metadata(iteration)
    index, info = embedding(metadata)
    file = iteration / info.relative_path
    data = file.read_bytes()
    evil = archived(torch.zeros(3), payload, "cpu") + bytes(1 << 16)
    # As long as the tensor, which is what .metadata is checked for.
    metadata.storage_data[index] = replace(info, offset=len(data), length=len(evil))
    renew(file, data + evil)
    renew(iteration / ".metadata", pickle.dumps(metadata))


def common(iteration: Path, payload: bytes) -> None:
    state = torch.load(iteration / "common.pt", weights_only=False)
    state["args"].evil = MARK
    renew(iteration / "common.pt", archived(state, payload))


def common_state(iteration: Path, payload: bytes) -> None:
    """Where megatron-core puts it from 0.19 on."""
    state = torch.load(iteration / "common.pt", weights_only=False)
    state["args"].evil = MARK
    metadata = _metadata(iteration)
    index, info = next(iter(metadata.storage_data.items()))
    file = iteration / info.relative_path
    data, evil = file.read_bytes(), archived([state], payload)
    name = "common_state/shard_0_1"
    place = replace(info, offset=len(data), length=len(evil))
    metadata.storage_data[type(index)(name, torch.Size([0]), 0)] = place
    metadata.state_dict_metadata[name] = _bytes_entry()
    renew(file, data + evil)
    renew(iteration / ".metadata", pickle.dumps(metadata))
    (iteration / "common.pt").unlink()


def _bytes_entry() -> object:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    return BytesStorageMetadata()


def rank_file(iteration: Path, payload: bytes) -> None:
    file = iteration / "mp_rank_00/model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["args"].evil = MARK
    renew(file, archived(state, payload))


def rank_file_beside(iteration: Path, payload: bytes) -> None:
    """In what is not looked at: the state of the optimizer."""
    file = iteration / "mp_rank_01/model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["optimizer"] = {"param_groups": [MARK]}
    renew(file, archived(state, payload))


def train_state(iteration: Path, payload: bytes) -> None:
    renew(iteration.parent / "latest_train_state.pt", archived({"step": MARK}, payload))


def nemo_archive(iteration: Path, payload: bytes) -> None:
    """A `.nemo` file in the place of the run."""
    root = iteration.parent
    file = root / "folder/model_weights.ckpt"
    state = torch.load(file, weights_only=False)
    renew(file, archived({**state, "model.decoder.layers.0.mlp._extra_state": MARK}, payload))
    archive = root.with_name(f"{root.name}.nemo")
    packed(root / "folder", archive)
    shutil.rmtree(root)
    archive.rename(root)


def renew(file: Path, data: bytes) -> None:
    """Another file of that name: the old one is a link to what all copies share."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


PLACES: Mapping[str, tuple[str, Put]] = {
    put.__name__: (name, put)
    for name, put in [
        (DENSE, all_of_metadata),
        (DENSE, planner_data),
        (DENSE, entry),
        (DENSE, file_name),
        (DENSE, shard),
        (DENSE, common),
        (DENSE, common_state),
        (LEGACY, rank_file),
        (LEGACY, rank_file_beside),
        (DENSE, train_state),
        (NEMO, nemo_archive),
    ]
}
THOROUGH = ("planner_data", "common")
"""Where all payloads are put: the others are read in one of these two ways."""
MUST_FAIL = ("all_of_metadata", "entry", "file_name", "shard")


@pytest.mark.parametrize("place", PLACES)
def test_nothing_happens(place: str, fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    """Nothing is executed, made, imported or waited for; what is refused is with words that a
    terminal can show; what opens serves the bytes that it would without the payload."""
    name, put = PLACES[place]
    fixture = fixtures[name]
    source = fixture.root
    if put is nemo_archive:
        source = tmp_path / "source"
        legacy_folder(fixture, "model_weights.ckpt", "model.", source)
    runs: dict[str, str] = {}
    payloads = list(PAYLOADS)
    if place not in THOROUGH:
        payloads = payloads[list(PLACES).index(place) % 6 :: 6]
    for number, payload in enumerate(payloads):
        root = tmp_path / (f"{number}.nemo" if put is nemo_archive else f"run{number}")
        shutil.copytree(source, root, copy_function=os.link)
        put(root / fixture.iteration.name, PAYLOADS[payload])
        runs[str(root)] = payload
    (tmp_path / "cwd").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.hostile_pickles",
            str(fixture.spec.vocab_size),
            fixture.spec.hf_max_shard_size or "50GB",
            *runs,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path / "cwd",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]
    assert not list((tmp_path / "cwd").iterdir()), CANARY
    found = {
        runs[path]: (said, how) for path, said, how in map(json.loads, done.stdout.split("\n")[:-1])
    }
    assert [*found] == payloads
    expected = digest(fixture)
    for payload, (said, how) in found.items():
        assert how in ("refused", "fault", expected), (payload, how)
        assert bool(said) == (how != expected)
        assert len(said) < 10_000, payload
        assert all(line.isprintable() for line in said.split("\n")), (payload, said[:300])
        if place in MUST_FAIL:
            assert how != expected, payload
    outcomes = {how for _, how in found.values()}
    assert place in MUST_FAIL or expected in outcomes


def digest(fixture: Fixture) -> str:
    """Of the weights that save_pretrained wrote, as `hostile_pickles.look` computes it."""
    found = hashlib.sha256()
    for file in sorted(fixture.hf.glob("*.safetensors*")):
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()
