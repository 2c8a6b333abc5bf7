"""Opening, checking and writing a checkpoint whose storage fails or does not answer."""

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
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import mcorefs
from mcorefs.errors import CheckpointError, ReadFault
from mcorefs.files import read_all
from mcorefs.model import Options
from mcorefs.mount import Living, MountOptions, living, mounted, mounting
from mcorefs.patience import again, attended, patiently
from mcorefs.published import Run
from mcorefs.tree import open_tree
from tests.checkpoints import Fixture, ensure
from tests.edited import unprivileged
from tests.faulty_fs import faulty, lift

NAMES = ("qwen3_moe-tp2-pp2-ep2", "torch-qwen3-tp2")
TIMEOUT = 1.0
CLI = (sys.executable, "-m", "mcorefs")


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure(NAMES)


@pytest.fixture
def place() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="mcorefs-patience-"))
    (place / "mnt").mkdir()
    yield place
    for name in ("mnt", "shown"):
        while mounted(place / name) is not None:
            subprocess.run(["umount", "-l", str(place / name)], check=False)
    shutil.rmtree(place)


def weights_of(fixture: Fixture) -> dict[str, bytes]:
    """Of the undamaged checkpoint."""
    weights = open_tree(fixture.root, Options()).tree.weights
    return {name: read_all(file) for name, file in weights.items()}


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- work that is waited for ----------------------------------------------------------------------


def test_results_and_errors_come_back() -> None:
    assert attended(lambda: 7, 30) == 7
    assert attended(threading.current_thread, None) is threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        attended(lambda: 1 // 0, 30)


def test_what_goes_on_is_waited_for() -> None:
    """Long work, and many short waits: neither is one wait that is too long."""

    def busy() -> str:
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            pass
        for _ in range(60):
            time.sleep(0.01)
        return "done"

    assert attended(busy, 0.2) == "done"


def test_what_hangs_is_left_with_the_name_of_what_it_waits_for() -> None:
    reading, writing = os.pipe()
    ended = threading.Event()

    def hang(path: Path) -> None:
        os.read(reading, 1)
        ended.set()

    started = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"^/a/file: .* not answer: nothing within 0\.2 s.*-t"
    ):
        attended(lambda: hang(Path("/a/file")), 0.2)
    assert 0.2 <= time.monotonic() - started < 1
    os.write(writing, b"x")
    assert ended.wait(10)
    os.close(reading)
    os.close(writing)


def test_urls_have_a_deadline_of_their_own() -> None:
    def wait(url: str) -> str:
        time.sleep(0.6)
        return url

    assert attended(lambda: wait("s3://bucket/key"), 0.2) == "s3://bucket/key"


def failing(*problems: Exception) -> Callable[[], str]:
    left = list(problems)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


def worded(number: int) -> Exception:
    """A CheckpointError, as those are made of an OSError."""
    try:
        try:
            raise OSError(number, os.strerror(number), "/a/file")
        except OSError as problem:
            raise CheckpointError(f"/a/file: {problem.strerror}") from None
    except CheckpointError as error:
        return error


def test_errors_that_pass() -> None:
    stale = OSError(errno.ESTALE, "Stale file handle", "/a/file")
    assert again(failing(stale, stale)) == "done"
    assert again(failing(worded(errno.EIO), worded(errno.EIO))) == "done"
    with pytest.raises(OSError, match="Stale"):
        again(failing(stale, stale, stale))
    with pytest.raises(
        CheckpointError, match=r"^/a/file: Stale file handle, again and again; look"
    ):
        patiently(failing(*[stale] * 9), None)


@pytest.mark.parametrize(
    "problem",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        worded(errno.EACCES),
        CheckpointError("damaged"),
        ReadFault("http://host: 503, for a minute"),
    ],
)
def test_errors_that_stay_are_not_tried_again(problem: Exception) -> None:
    with pytest.raises(type(problem)):
        again(failing(problem))


# --- storage that fails for a moment --------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_opening_outlives_errors_that_pass(
    name: str, fixtures: dict[str, Fixture], place: Path
) -> None:
    """Whatever is looked at, opened or read fails twice."""
    fixture = fixtures[name]
    with faulty(fixture.root, place) as (shown, orders):
        for path in [fixture.root, *fixture.root.rglob("*")]:
            for kind in ("", "open-", "stat-"):
                (orders / f"errno-{kind}{path.name}").write_text(f"{errno.EIO} 1")
        found = open_tree(shown, Options(tokenizer=fixture.tokenizer)).tree
        assert sum(order.read_text() == f"{errno.EIO} 0" for order in orders.iterdir()) > 8
        lift(orders)
        right = open_tree(fixture.root, Options(tokenizer=fixture.tokenizer)).tree
        assert found.files["config.json"] == right.files["config.json"]
        for weights in right.weights:
            assert read_all(found.files[weights]) == read_all(right.files[weights])


@pytest.mark.parametrize("which", ["tracker", "metadata", "shard"])
def test_opening_with_errors_that_stay(
    which: str, fixtures: dict[str, Fixture], place: Path
) -> None:
    """An error, in words: not an iteration, a format or a size that was not the right one."""
    fixture = fixtures[NAMES[0]]
    name, kind = {
        "tracker": ("latest_checkpointed_iteration.txt", "stat-"),
        "metadata": (".metadata", ""),
        "shard": ("__0_0.distcp", "stat-"),
    }[which]
    with faulty(fixture.root, place) as (shown, orders):
        (orders / f"errno-{kind}{name}").write_text(f"{errno.EIO} 1000")
        said = subprocess.run(
            [*CLI, "inspect", str(shown)], capture_output=True, text=True, check=False, timeout=60
        )
        assert said.returncode == 1
        assert "Traceback" not in said.stderr
        assert f"{name}" in said.stderr + said.stdout
        assert "Input/output error" in said.stderr + said.stdout


def test_shards_that_may_not_be_read(fixtures: dict[str, Fixture], place: Path) -> None:
    """All are named before anything is mounted, written or read."""
    place.chmod(0o755)
    root = Path(shutil.copytree(fixtures[NAMES[0]].root, place / "root"))
    shards = sorted(root.glob("*/__*.distcp"))[:2]
    for shard in shards:
        shard.chmod(0o600)
    with unprivileged(), pytest.raises(CheckpointError) as caught:
        open_tree(root, Options())
    for shard in shards:
        assert f"{shard}: cannot be read: Permission denied" in str(caught.value)
    shards[0].chmod(0o640)
    os.chown(shards[0], 65534, 0)
    with unprivileged(), pytest.raises(CheckpointError) as caught:
        open_tree(root, Options())
    assert str(shards[0]) not in str(caught.value)


# --- storage that does not answer -----------------------------------------------------------------


@contextmanager
def stalled(fixture: Fixture, place: Path, *orders: str) -> Iterator[Path]:
    with faulty(fixture.root, place) as (shown, directory):
        for order in orders:
            (directory / order).touch()
        yield shown


OPENING = {
    "the directory": ("stall-stat-{iteration}", "{iteration}"),
    "the tracker": (
        "stall-open-latest_checkpointed_iteration.txt",
        "latest_checkpointed_iteration.txt",
    ),
    "the metadata, opened": ("stall-open-.metadata", ".metadata"),
    "the metadata, read": ("stall-.metadata", ".metadata"),
    "the arguments": ("stall-common.pt", "common.pt"),
    "a shard": ("stall-stat-__1_0.distcp", "__1_0.distcp"),
}


@pytest.mark.parametrize("what", OPENING)
def test_opening(what: str, fixtures: dict[str, Fixture], place: Path) -> None:
    fixture = fixtures[NAMES[0]]
    order, name = (text.format(iteration=fixture.spec.iteration_dir) for text in OPENING[what])
    with stalled(fixture, place, order) as shown:
        started = time.monotonic()
        with pytest.raises(CheckpointError, match=f"{name}: its storage does not answer"):
            mcorefs.open(shown, read_timeout=0.5)
        assert 0.5 <= time.monotonic() - started < 5


def test_opening_rank_files(fixtures: dict[str, Fixture], place: Path) -> None:
    with (
        stalled(fixtures[NAMES[1]], place, "stall-model_optim_rng.pt") as shown,
        pytest.raises(CheckpointError, match=r"model_optim_rng\.pt: its storage does not answer"),
    ):
        mcorefs.open(shown, read_timeout=0.5)


@pytest.mark.parametrize("command", ["mount", "mount-all", "inspect", "materialize", "verify"])
def test_commands(command: str, fixtures: dict[str, Fixture], place: Path) -> None:
    """Each says what it waited for and for how long; nothing was mounted or written meanwhile."""
    fixture = fixtures[NAMES[0]]
    argv = {
        "mount": ("mount", "{ckpt}", str(place / "mnt")),
        "mount-all": ("mount", "{ckpt}", str(place / "mnt"), "--all-iterations"),
        "materialize": ("materialize", "{ckpt}", str(place / "out")),
    }.get(command, (command, "{ckpt}"))
    with faulty(fixture.root, place) as (shown, orders):
        (orders / "stall-.metadata").touch()
        command_line = [*CLI, *(text.format(ckpt=shown) for text in argv), "--read-timeout", "1"]
        said = place / "said"
        with said.open("wb") as out:
            running = subprocess.Popen(command_line, stdout=out, stderr=out)
        until(lambda: b"does not answer" in said.read_bytes(), 20)
        assert mounted(place / "mnt") is None
        assert not (place / "out").exists()
        lift(orders)  # until then the kernel does not let a thread of it go
        assert running.wait(20) == 1
        (line,) = said.read_text().splitlines()
        assert line.startswith(f"mcorefs: {shown / fixture.spec.iteration_dir / '.metadata'}: ")
        assert "nothing within 1 s" in line
        assert "--read-timeout" in line
        assert mounted(place / "mnt") is None


def test_reading_what_is_open(fixtures: dict[str, Fixture], place: Path) -> None:
    fixture = fixtures[NAMES[0]]
    with (
        faulty(fixture.root, place) as (shown, orders),
        mcorefs.open(shown, framework="np", read_timeout=0.5) as checkpoint,
        mcorefs.open(fixture.root, framework="np") as right,
    ):
        for shard in fixture.iteration.glob("*.distcp"):
            (orders / f"stall-{shard.name}").touch()
        name = checkpoint.keys()[0]
        with pytest.raises(ReadFault, match=r"its storage does not answer: nothing within 0\.5 s"):
            checkpoint.get_tensor(name)
        lift(orders)
        time.sleep(0.2)
        assert np.array_equal(checkpoint.get_tensor(name), right.get_tensor(name))


def test_writing_stops_and_goes_on(fixtures: dict[str, Fixture], place: Path) -> None:
    fixture = fixtures[NAMES[0]]
    out = place / "out"
    with faulty(fixture.root, place) as (shown, orders):
        (orders / "stall-__1_0.distcp").touch()
        command = [*CLI, "materialize", str(shown), str(out), "--read-timeout", "1"]
        said = place / "said"
        with said.open("wb") as file:
            running = subprocess.Popen(command, stdout=file, stderr=file)
        until(lambda: b"__1_0.distcp: its storage does not answer" in said.read_bytes(), 20)
        lift(orders)
        assert running.wait(20) == 1
        assert not (out / "config.json").exists()
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        for name, weights in weights_of(fixture).items():
            assert (out / name).read_bytes() == weights


@pytest.mark.parametrize("way", ["own", "deep", "directory", "against"])
def test_verifying(way: str, fixtures: dict[str, Fixture], place: Path) -> None:
    """A file that does not answer, of the checkpoint or of what it is compared with, is a finding
    or an error within the time, and never hangs."""
    fixture = fixtures[NAMES[0]]
    source, name, argv = {
        "own": (fixture.root, "stall-__1_0.distcp", ("{shown}",)),
        "deep": (fixture.root, "stall-__1_0.distcp", ("{shown}", "--deep")),
        "directory": (fixture.root, "stall-__1_0.distcp", ("{shown}", str(fixture.hf))),
        "against": (
            fixture.hf,
            f"stall-stat-{min(fixture.hf.glob('*.safetensors')).name}",
            (str(fixture.root), "{shown}"),
        ),
    }[way]
    with faulty(source, place) as (shown, orders):
        (orders / name).touch()
        argv = tuple(text.format(shown=shown) for text in argv)
        said = place / "said"
        with said.open("wb") as file:
            command = [*CLI, "verify", *argv, "--read-timeout", "1"]
            running = subprocess.Popen(command, stdout=file, stderr=file)
        until(lambda: b"does not answer" in said.read_bytes(), 30)
        lift(orders)
        assert running.wait(20) == 1
        assert b"Traceback" not in said.read_bytes()


# --- a run, of which one iteration does not answer ------------------------------------------------


def run_of(fixture: Fixture, place: Path, iterations: tuple[int, ...]) -> Path:
    run = place / "run"
    run.mkdir()
    for iteration in iterations:
        shutil.copytree(fixture.iteration, run / f"iter_{iteration:07d}")
    (run / "latest_checkpointed_iteration.txt").write_text(str(iterations[-1]))
    return run


def listing(mnt: Path) -> list[str]:
    """By another process, for this one must not hang."""
    done = subprocess.run(["ls", str(mnt)], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.split()


def test_the_others_are_shown(
    fixtures: dict[str, Fixture], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not answer from the start, and one that ceases to; what is new appears."""
    monkeypatch.setattr(living, "INTERVAL", 0.05)
    fixture = fixtures[NAMES[0]]
    run = run_of(fixture, place, (100, 200, 300))
    tracker = run / "latest_checkpointed_iteration.txt"
    with faulty(run, place) as (shown, orders):
        (orders / "stall-below-iter_0000100").touch()
        options = Options(read_timeout=0.5, tokenizer=fixture.tokenizer)
        nodes = Living.over(Run(shown, None, 0.5), options)
        assert nodes.names == ["iter_0000200", "iter_0000300"]
        with mounting(nodes, place / "mnt", MountOptions(log_file=place / "log")) as mnt:
            assert listing(mnt) == ["iter_0000200", "iter_0000300", "latest"]
            (orders / "stall-below-iter_0000200").touch()
            shutil.copytree(fixture.iteration, run / "iter_0000400")
            tracker.write_text("400")
            until(lambda: "iter_0000400" in listing(mnt), 20)
            assert listing(mnt) == ["iter_0000200", "iter_0000300", "iter_0000400", "latest"]
            for name, weights in weights_of(fixture).items():
                assert (mnt / "latest" / name).read_bytes() == weights
            assert "iter_0000200 is left as it was: its storage" in (place / "log").read_text()
            lift(orders)
            until(lambda: "iter_0000100" in listing(mnt), 20)


def test_the_newest_does_not_answer(fixtures: dict[str, Fixture], place: Path) -> None:
    """Then `latest` would be another one: nothing is mounted."""
    run = run_of(fixtures[NAMES[0]], place, (100, 200))
    with faulty(run, place) as (shown, orders):
        (orders / "stall-below-iter_0000200").touch()
        with pytest.raises(CheckpointError, match="iter_0000200: its storage does not answer"):
            Living.over(Run(shown, None, 0.5), Options(read_timeout=0.5))
