"""Materializing as tasks of a local Ray with several worker processes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from types import ModuleType

import psutil
import pytest

from mcorefs.errors import CheckpointError, OutputError
from mcorefs.files import read_all
from mcorefs.materialize import PARTIAL, materialize
from mcorefs.materialize.on_ray import materialize_on_ray
from mcorefs.model import Options
from mcorefs.tree import VirtualTree, open_tree
from tests.checkpoints import Fixture, ensure
from tests.edited import copy
from tests.test_cli import mcorefs as mcorefs_said

NAME = "qwen3-tp2"


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure([NAME])[NAME]


@pytest.fixture(scope="module")
def cluster() -> Iterator[ModuleType]:
    import ray

    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def check(out: Path, tree: VirtualTree) -> None:
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == set(tree.files)
    for name, file in tree.files.items():
        assert (out / name).read_bytes() == read_all(file), name


def workers() -> list[psutil.Process]:
    """Those that are writing a file right now."""
    everyone = psutil.Process().children(recursive=True)
    found: list[psutil.Process] = []
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "ray::_write_file" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_files_of_a_checkpoint(cluster: ModuleType, fixture: Fixture, tmp_path: Path) -> None:
    options = Options(shard_size="40KB")
    tree = open_tree(fixture.root, options).tree
    progress: list[int] = []
    out = tmp_path / "out"
    written = materialize_on_ray(tree, fixture.root, options, out, on_progress=progress.append)
    check(out, tree)
    assert (written.files, written.missing) == (len(tree.files), ())
    assert sum(progress) == written.total_bytes == tree.total_bytes


def test_a_worker_is_killed_midway(cluster: ModuleType, fixture: Fixture, tmp_path: Path) -> None:
    """Its file is gone on with by another worker. Reading slowly leaves the time to kill one."""
    options = Options(shard_size="200KB", max_read_rate=100_000)
    tree, out = open_tree(fixture.root, options).tree, tmp_path / "out"
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            begun = list((out / PARTIAL).glob("*.part"))
            for victim in workers() if begun else ():
                victim.kill()
                killed.append(victim.pid)
                return
            time.sleep(0.02)

    killer = Thread(target=kill)
    killer.start()
    materialize_on_ray(tree, fixture.root, options, out)
    killer.join()
    assert killed
    check(out, open_tree(fixture.root, Options(shard_size="200KB")).tree)


def test_a_fault_in_a_worker_is_told_as_it_is(
    cluster: ModuleType, fixture: Fixture, tmp_path: Path
) -> None:
    iteration = copy(fixture, tmp_path / "run")
    options = Options(shard_size="40KB")
    tree = open_tree(iteration, options).tree
    for shard in iteration.glob("*.distcp"):
        shard.rename(shard.with_suffix(".away"))
    with pytest.raises(CheckpointError, match="distcp: No such file"):
        materialize_on_ray(tree, iteration, options, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()
    for shard in iteration.glob("*.away"):
        shard.rename(shard.with_suffix(".distcp"))
    materialize_on_ray(tree, iteration, options, tmp_path / "out")
    check(tmp_path / "out", tree)


def test_nodes_that_see_another_checkpoint(
    cluster: ModuleType, fixture: Fixture, tmp_path: Path
) -> None:
    options = Options(shard_size="40KB")
    tree = open_tree(fixture.root, options).tree
    other = copy(fixture, tmp_path / "run")
    with pytest.raises(OutputError, match="is not the same on every node"):
        materialize_on_ray(tree, other, options, tmp_path / "out")


def test_a_checkpoint_that_has_changed_since(
    cluster: ModuleType, fixture: Fixture, tmp_path: Path
) -> None:
    """Workers live on between two materializations."""
    iteration = copy(fixture, tmp_path / "run")
    options = Options(shard_size="40KB")
    for number in (1, 2):
        for shard in iteration.glob("*.distcp"):
            os.utime(shard, (number, number))
        tree = open_tree(iteration, options).tree
        materialize_on_ray(tree, iteration, options, tmp_path / f"out{number}")
        check(tmp_path / f"out{number}", tree)


def test_goes_on_with_what_one_process_began(
    cluster: ModuleType, fixture: Fixture, tmp_path: Path
) -> None:
    from mcorefs.shares import Share

    options, out = Options(shard_size="40KB"), tmp_path / "out"
    tree = open_tree(fixture.root, options).tree
    begun = materialize(tree, out, share=Share(1, 2))
    assert begun.missing
    written = materialize_on_ray(tree, fixture.root, options, out)
    assert written.resumed_bytes == begun.total_bytes
    check(out, tree)


def test_a_cluster_that_is_not_there(fixture: Fixture, tmp_path: Path) -> None:
    said = mcorefs_said(
        "materialize",
        fixture.root,
        tmp_path / "out",
        *("--executor", "ray", "--address", "nowhere"),
        status=1,
    )
    assert "Ray at nowhere cannot be used" in said
