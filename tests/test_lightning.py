"""Which of NeMo 2's checkpoints is opened, and which never."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcorefs import lightning
from mcorefs.errors import CheckpointError
from mcorefs.locate import locate


def name(step: int, suffix: str = "") -> str:
    """As NeMo's default logger has it."""
    return f"qwen3--val_loss={1 + step / 7:.2f}-step={step}-consumed_samples={32 * step}.0{suffix}"


def make(directory: Path) -> Path:
    for file, text in (("metadata.json", '{"sharded_backend": "torch_dist"}'), (".metadata", "")):
        (directory / "weights").mkdir(parents=True, exist_ok=True)
        (directory / "weights" / file).write_text(text)
    (directory / "context").mkdir()
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints, the newer saved as the last one too."""
    for each in (name(9), name(19), name(19, "-last")):
        make(tmp_path / each)
    return tmp_path


def test_every_level_of_one(tmp_path: Path) -> None:
    top = make(tmp_path / name(9))
    for path in (tmp_path, top, top / "weights"):
        found = locate(path)
        assert (found.path, found.iteration) == (top / "weights", 9)
        assert list(found.remarks) == []
        assert locate(path, 9).path == top / "weights"
        with pytest.raises(CheckpointError, match=f"--iteration 10 needs .*, {tmp_path}$"):
            locate(path, 10)


def test_the_last_is_opened(run: Path) -> None:
    found = locate(run)
    assert (found.path, found.iteration) == (run / name(19, "-last") / "weights", 19)
    assert list(found.complete) == [name(9), name(19), name(19, "-last")]
    assert list(found.remarks) == [f"{name(19, '-last')} is opened, of the 3 in {run}"]


def test_a_last_that_is_a_link(tmp_path: Path) -> None:
    """save_last="link" of NeMo's ModelCheckpoint."""
    make(tmp_path / name(9))
    target = make(tmp_path / name(19))
    (tmp_path / name(19, "-last")).symlink_to(target.name)
    assert locate(tmp_path).path == tmp_path / name(19, "-last") / "weights"
    assert locate(tmp_path / name(19, "-last")).path == target / "weights"
    (tmp_path / name(19, "-unfinished")).touch()
    assert locate(tmp_path).path == tmp_path / name(9) / "weights"
    with pytest.raises(CheckpointError, match="is not finished"):
        locate(tmp_path / name(19, "-last"))


def test_a_step_is_asked_for(run: Path) -> None:
    assert locate(run, 9).path == run / name(9) / "weights"
    assert locate(run, 19).path == run / name(19) / "weights"
    with pytest.raises(CheckpointError, match="several checkpoints; pass one of them"):
        locate(run, 29)


def test_none_is_the_last(tmp_path: Path) -> None:
    for step in (9, 19):
        make(tmp_path / name(step))
    with pytest.raises(CheckpointError, match="several checkpoints; pass one of them"):
        locate(tmp_path)


def test_several_are_the_last(tmp_path: Path) -> None:
    for step in (9, 19):
        make(tmp_path / name(step, "-last"))
    assert locate(tmp_path).iteration == 19
    make(tmp_path / "other-last")
    with pytest.raises(CheckpointError, match="several checkpoints; pass one of them"):
        locate(tmp_path)


def test_what_is_not_finished_is_not_opened(run: Path) -> None:
    marker = run / name(19, "-last-unfinished")
    marker.touch()
    found = locate(run, 19)
    assert found.path == run / name(19) / "weights"
    assert list(found.incomplete) == [name(19, "-last")]
    with pytest.raises(CheckpointError, match="several checkpoints"):
        locate(run)
    for path in (run / name(19, "-last"), run / name(19, "-last") / "weights"):
        with pytest.raises(CheckpointError, match=rf"is not finished: as {marker} says"):
            locate(path)
    (run / name(9, "-unfinished")).touch()
    (run / name(19, "-unfinished")).touch()
    with pytest.raises(CheckpointError, match="is not finished"):
        locate(run)


def test_an_average_is_as_finished_as_its_checkpoint(tmp_path: Path) -> None:
    make(tmp_path / name(9, "-EMA"))
    assert locate(tmp_path).iteration == 9
    (tmp_path / name(9, "-unfinished")).touch()
    with pytest.raises(CheckpointError, match="is not finished"):
        locate(tmp_path)


def test_weights_that_are_not_whole(tmp_path: Path) -> None:
    top = make(tmp_path / name(9))
    (top / "weights/.metadata").unlink()
    with pytest.raises(CheckpointError, match=f"{top}/weights cannot be opened: it has metadata"):
        locate(top)


def test_other_checkpoints_beside_nemos(run: Path) -> None:
    make(run / "elsewhere")
    (run / "elsewhere/weights").rename(run / "elsewhere/iter_0000007")
    with pytest.raises(CheckpointError, match="several checkpoints; pass one of them"):
        locate(run)


@pytest.mark.parametrize(
    ("called", "step"),
    [
        (name(99), 99),
        ("step=5", 5),
        ("model_step=5-last", 5),
        ("default", None),
        ("misstep=5", None),
        ("x-step=1.5", None),
        ("x-step=12.5", None),
        ("x-step=" + "9" * 40, None),
    ],
)
def test_the_step_in_a_name(called: str, step: int | None) -> None:
    assert lightning.step(Path("/run") / called / "weights") == step
    assert lightning.step(Path("/run") / called) == step
