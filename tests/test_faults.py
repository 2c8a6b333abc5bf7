"""What befalls a mounted checkpoint: the right bytes or EIO with one log line; never a dead daemon.

The shards are on a second FUSE file system, which fails as it is told, or on this machine's.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mcorefs.files import read_all
from mcorefs.model import Options
from mcorefs.mount import MountOptions, mounted, mounting
from mcorefs.tree import open_tree
from tests.checkpoints import Fixture, ensure
from tests.faulty_fs import faulty

NAME = "qwen3_moe-tp2-pp2-ep2"
TIMEOUT = 1.0
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure([NAME])[NAME]


@pytest.fixture(scope="module")
def expected(fixture: Fixture) -> dict[str, bytes]:
    """Every file of the tree, from the undamaged checkpoint."""
    files = open_tree(fixture.root, Options()).tree.files
    return {name: read_all(file) for name, file in files.items()}


@pytest.fixture
def place() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="mcorefs-faults-"))
    place.chmod(0o755)
    (place / "mnt").mkdir()
    yield place
    for name in ("mnt", "shown"):
        while mounted(place / name) is not None:
            subprocess.run(["umount", "-l", str(place / name)], check=False)
    shutil.rmtree(place)


@dataclass(frozen=True)
class Served:
    """A checkpoint that is mounted."""

    mnt: Path
    iteration: Path
    """Where its shards are."""
    log: Path

    def faults(self) -> list[str]:
        """Lines of the log of the daemon that are about reads."""
        return [line for line in self.log.read_text().splitlines() if "mcorefs.mount: " in line]

    def shards(self) -> list[Path]:
        return sorted(self.iteration.glob("*.distcp"))


@contextmanager
def served(root: Path, fixture: Fixture, place: Path, timeout: float = TIMEOUT) -> Iterator[Served]:
    tree = open_tree(root, Options(read_timeout=timeout)).tree
    options = MountOptions(log_file=place / "log")
    with mounting(tree, place / "mnt", options) as mnt:
        yield Served(mnt, root / fixture.spec.iteration_dir, place / "log")
        # Whatever happened, the daemon lives.
        assert (mnt / "config.json").read_bytes().startswith(b"{")
        assert os.listdir(mnt)


def read(path: Path, patience: float = 30.0) -> bytes | int:
    """The bytes of a file, or the errno of the error; read by another process."""
    done = subprocess.run(["cat", str(path)], capture_output=True, timeout=patience, check=False)
    if done.returncode == 0:
        return done.stdout
    assert b"Input/output error" in done.stderr, done.stderr
    return errno.EIO


# --- storage that fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EAGAIN])
def test_errors_that_pass_are_not_seen(
    number: int, fixture: Fixture, expected: dict[str, bytes], place: Path
) -> None:
    with (
        faulty(fixture.root, place) as (shown, orders),
        served(shown, fixture, place) as mount,
    ):
        for shard in mount.shards():
            (orders / f"errno-{shard.name}").write_text(f"{number} 2")
        assert read(mount.mnt / WEIGHTS) == expected[WEIGHTS]
        assert {order.read_text() for order in orders.iterdir()} == {f"{number} 0"}
        assert not mount.faults()


def test_errors_that_stay_are_eio(
    fixture: Fixture, expected: dict[str, bytes], place: Path
) -> None:
    with (
        faulty(fixture.root, place) as (shown, orders),
        served(shown, fixture, place) as mount,
    ):
        for shard in mount.shards():
            (orders / f"errno-{shard.name}").write_text(f"{errno.EIO} 1000")
        assert read(mount.mnt / WEIGHTS) == errno.EIO
        assert all("Input/output error" in line for line in mount.faults())
        for order in orders.iterdir():
            order.unlink()
        assert read(mount.mnt / WEIGHTS) == expected[WEIGHTS]  # no error is remembered


def test_storage_that_does_not_answer(
    fixture: Fixture, expected: dict[str, bytes], place: Path
) -> None:
    """Who reads it gets EIO when the time is up; nobody else notices; and it recovers."""
    with (
        faulty(fixture.root, place) as (shown, orders),
        served(shown, fixture, place, timeout=3.0) as mount,
    ):
        for shard in mount.shards():
            (orders / f"stall-{shard.name}").touch()
        started = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            readers = [pool.submit(read, mount.mnt / WEIGHTS) for _ in range(16)]
            time.sleep(0.5)
            before = time.monotonic()
            done = subprocess.run(
                ["ls", "-lR", str(mount.mnt)], capture_output=True, timeout=20, check=True
            )
            assert WEIGHTS.encode() in done.stdout
            assert read(mount.mnt / "config.json") == expected["config.json"]
            assert time.monotonic() - before < 1.5
            assert {reader.result() for reader in readers} == {errno.EIO}
        assert 2.5 < time.monotonic() - started < 15
        assert all("does not answer" in line for line in mount.faults())
        again = time.monotonic()
        assert read(mount.mnt / WEIGHTS) == errno.EIO
        assert time.monotonic() - again < 2.5  # what hangs is not waited for once more
        for order in orders.iterdir():
            order.unlink()
        time.sleep(0.5)
        assert read(mount.mnt / WEIGHTS) == expected[WEIGHTS]


def test_a_shard_that_cannot_be_opened_in_time(
    fixture: Fixture, expected: dict[str, bytes], place: Path
) -> None:
    with (
        faulty(fixture.root, place) as (shown, orders),
        served(shown, fixture, place) as mount,
    ):
        for shard in mount.shards():
            (orders / f"stall-open-{shard.name}").touch()
        assert read(mount.mnt / WEIGHTS) == errno.EIO
        for order in orders.iterdir():
            order.unlink()
        time.sleep(0.5)
        assert read(mount.mnt / WEIGHTS) == expected[WEIGHTS]


def test_the_storage_goes_away(fixture: Fixture, place: Path) -> None:
    with (
        faulty(fixture.root, place) as (shown, _),
        served(shown, fixture, place) as mount,
    ):
        subprocess.run(["umount", "-l", str(shown)], check=True)
        assert read(mount.mnt / WEIGHTS) == errno.EIO
