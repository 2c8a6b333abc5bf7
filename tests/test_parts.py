"""Materializing by several processes at once: parts, their locks, and who completes OUT."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcorefs.errors import OutputError, ReadFault
from mcorefs.files import BytesFile, VirtualFile
from mcorefs.materialize import PARTIAL, finish_parts, materialize
from mcorefs.materialize.output import claimed, finish, locked
from mcorefs.shares import Share
from mcorefs.tree import VirtualTree
from tests.checkpoints import Fixture, ensure
from tests.test_cli import mcorefs as mcorefs_said
from tests.test_materialize import Pattern, check

NAME = "qwen3-tp2"
SIZES = [70_001, 50_000, 30_000, 20_000, 10_000, 9]


def make_tree(source: str = "one", sizes: list[int] = SIZES) -> VirtualTree:
    weights: dict[str, VirtualFile] = {
        f"model-{i:05}-of-{len(sizes):05}.safetensors": Pattern(size)
        for i, size in enumerate(sizes, 1)
    }
    small = {"config.json": BytesFile(b"{}"), "model.safetensors.index.json": BytesFile(b"[]")}
    return VirtualTree(weights | small, 0, source)


# -- who writes what -----------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 12))
def test_shares_are_a_partition_and_fair(sizes: list[int], count: int) -> None:
    files = {f"{i:03}": Pattern(size) for i, size in enumerate(sizes)}
    shares = [Share(number, count).names(files) for number in range(1, count + 1)]
    assert sorted(name for names in shares for name in names) == sorted(files)
    loads = [sum(files[name].size for name in names) for names in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "/3", "-1/3", "a/b", "1/2/3", "1/0", ""])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(ValueError, match="part"):
        Share.parse(text)


# -- one after the other -------------------------------------------------------------------------


def test_the_last_part_completes(tmp_path: Path) -> None:
    tree, out = make_tree(), tmp_path / "out"
    for number in (2, 3):
        written = materialize(tree, out, share=Share(number, 3))
        assert written.files in (2, 3)
        assert written.missing == tuple(sorted(written.missing))
        assert not (out / "config.json").exists()
        assert not (out / "model.safetensors.index.json").exists()
        with pytest.raises(OutputError, match=r"is not complete: model-00001.* (is|are) still to"):
            finish_parts(tree, out)
    written = materialize(tree, out, share=Share(1, 3))
    assert (written.files, written.missing) == (1 + 2, ())
    check(out, tree)
    assert not (out / PARTIAL).exists()
    with pytest.raises(OutputError, match="nothing to finish"):
        finish_parts(tree, out)


def test_a_part_without_files(tmp_path: Path) -> None:
    tree = make_tree(sizes=[10, 20])
    idle = Share(3, 3)
    assert materialize(tree, tmp_path / "out", share=idle).files == 0
    assert not (tmp_path / "out").exists()
    materialize(tree, tmp_path / "out")
    assert materialize(tree, tmp_path / "out", share=idle).files == 0  # also when all is done


def test_a_part_that_fails_is_gone_on_with(tmp_path: Path) -> None:
    tree, broken, out = make_tree(), make_tree(), tmp_path / "out"
    first = Share(1, 2).names({n: f for n, f in tree.files.items() if isinstance(f, Pattern)})[0]
    broken.files[first].limit = 0  # type: ignore[attr-defined]
    with pytest.raises(ReadFault):
        materialize(broken, out, share=Share(1, 2))
    assert materialize(tree, out, share=Share(2, 2)).missing
    assert not (out / "config.json").exists()
    assert not materialize(tree, out, share=Share(1, 2)).missing
    check(out, tree)


def test_a_part_that_is_started_again_while_another_completes(tmp_path: Path) -> None:
    """It has found OUT incomplete, and comes to lock its own files when all are there."""
    tree, out = make_tree(), tmp_path / "out"
    with claimed(tree, out) as partial:
        materialize(tree, out)
        with locked(partial / "model-00001-of-00006.safetensors.lock"):
            pass
    assert finish(tree, out) == ()
    check(out, tree)
    assert not (out / PARTIAL).exists()


def test_a_part_that_is_started_again_when_all_is_done(tmp_path: Path) -> None:
    tree, out = make_tree(), tmp_path / "out"
    materialize(tree, out)
    with pytest.raises(OutputError, match="it has all files of this model already"):
        materialize(tree, out, share=Share(1, 2))
    (out / "config.json").unlink()
    with pytest.raises(OutputError, match=r"it has 'model.safetensors.index.json'"):
        materialize(tree, out, share=Share(1, 2))


def test_finish_after_all_died_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, out = make_tree(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("mcorefs.materialize.finish", lambda tree, out: ("as if killed",))
        for number in (1, 2):
            materialize(tree, out, share=Share(number, 2))
    assert not (out / "config.json").exists()
    finish_parts(tree, out)
    check(out, tree)


def test_parts_of_another_plan_are_refused(tmp_path: Path) -> None:
    materialize(make_tree(), tmp_path / "out", share=Share(1, 2))
    with pytest.raises(OutputError, match="unfinished materialization of another checkpoint"):
        materialize(make_tree("two"), tmp_path / "out", share=Share(2, 2))
    with pytest.raises(OutputError, match="unfinished materialization of another checkpoint"):
        finish_parts(make_tree("two"), tmp_path / "out")


def test_a_file_that_is_cut_short_is_not_complete(tmp_path: Path) -> None:
    tree, out = make_tree(), tmp_path / "out"
    materialize(tree, out, share=Share(1, 2))
    done = next(out.glob("*.safetensors"))
    os.truncate(done, done.stat().st_size - 1)
    assert done.name in materialize(tree, out, share=Share(2, 2)).missing
    materialize(tree, out, share=Share(1, 2))
    check(out, tree)


# -- at once -------------------------------------------------------------------------------------


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    tree, out = make_tree(), tmp_path / "out"

    def second() -> BaseException:
        with pytest.raises(OutputError, match="is being written by another mcorefs right now"):
            materialize(make_tree(), out, share=Share(1, 2))
        materialize(make_tree(), out, share=Share(2, 2))  # other files: nobody is in its way
        return ReadFault("enough")

    for name in Share(1, 2).names({n: f for n, f in tree.files.items() if isinstance(f, Pattern)}):
        tree.files[name].limit = 0  # type: ignore[attr-defined]
        tree.files[name].failure = second  # type: ignore[attr-defined]
    with pytest.raises(ReadFault, match="enough"):
        materialize(tree, out, 1, share=Share(1, 2))
    materialize(make_tree(), out, share=Share(1, 2))
    check(out, make_tree())


def test_many_come_to_finish_at_once(tmp_path: Path) -> None:
    """However they interleave, each finds OUT complete, or completes it."""
    for attempt in range(8):
        tree, out = make_tree(sizes=[5] * 6), tmp_path / str(attempt)
        children = []
        for number in range(1, 7):
            pid = os.fork()
            if pid == 0:
                try:
                    missing = materialize(tree, out, 1, share=Share(number, 6)).missing
                    finish(tree, out)
                    os._exit(1 if missing else 0)
                except BaseException:
                    os._exit(2)
            children.append(pid)
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert 2 not in ends
        assert 0 in ends
        check(out, tree)
        assert not (out / PARTIAL).exists()


# -- as jobs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure([NAME])


def test_jobs_of_an_array(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture, out = fixtures[NAME], tmp_path / "out"
    command = [sys.executable, "-m", "mcorefs", "materialize", str(fixture.root), str(out)]
    command += ["--shard-size", "60KB", "--tokenizer", str(fixture.tokenizer)]
    jobs = [
        subprocess.Popen([*command, "--part", f"{number}/3"], stdout=subprocess.PIPE, text=True)
        for number in (1, 2, 3)
    ]
    said = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], said
    assert any("still missing" not in text for text in said)
    assert ", of which part 2 of 3 was written to" in said[1]
    whole = tmp_path / "whole"
    mcorefs_said(
        "materialize", fixture.root, whole, "--shard-size", "60KB", "--tokenizer", fixture.tokenizer
    )
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_options_that_exclude_each_other(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    root, out = fixtures[NAME].root, tmp_path / "out"
    for options, said in (
        (("--part", "1/2", "--finish"), "--part and --finish exclude each other"),
        (("--part", "3/2"), "there is no part 3 of 2"),
        (("--executor", "dask"), "there is only ray"),
        (("--address", "auto"), "pass --executor ray too"),
    ):
        assert said in mcorefs_said("materialize", root, out, *options, status=2)
    assert "nothing to finish" in mcorefs_said("materialize", root, out, "--finish", status=1)
    part = mcorefs_said("materialize", root, out, "--shard-size", "60KB", "--part", "1/2")
    assert "is complete when the other parts are" in part
    assert "is not complete" in mcorefs_said(
        "materialize", root, out, "--shard-size", "60KB", "--finish", status=1
    )
