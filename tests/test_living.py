"""A run that is mounted while it trains: real checkpoints, saved as the trainer saves them, while
others read."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from mcorefs.errors import CheckpointError
from mcorefs.files import read_all
from mcorefs.model import Options
from mcorefs.mount import Living, MountOptions, living, mounted, mounting
from mcorefs.published import Run, find_run
from mcorefs.reader import Reader
from mcorefs.tracker import TRACKER
from tests.checkpoints import Fixture, Spec, ensure_specs

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saves() -> tuple[Fixture, Fixture]:
    """Two checkpoints that differ in nothing but their weights."""
    specs = {f"living-{seed}": Spec(tp=2, seed=seed) for seed in (71, 72)}
    first, second = ensure_specs(specs).values()
    sizes = [{p.name: p.stat().st_size for p in each.hf.iterdir()} for each in (first, second)]
    assert sizes[0] == sizes[1]
    assert weights(first) != weights(second)
    return first, second


def weights(fixture: Fixture) -> bytes:
    """What save_pretrained wrote: the right answer."""
    return (fixture.hf / WEIGHTS).read_bytes()


def steps_of_a_save(fixture: Fixture, root: Path, iteration: int) -> Iterator[str]:
    """Save as megatron-core does, one step at a time: shards, .metadata, metadata.json, tracker."""
    directory = root / f"iter_{iteration:07d}"
    directory.mkdir(exist_ok=True)
    yield "an empty directory"
    last = (".metadata", "metadata.json")
    for file in sorted(fixture.iteration.iterdir()):
        if file.name not in last:
            content = file.read_bytes()
            with open(directory / file.name, "wb") as out:
                out.write(content[: len(content) // 2])
                out.flush()
                yield f"half of {file.name}"
                out.write(content[len(content) // 2 :])
    yield "all shards"
    for name in last:
        temporary = directory / f"{name}.tmp"
        shutil.copyfile(fixture.iteration / name, temporary)
        temporary.rename(directory / name)
        yield name
    with open(root / TRACKER, "w") as tracker:
        yield "an empty tracker"
        tracker.write(str(iteration))


def save(fixture: Fixture, root: Path, iteration: int) -> None:
    for _ in steps_of_a_save(fixture, root, iteration):
        pass


@pytest.fixture
def place() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="mcorefs-living-"))
    (place / "mnt").mkdir()
    (place / "run").mkdir()
    yield place
    while mounted(place / "mnt") is not None:
        subprocess.run(["umount", "-l", str(place / "mnt")], check=False)
    shutil.rmtree(place)


@pytest.fixture(params=["libfuse3", "libfuse2"])
def libfuse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCOREFS_FUSE", str(request.param))


@dataclass(frozen=True)
class Shown:
    """A run that is mounted."""

    mnt: Path
    root: Path
    log: Path

    def names(self) -> list[str]:
        return sorted(os.listdir(self.mnt))

    def lines(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if '"mcorefs.mount"' in line]

    def server(self) -> int:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(process / "fd/2") == str(self.log):
                    return int(process.name)
            except OSError:
                continue
        raise AssertionError("the daemon is gone")

    def held(self) -> int:
        """How many shards the daemon has open, deleted ones too."""
        found = 0
        for fd in Path(f"/proc/{self.server()}/fd").iterdir():
            with suppress(OSError):
                found += ".distcp" in os.readlink(fd)
        return found


@contextmanager
def shown(place: Path, vocab_size: int | None) -> Iterator[Shown]:
    options = Options(vocab_size=vocab_size, cache_bytes=1 << 20, read_timeout=5.0)
    run = Living.over(Run(find_run(place / "run")), options)
    run.open_newest()
    log = place / "log"
    with mounting(run, place / "mnt", MountOptions(log_file=log)) as mnt:
        yield Shown(mnt, place / "run", log)
        os.listdir(mnt)  # the daemon lives


def until(condition: Callable[[], bool], what: str, patience: float = 10.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.05)


def wait_for_a_look() -> None:
    """Until what was found before is believed no more, here and by the kernel."""
    time.sleep(2 * living.INTERVAL + 0.1)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at every step of a save."""
    monkeypatch.setattr(living, "INTERVAL", 0.05)
    monkeypatch.setattr("mcorefs.mount.session.INTERVAL", 0.05)


# --- what is shown --------------------------------------------------------------------------------


def test_an_iteration_appears_when_it_is_saved(
    libfuse: None, often: None, saves: tuple[Fixture, Fixture], place: Path
) -> None:
    first, second = saves
    run = place / "run"
    with shown(place, first.spec.vocab_size) as mount:
        assert mount.names() == []
        for step in steps_of_a_save(first, run, 100):
            wait_for_a_look()
            # Without a tracker, megatron-core's metadata say that a save is complete.
            there = step in ("metadata.json", "an empty tracker")
            assert (mount.names() == ["iter_0000100", "latest"]) is there, step
        assert (mount.mnt / "latest" / WEIGHTS).read_bytes() == weights(first)
        inode = (mount.mnt / "iter_0000100" / WEIGHTS).stat().st_ino
        for step in steps_of_a_save(second, run, 200):
            wait_for_a_look()
            assert mount.names() == ["iter_0000100", "latest"], step
            assert os.readlink(mount.mnt / "latest") == "iter_0000100", step
        until(lambda: os.readlink(mount.mnt / "latest") == "iter_0000200", "latest follows")
        assert mount.names() == ["iter_0000100", "iter_0000200", "latest"]
        assert (mount.mnt / "latest" / WEIGHTS).read_bytes() == weights(second)
        assert (mount.mnt / "iter_0000100" / WEIGHTS).read_bytes() == weights(first)
        assert (mount.mnt / "iter_0000100" / WEIGHTS).stat().st_ino == inode
        assert (mount.mnt / "iter_0000200" / WEIGHTS).stat().st_ino != inode
        shutil.rmtree(run / "iter_0000100")
        until(lambda: mount.names() == ["iter_0000200", "latest"], "it has gone")
        until(lambda: not (mount.mnt / "iter_0000100").exists(), "and cannot be reached")


def test_what_is_open_stays_what_it_was(
    libfuse: None, often: None, saves: tuple[Fixture, Fixture], place: Path
) -> None:
    """Rotated away and saved anew under the same name, with files of the same sizes."""
    first, second = saves
    save(first, place / "run", 100)
    with shown(place, first.spec.vocab_size) as mount:
        path = mount.mnt / "iter_0000100" / WEIGHTS
        assert path.read_bytes() == weights(first)
        fd = os.open(path, os.O_RDONLY)
        os.pread(fd, 100, 0)
        before = os.fstat(fd).st_ino
        shards = len(list((place / "run/iter_0000100").glob("*.distcp")))
        until(lambda: mount.held() == shards, "all shards are open")
        shutil.rmtree(place / "run/iter_0000100")
        until(lambda: mount.names() == [], "it has gone")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, 1 << 24, 0) == weights(first)  # its shards are open
        save(second, place / "run", 100)
        until(lambda: "iter_0000100" in mount.names(), "it is back")
        assert path.read_bytes() == weights(second)
        assert path.stat().st_ino != before
        for _ in range(3):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, 1 << 24, 0) == weights(first)
            assert path.read_bytes() == weights(second)
        os.close(fd)
        assert (mount.mnt / "latest" / WEIGHTS).read_bytes() == weights(second)
        assert mount.lines() == []


def test_what_is_open_can_be_read_to_its_end(
    often: None, saves: tuple[Fixture, Fixture], place: Path
) -> None:
    """Though nothing of it was read before it was deleted, by rotation."""
    save(saves[0], place / "run", 100)
    with shown(place, saves[0].spec.vocab_size) as mount:
        until(lambda: mount.held() == 0, "nothing is held of what nobody has open")
        fd = os.open(mount.mnt / "iter_0000100" / WEIGHTS, os.O_RDONLY)
        shards = len(list((place / "run/iter_0000100").glob("*.distcp")))
        until(lambda: mount.held() == shards, "all shards are open")
        shutil.rmtree(place / "run/iter_0000100")
        until(lambda: mount.names() == [], "it has gone")
        assert os.pread(fd, 1 << 24, 0) == weights(saves[0])
        assert mount.held() == shards
        os.close(fd)
        until(lambda: mount.held() == 0, "the space of what was deleted is free")


def test_shards_that_were_not_open_before_they_went(
    often: None,
    saves: tuple[Fixture, Fixture],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They cannot be read any more: EIO and a line, and nothing of what has taken their place."""
    monkeypatch.setattr(Reader, "hold", lambda self: None)  # as if there were too many
    first, second = saves
    save(first, place / "run", 100)
    with shown(place, first.spec.vocab_size) as mount:
        fd = os.open(mount.mnt / "iter_0000100" / WEIGHTS, os.O_RDONLY)
        shutil.rmtree(place / "run/iter_0000100")
        save(second, place / "run", 100)
        wait_for_a_look()
        os.listdir(mount.mnt)
        with pytest.raises(OSError, match="Input/output") as caught:
            os.pread(fd, 1 << 20, 1 << 16)
        assert caught.value.errno == errno.EIO
        assert ("replaced" in mount.lines()[0]) or ("cannot be opened" in mount.lines()[0])
        os.close(fd)
        assert (mount.mnt / "iter_0000100" / WEIGHTS).read_bytes() == weights(second)


def test_an_iteration_that_cannot_be_opened_says_why(
    often: None,
    saves: tuple[Fixture, Fixture],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(living, "RETRY", 0.2)
    first, second = saves
    save(first, place / "run", 100)
    with shown(place, first.spec.vocab_size) as mount:
        save(second, place / "run", 200)
        shard = min((place / "run/iter_0000200").glob("*.distcp"))
        shard.rename(place / "away")
        until(lambda: "iter_0000200" in mount.names(), "it is shown")
        directory = mount.mnt / "iter_0000200"
        assert os.listdir(directory) == ["MCOREFS_ERROR.txt"]
        assert shard.name in (directory / "MCOREFS_ERROR.txt").read_text()
        assert not (directory / "config.json").exists()
        assert (mount.mnt / "iter_0000100" / WEIGHTS).read_bytes() == weights(first)
        time.sleep(0.5)
        os.listdir(directory)  # tried again, in vain
        assert len(mount.lines()) == 1
        (place / "away").rename(shard)
        until(lambda: (directory / "config.json").exists(), "it is tried again")
        assert (directory / WEIGHTS).read_bytes() == weights(second)
        assert "MCOREFS_ERROR.txt" not in os.listdir(directory)


def test_a_run_that_goes_back(often: None, saves: tuple[Fixture, Fixture], place: Path) -> None:
    """Training begins anew from an older iteration: what comes after it is not published."""
    first, second = saves
    for iteration, fixture in ((100, first), (200, second)):
        save(fixture, place / "run", iteration)
    with shown(place, first.spec.vocab_size) as mount:
        assert os.readlink(mount.mnt / "latest") == "iter_0000200"
        (place / "run" / TRACKER).write_text("100")
        until(lambda: mount.names() == ["iter_0000100", "latest"], "the later one has gone")
        assert (mount.mnt / "latest" / WEIGHTS).read_bytes() == weights(first)
        save(first, place / "run", 200)  # over what is there
        until(lambda: "iter_0000200" in mount.names(), "it is back")
        assert (mount.mnt / "iter_0000200" / WEIGHTS).read_bytes() == weights(first)


def test_nothing_runs_while_nobody_looks(saves: tuple[Fixture, Fixture], place: Path) -> None:
    save(saves[0], place / "run", 100)
    with shown(place, saves[0].spec.vocab_size) as mount:
        (mount.mnt / "latest" / WEIGHTS).read_bytes()
        server = mount.server()

        def switches() -> list[str]:
            tasks = Path(f"/proc/{server}/task").glob("*/status")
            return [
                line
                for task in sorted(tasks)
                for line in task.read_text().splitlines()
                if "ctxt_switches" in line
            ]

        time.sleep(1.5)
        before = switches()
        time.sleep(2.5)
        assert switches() == before


# --- everything at once ---------------------------------------------------------------------------

READER = """
import os, sys, time
from pathlib import Path
mnt, *expected = map(Path, sys.argv[1:])
expected = [path.read_bytes() for path in expected]
read = gone = 0
while not (mnt.parent / "done").exists():
    for name in os.listdir(mnt):
        if not name.startswith("iter_"):
            continue
        right = expected[int(name[5:]) // 100 % 2]
        try:
            assert "model.safetensors" in os.listdir(mnt / name) or gone_now(name)
            found = (mnt / name / "model.safetensors").read_bytes()
        except OSError:
            # Only what is being deleted may fail.
            assert not (mnt.parent / "run" / name / ".metadata").exists(), name
            gone += 1
            continue
        except AssertionError:
            assert not (mnt.parent / "run" / name / ".metadata").exists(), name
            continue
        assert found == right, f"{name} is not what it was"
        read += 1
        try:
            name = os.path.basename(os.path.realpath(mnt / "latest", strict=True))
            found = (mnt / name / "model.safetensors").read_bytes()
            assert found == expected[int(name[5:]) // 100 % 2], f"{name} by latest"
        except OSError:
            assert not (mnt.parent / "run" / name / ".metadata").exists(), name
print(read, gone)
""".replace(" or gone_now(name)", "")


def test_readers_beside_a_writer(saves: tuple[Fixture, Fixture], place: Path) -> None:
    run = place / "run"
    save(saves[1], run, 100)
    with shown(place, saves[0].spec.vocab_size) as mount:
        expected = [fixture.hf / WEIGHTS for fixture in saves]
        command = [sys.executable, "-c", READER, str(mount.mnt), *map(str, expected)]
        readers = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        for number in range(2, 9):
            for _ in steps_of_a_save(saves[number % 2], run, 100 * number):
                time.sleep(0.05)
            if number > 3:
                old = run / f"iter_{100 * (number - 3):07d}"
                (old / ".metadata").unlink()
                shutil.rmtree(old)
            time.sleep(0.5)
        (place / "done").touch()
        for reader in readers:
            said, error = reader.communicate(timeout=60)
            assert reader.returncode == 0, error
            assert int(said.split()[0]) > 5, said
        assert mount.names() == ["iter_0000600", "iter_0000700", "iter_0000800", "latest"]


# --- without a mount ------------------------------------------------------------------------------


def test_few_stay_open(saves: tuple[Fixture, Fixture], place: Path) -> None:
    iterations = range(100, 1300, 100)
    for iteration in iterations:
        save(saves[iteration // 100 % 2], place / "run", iteration)
    options = Options(vocab_size=saves[0].spec.vocab_size, read_timeout=30.0)
    nodes = Living.over(Run(place / "run"), options)
    handles = {}
    for iteration in iterations:
        node = nodes.at(f"/iter_{iteration:07d}/{WEIGHTS}")
        assert node is not None
        handles[iteration] = node.inode
        assert len(nodes._opened) <= living.KEPT
    assert len(set(handles.values())) == len(iterations)
    for iteration, handle in handles.items():
        node = nodes.of(handle)
        assert node is not None
        assert node.file is not None
        out = bytearray(node.file.size)
        node.file.read_into(0, memoryview(out))
        assert out == weights(saves[iteration // 100 % 2])
        nodes.pin(handle)
    assert len(nodes._opened) == len(iterations)  # what is in use stays open
    for handle in handles.values():
        nodes.unpin(handle)
    assert len(nodes._opened) == living.KEPT


def test_one_that_is_opened_again_must_be_the_same(
    saves: tuple[Fixture, Fixture], place: Path, tmp_path: Path
) -> None:
    """Handles are numbers of files: with one file more they would be those of others."""
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(saves[0].tokenizer, tokenizer)
    save(saves[0], place / "run", 100)
    options = Options(vocab_size=saves[0].spec.vocab_size, tokenizer=tokenizer)
    nodes = Living.over(Run(place / "run"), options)
    node = nodes.at(f"/iter_0000100/{WEIGHTS}")
    assert node is not None
    (tokenizer / "added_tokens.json").write_text("{}")
    nodes._opened.clear()
    (opened,) = nodes._saves.values()
    opened.table = None
    with pytest.raises(OSError, match="Input/output"):
        nodes.of(node.inode)
    error = nodes.at("/iter_0000100/MCOREFS_ERROR.txt")
    assert error is not None
    assert error.file is not None
    assert b"or its tokenizer, is not what it was" in read_all(error.file)


def test_a_run_whose_storage_does_not_answer(
    saves: tuple[Fixture, Fixture], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is shown as it was, and what is new when it has been found."""
    monkeypatch.setattr(living, "INTERVAL", 0.05)
    monkeypatch.setattr(living, "SCAN_WITHIN", 0.1)
    save(saves[0], place / "run", 100)
    run, go_on = Run(place / "run"), threading.Event()
    nodes = Living.over(run, Options(read_timeout=5.0))
    scan = run.scan

    def slow() -> object:
        assert go_on.wait(30)
        return scan()

    monkeypatch.setattr(run, "scan", slow)
    save(saves[1], place / "run", 200)
    time.sleep(0.1)
    for _ in range(3):
        started = time.monotonic()
        assert nodes.at("/iter_0000200") is None
        assert nodes.at("/iter_0000100") is not None
        assert time.monotonic() - started < 0.5
        time.sleep(0.1)
    go_on.set()
    until(lambda: nodes.at("/iter_0000200") is not None, "it is shown")


def test_layouts_of_other_trainers(saves: tuple[Fixture, Fixture], tmp_path: Path) -> None:
    first = saves[0]
    swift = tmp_path / "output/v0-20260101-000000"
    save(first, _made(swift / "checkpoint-100"), 100)
    list(zip(steps_of_a_save(first, _made(swift / "checkpoint-200"), 200), range(5), strict=False))
    assert find_run(tmp_path / "output") == swift
    assert list(Run(swift).scan()) == ["checkpoint-100"]

    verl = tmp_path / "verl"
    for step in (8, 20):
        actor = _made(verl / f"global_step_{step}/actor")
        shutil.copytree(first.iteration, actor / "model/dist_ckpt")
    (verl / "global_step_8/actor/ckpt_contents.json").write_text("{}")
    assert find_run(verl / "global_step_8") == verl
    assert list(Run(verl).scan()) == ["global_step_8"]
    (verl / TRACKER).write_text("20")
    assert list(Run(verl).scan()) == ["global_step_8"]
    (verl / "global_step_20/actor/ckpt_contents.json").write_text("{}")
    assert list(Run(verl).scan()) == ["global_step_8", "global_step_20"]

    nemo = tmp_path / "nemo"
    for step in (99, 199):
        shutil.copytree(first.iteration, nemo / f"qwen3--step={step}-last/weights")
    (nemo / "qwen3--step=199-last-unfinished").touch()
    assert list(Run(nemo).scan()) == ["qwen3--step=99-last"]
    with pytest.raises(CheckpointError, match="several runs; pass one of them"):
        find_run(tmp_path)


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_names_do_not_tell_that_ranks_have_saved(tmp_path: Path) -> None:
    """`mp_rank_*` are written in place: only a tracker says when that is over."""
    rank = _made(tmp_path / "iter_0000100/mp_rank_00")
    (rank / "model_optim_rng.pt").write_bytes(b"half")
    assert not Run(tmp_path).scan()
    (tmp_path / TRACKER).write_text("100")
    assert list(Run(tmp_path).scan()) == ["iter_0000100"]


def test_what_is_no_run(tmp_path: Path) -> None:
    assert find_run(tmp_path) == tmp_path  # empty: nothing saved yet
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="holds no iterations"):
        find_run(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        find_run(tmp_path / "notes.txt")


def test_the_command(saves: tuple[Fixture, Fixture], place: Path) -> None:
    def mcorefs(*arguments: object, status: int = 0) -> str:
        command = [sys.executable, "-m", "mcorefs", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        said = done.stdout + done.stderr
        assert done.returncode == status, said
        assert "Traceback" not in said
        return said

    run, mnt = place / "run", place / "mnt"
    said = mcorefs("mount", run, mnt, "--all-iterations")
    assert "0 iterations" in said
    assert "None is complete yet" in said
    mcorefs("umount", mnt)
    save(saves[0], run, 100)
    said = mcorefs("mount", run, mnt, "--all-iterations")
    assert f"1 iteration of {run}, at {mnt}" in said
    assert f"The newest is Qwen3ForCausalLM from {run}/iter_0000100: " in said
    assert f"$(realpath {mnt}/latest)" in said
    assert (mnt / "latest/config.json").read_bytes().startswith(b"{")
    mcorefs("umount", mnt)
    assert "takes neither" in mcorefs(
        "mount", run, mnt, "--all-iterations", "--iteration", 100, status=2
    )
    # What cannot be opened at all is said before anything is mounted.
    assert "--family" in mcorefs(
        "mount", run, mnt, "--all-iterations", "--family", "nonsense", status=1
    )
    assert mounted(mnt) is None
