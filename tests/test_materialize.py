"""Materializing: the bytes of the tree, resumed after any interruption, refused where unsafe."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mcorefs.errors import OutputError, ReadFault
from mcorefs.files import BytesFile, VirtualFile, read_all
from mcorefs.materialize import PARTIAL, materialize, output
from mcorefs.materialize import writing as module
from mcorefs.materialize.writing import PIECE
from mcorefs.model import Options, load
from mcorefs.tree import VirtualTree, build
from tests.checkpoints import ensure

NAME = "model-00001-of-00002.safetensors"


@dataclass
class Pattern:
    """Bytes that tell their offset; counts what is read, and may fail once it has given `limit`."""

    size: int
    limit: int = 1 << 60
    failure: Callable[[], BaseException] = lambda: ReadFault("shard gone")
    given: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read_into(self, offset: int, out: memoryview) -> None:
        with self.lock:
            if self.given + len(out) > self.limit:
                raise self.failure()
            self.given += len(out)
        first = offset // 8
        words = range(first, (offset + len(out) + 7) // 8 + 1)
        whole = b"".join(word.to_bytes(8, "little") for word in words)
        skip = offset - first * 8
        out[:] = whole[skip : skip + len(out)]


SIZES = {NAME: 3 * (1 << 16) + 13, "model-00002-of-00002.safetensors": 5}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 1 << 12)
    monkeypatch.setattr(module, "SYNC_EVERY", 1 << 14)


def make_tree(source: str = "one", limit: int = 1 << 60) -> VirtualTree:
    files: dict[str, VirtualFile] = {
        "config.json": BytesFile(b"{}"),
        "templates/tool.jinja": BytesFile(b"{{ tool }}"),
        **{name: Pattern(size, limit) for name, size in SIZES.items()},
    }
    return VirtualTree(files, 0, source)


def check(out: Path, tree: VirtualTree) -> None:
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == set(tree.files)
    for name, file in tree.files.items():
        assert (out / name).read_bytes() == read_all(file), name


def test_a_checkpoint_whose_name_is_no_text(tmp_path: Path) -> None:
    tree, out = make_tree(os.fsdecode(b"/runs/n\xff/__0_0.distcp 5 6\n")), tmp_path / "out"
    materialize(tree, out)
    check(out, tree)


def test_whole(tmp_path: Path) -> None:
    progress: list[int] = []
    written = materialize(make_tree(), tmp_path / "a/b", on_progress=progress.append)
    check(tmp_path / "a/b", make_tree())
    assert not (tmp_path / "a/b" / PARTIAL).exists()
    total = sum(file.size for file in make_tree().files.values())
    assert (written.files, written.total_bytes, written.resumed_bytes) == (4, total, 0)
    assert sum(progress) == total


def test_a_checkpoint_becomes_what_save_pretrained_wrote(tmp_path: Path) -> None:
    fixture = ensure(["qwen3-tp2"])["qwen3-tp2"]
    tree, _ = build(load(fixture.root, Options()), "60KB", 1 << 20)
    materialize(tree, tmp_path / "out")
    check(tmp_path / "out", tree)
    for shard in fixture.hf.glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("threads", [1, 4])
def test_resumes_after_a_failed_read(tmp_path: Path, threads: int) -> None:
    with pytest.raises(ReadFault, match="shard gone"):
        materialize(make_tree(limit=100_000), tmp_path / "out", threads)
    assert not (tmp_path / "out/config.json").exists()
    assert not (tmp_path / "out" / NAME).exists()
    tree = make_tree()
    progress: list[int] = []
    written = materialize(tree, tmp_path / "out", threads, progress.append)
    assert written.resumed_bytes >= 1 << 14
    assert sum(progress) == written.total_bytes
    first = tree.files[NAME]
    assert isinstance(first, Pattern)
    assert first.given + written.resumed_bytes == first.size
    check(tmp_path / "out", make_tree())


def dies_before_call(number: int, out: Path) -> bool:
    """Materialize in a child that is killed before its n-th call that writes, syncs or renames;
    False if it ended before that."""
    left = number

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)

        return call

    pid = os.fork()
    if pid == 0:
        try:
            for name in ("pwrite", "replace", "fsync", "fdatasync", "mkdir"):
                setattr(os, name, dying(getattr(os, name)))
            materialize(make_tree(), out, 1)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory where fsync takes no time, if there is one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def test_killed_at_any_point_and_resumed(in_memory: Path) -> None:
    """It never looks complete before it is, and the next run makes it so: before each of the calls
    there are."""
    number, died = -1, True
    while died:
        number += 1
        out = in_memory / str(number)
        died = dies_before_call(number, out)
        for name, file in make_tree().files.items():
            if (out / name).exists():
                assert (out / name).read_bytes() == read_all(file)
        if (out / "config.json").exists():
            assert all((out / name).exists() for name in SIZES)
        if died:
            unfinished = not out.exists() or not any(out.iterdir()) or (out / PARTIAL).exists()
            if unfinished:
                materialize(make_tree(), out)
        check(out, make_tree())
    assert number > 70


def test_unrelated_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").touch()
    with pytest.raises(OutputError, match=r"not empty \(it has 'notes.txt'\)"):
        materialize(make_tree(), out)
    with pytest.raises(OutputError, match="is not a directory"):
        materialize(make_tree(), out / "notes.txt")
    (out / "notes.txt").unlink()
    with pytest.raises(ReadFault):
        materialize(make_tree(limit=50_000), out)
    for other in (make_tree("two"), VirtualTree({"config.json": BytesFile(b"{}")}, 0, "one")):
        with pytest.raises(OutputError, match="unfinished materialization of another checkpoint"):
            materialize(other, out)
    materialize(make_tree(), out)
    with pytest.raises(OutputError, match="not empty"):  # whole: not ours to write again
        materialize(make_tree(), out)


def test_two_at_once(tmp_path: Path) -> None:
    def second() -> BaseException:
        with pytest.raises(OutputError, match="being written by another mcorefs"):
            materialize(make_tree(), tmp_path / "out")
        return ReadFault("enough")

    tree = make_tree()
    tree.files[NAME].limit, tree.files[NAME].failure = 0, second  # type: ignore[attr-defined]
    with pytest.raises(ReadFault, match="enough"):
        materialize(tree, tmp_path / "out", 1)


def test_disk_too_small(tmp_path: Path) -> None:
    tree = VirtualTree({"model.safetensors": Pattern(1 << 60)}, 0)
    with pytest.raises(OutputError, match=r"GB free, but 1,152,921,504\.6 GB are still to be"):
        materialize(tree, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
def test_disk_full_then_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_SPARE", -(1 << 40))  # as if the space went away afterwards
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)], check=True)
    try:
        with pytest.raises(OutputError, match=r"No space left on device\. Run the same command"):
            materialize(make_tree(), disk / "out", threads=1)  # several could fill it together
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        written = materialize(make_tree(), disk / "out")
        assert written.resumed_bytes > 0
        check(disk / "out", make_tree())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_piece_is_small() -> None:
    assert PIECE <= 16 << 20  # per thread: what bounds the memory


def test_killed_at_any_moment_and_resumed(tmp_path: Path) -> None:
    """A real checkpoint, several threads, the command line; killed again and again, at moments that
    nobody chose: it never looks complete before it is, and goes on to the end."""
    fixture = ensure(["qwen3_moe-tp2-pp2-ep2"])["qwen3_moe-tp2-pp2-ep2"]
    expected = {file.name: file.read_bytes() for file in fixture.hf.glob("*.safetensors*")}
    out, rng = tmp_path / "out", random.Random(20)
    command = ["materialize", str(fixture.root), str(out), "--threads", "4"]
    command += ["--vocab-size", str(fixture.spec.vocab_size)]
    command += ["--shard-size", fixture.spec.hf_max_shard_size or "50GB"]
    kills = 0
    for attempt in range(20):
        before = written(out)
        child = subprocess.Popen(
            [sys.executable, "-c", SLOWLY, *command], stdout=subprocess.DEVNULL
        )
        while child.poll() is None and written(out) == before:
            time.sleep(0.005)
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.3 * rng.random())
        if attempt < 5:
            child.kill()
        kills += child.wait() == -signal.SIGKILL
        for name, data in expected.items():
            if (out / name).exists():
                assert (out / name).read_bytes() == data, (attempt, name)
        if (out / "config.json").exists():
            assert all((out / name).exists() for name in expected)
        if (out / "config.json").exists() and not (out / PARTIAL).exists():
            break  # whole, even if it was killed on its way out
    assert kills >= 1  # on a slow machine it may come to its end between two of them
    assert not (out / PARTIAL).exists()
    assert {p.name: p.read_bytes() for p in out.glob("*.safetensors*")} == expected


def written(out: Path) -> set[tuple[str, int]]:
    """How far a materialization came."""
    found = set()
    for path in out.rglob("*"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


SLOWLY = """
import os, time
from mcorefs.cli import main
from mcorefs.materialize import writing
writing.PIECE, writing.SYNC_EVERY = 1 << 12, 1 << 14
real = os.pwrite
def pwrite(*given):
    time.sleep(0.01)
    return real(*given)
os.pwrite = pwrite
main()
"""
