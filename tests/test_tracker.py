"""Which iteration was published last, from either file that says so."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mcorefs.errors import CheckpointError
from mcorefs.locate import locate
from mcorefs.tracker import TRACKER, TRAIN_STATE, Latest, is_tracked, latest


def train_state(path: Path, step: object = 100, **changes: object) -> None:
    """As Megatron-Bridge:src/megatron/bridge/training/state.py TrainState.state_dict, with torch's
    own writer."""
    state: dict[str, object] = {
        "step": torch.tensor(step, dtype=torch.int64) if isinstance(step, int) else step,
        "consumed_train_samples": torch.tensor(3200, dtype=torch.int64),
        "skipped_train_samples": torch.tensor(0, dtype=torch.int64),
        "consumed_valid_samples": torch.tensor(0, dtype=torch.int64),
        "floating_point_operations_so_far": torch.tensor(1e15, dtype=torch.float32),
        "do_train": torch.tensor(True),
        "do_valid": torch.tensor(False),
        "do_test": torch.tensor(False),
    }
    torch.save({**state, **changes}, path)


def make(root: Path, *iterations: int) -> Path:
    for iteration in iterations:
        directory = root / f"iter_{iteration:07d}"
        directory.mkdir()
        (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        (directory / ".metadata").write_text("")
    return root


@pytest.mark.parametrize("step", [0, 1, 100, 12_345_678, (1 << 63) - 1])
def test_the_step_of_a_train_state(tmp_path: Path, step: int) -> None:
    train_state(tmp_path / TRAIN_STATE, step)
    assert is_tracked(tmp_path)
    assert latest(tmp_path) == Latest(step, TRAIN_STATE)


def test_nothing_says(tmp_path: Path) -> None:
    (tmp_path / TRACKER).mkdir()
    os.mkfifo(tmp_path / TRAIN_STATE)
    assert not is_tracked(tmp_path)
    assert latest(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "step", "iteration", "file", "remark"),
    [
        ("100", 100, 100, TRACKER, ""),
        ("100\n", 200, 200, TRAIN_STATE, f"{TRACKER} names iteration 100, {TRAIN_STATE} the later"),
        ("300", 200, 300, TRACKER, f"{TRAIN_STATE} names iteration 200, {TRACKER} the later 300"),
        ("release", 0, None, TRACKER, ""),
        ("release", 10, 10, TRAIN_STATE, f"{TRACKER} names release, {TRAIN_STATE} the later 10"),
    ],
)
def test_the_later_of_two_is_right(
    tmp_path: Path, text: str, step: int, iteration: int | None, file: str, remark: str
) -> None:
    (tmp_path / TRACKER).write_text(text)
    train_state(tmp_path / TRAIN_STATE, step)
    found = latest(tmp_path)
    assert found is not None
    assert (found.iteration, found.file) == (iteration, file)
    assert found.remark.startswith(remark)
    assert bool(found.remark) == bool(remark)


def test_it_chooses_the_iteration(tmp_path: Path) -> None:
    make(tmp_path, 100, 200, 300)
    train_state(tmp_path / TRAIN_STATE, 200)
    found = locate(tmp_path)
    assert found.iteration == 200
    assert found.incomplete == ["iter_0000300"]
    assert list(found.remarks) == [
        f"{TRAIN_STATE} names iteration 200; not published: iter_0000300"
    ]
    assert list(locate(tmp_path, 300).remarks) == [
        f"iter_0000300 was not published: {TRAIN_STATE} names iteration 200"
    ]
    (tmp_path / TRACKER).write_text("100")
    assert f"{TRACKER} names iteration 100, {TRAIN_STATE} the later 200" in locate(tmp_path).remarks


def test_one_above_is_a_run(tmp_path: Path) -> None:
    """A root that only a train state marks is found from the directory above."""
    (tmp_path / "run/imported").mkdir(parents=True)
    train_state(make(tmp_path / "run/imported", 0) / TRAIN_STATE, 0)
    assert locate(tmp_path).path == tmp_path / "run/imported/iter_0000000"


class Exploding:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.mkdir, (Path("exploded"),)


def hostile(path: Path) -> None:
    torch.save({"step": Exploding()}, path)


def truncated(path: Path) -> None:
    train_state(path)
    path.write_bytes(path.read_bytes()[:-300])


def shared_storage(path: Path) -> None:
    """A scalar at the end of what it views, and one beyond."""
    train_state(path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("/data/0"))
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data[:4] if member == name else data)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"100"),
        lambda path: path.write_bytes(b"PK\5\6" + bytes(18)),
        lambda path: path.write_bytes(bytes(2 << 20)),
        lambda path: path.write_bytes(pickle.dumps({"step": 100})),
        lambda path: torch.save([1], path),
        lambda path: torch.save({}, path),
        lambda path: torch.save({"step": "100"}, path),
        lambda path: train_state(path, torch.tensor([100])),
        lambda path: train_state(path, torch.tensor(100.0)),
        lambda path: train_state(path, -1),
        lambda path: path.symlink_to("/dev/zero"),
        hostile,
        truncated,
        shared_storage,
    ],
)
def test_a_train_state_that_is_none(tmp_path: Path, write: Any) -> None:
    make(tmp_path, 100, 200)
    write(tmp_path / TRAIN_STATE)
    if (tmp_path / TRAIN_STATE).is_file():  # /dev/zero is none
        with pytest.raises(CheckpointError, match=r"latest_train_state\.pt .*pass --iteration N"):
            locate(tmp_path)
    assert locate(tmp_path, 200).iteration == 200
    (tmp_path / TRACKER).write_text("100")
    assert locate(tmp_path).iteration == 100
    assert not Path("exploded").exists()


def test_a_view_into_a_larger_storage(tmp_path: Path) -> None:
    train_state(tmp_path / TRAIN_STATE, torch.tensor([7, 8, 9])[2])
    assert latest(tmp_path) == Latest(9, TRAIN_STATE)
