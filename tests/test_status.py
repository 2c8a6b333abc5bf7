"""`mcorefs status`, the file behind it that nobody meets by chance, and the log."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mcorefs.activity import Counter
from mcorefs.mount import mounted
from mcorefs.mount.living import INTERVAL
from tests.checkpoints import Fixture, ensure

NAME = "qwen3_moe-tp2-pp2-ep2"


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure([NAME])[NAME]


@pytest.fixture(params=["libfuse3", "libfuse2"])
def libfuse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCOREFS_FUSE", str(request.param))


@pytest.fixture
def place() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="mcorefs-status-"))
    (place / "mnt").mkdir()
    yield place
    while mounted(place / "mnt") is not None:
        subprocess.run(["umount", "-l", str(place / "mnt")], check=False)
    shutil.rmtree(place)


def mcorefs(*arguments: object, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mcorefs", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def asked(mnt: Path) -> Mapping[str, object]:
    found: Mapping[str, object] = json.loads((mnt / ".mcorefs/status.json").read_text())
    return found


def events(log: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_status(libfuse: None, fixture: Fixture, place: Path) -> None:
    mnt = place / "mnt"
    mcorefs("mount", fixture.root, mnt, "--log-file", place / "log")
    before = asked(mnt)
    assert before["checkpoint"] == str(fixture.iteration)
    assert (before["iteration"], before["format"]) == (100, "torch_dist")
    assert (before["architecture"], before["family"]) == ("Qwen3MoeForCausalLM", "qwen3_moe")
    weights = mnt / "model.safetensors"
    size = len(weights.read_bytes())
    after = asked(mnt)
    served = counted(after, "served_bytes") - counted(before, "served_bytes")
    assert size - 4096 <= served <= size + 4096  # the first page may have been there
    assert counted(after, "shard_bytes") > 0.9 * size
    assert counted(after, "uptime_s") >= counted(before, "uptime_s")
    assert 20e6 < counted(after, "resident_bytes") < 400e6
    assert Path(f"/proc/{after['pid']}/comm").exists()
    weights.read_bytes()  # from the page cache: the daemon does not see it
    assert asked(mnt)["served_bytes"] == after["served_bytes"]
    said = mcorefs("status", mnt)
    for expected in (f"checkpoint  {fixture.iteration}", "Qwen3MoeForCausalLM", "errors  0"):
        assert expected in said
    assert json.loads(mcorefs("status", "--json", mnt))["checkpoint"] == str(fixture.iteration)
    mcorefs("umount", mnt)
    first, *_, last = events(place / "log")
    assert (first["message"], first["path"], first["level"]) == ("mounted", str(mnt), "INFO")
    assert last["message"] == "unmounted"
    assert first["time"] <= last["time"]
    assert first["time"].endswith("Z")


def counted(found: Mapping[str, object], key: str) -> float:
    value = found[key]
    assert isinstance(value, int | float), key
    return value


def test_nobody_meets_it_by_chance(libfuse: None, fixture: Fixture, place: Path) -> None:
    mnt = place / "mnt"
    mcorefs("mount", fixture.root, mnt)
    assert asked(mnt)
    mcorefs("materialize", fixture.root, place / "out")
    subprocess.run(["diff", "-r", str(mnt), str(place / "out")], check=True)
    subprocess.run(["cp", "-a", str(mnt), str(place / "copy")], check=True)
    assert not (place / "copy/.mcorefs").exists()
    assert ".mcorefs" not in os.listdir(mnt)
    found = subprocess.run(["find", str(mnt)], capture_output=True, text=True, check=True).stdout
    assert ".mcorefs" not in found
    assert os.listdir(mnt / ".mcorefs") == ["status.json"]
    with pytest.raises(OSError, match=r"Read-only|Permission denied"):
        os.open(mnt / ".mcorefs/status.json", os.O_WRONLY)
    with pytest.raises(FileNotFoundError):
        os.stat(mnt / ".mcorefs/other")
    subprocess.run(["chmod", "-R", "u+w", str(place / "copy")], check=True)


def test_it_can_be_read_by_any_program(libfuse: None, fixture: Fixture, place: Path) -> None:
    mnt = place / "mnt"
    mcorefs("mount", fixture.root, mnt)
    file = mnt / ".mcorefs/status.json"
    for command in (["cat"], ["dd", "bs=100", "status=none"], ["head", "-c", "100000"]):
        given = [f"if={file}"] if command[0] == "dd" else [str(file)]
        said = subprocess.run([*command, *given], capture_output=True, check=True).stdout
        assert json.loads(said)["format"] == "torch_dist", command
    subprocess.run(["cp", str(file), str(place / "copied")], check=True)
    assert json.loads((place / "copied").read_text())["format"] == "torch_dist"
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: asked(mnt)["pid"], range(50)))


def test_errors_are_counted_and_logged(libfuse: None, fixture: Fixture, place: Path) -> None:
    root = Path(shutil.copytree(fixture.root, place / "run"))
    mnt = place / "mnt"
    mcorefs("mount", root, mnt, "--log-file", place / "log")
    for shard in root.glob("*/*.distcp"):
        shard.unlink()
    done = subprocess.run(["cat", str(mnt / "model.safetensors")], capture_output=True, check=False)
    assert b"Input/output error" in done.stderr
    found = asked(mnt)
    assert counted(found, "read_errors") >= 1
    assert "/model.safetensors: " in str(found["last_error"])
    assert "last error" in mcorefs("status", mnt)
    errors = [event for event in events(place / "log") if event["level"] == "ERROR"]
    assert errors
    for error in errors:
        assert (error["path"], error["logger"]) == ("/model.safetensors", "mcorefs.mount")
        assert "the reader gets EIO" in error["message"]


def test_all_iterations(libfuse: None, fixture: Fixture, place: Path) -> None:
    root = Path(shutil.copytree(fixture.root, place / "run"))
    mnt = place / "mnt"
    mcorefs("mount", root, mnt, "--all-iterations")
    subprocess.run(
        ["cat", str(mnt / "latest/model.safetensors")], check=True, stdout=subprocess.DEVNULL
    )
    found = asked(mnt)
    assert (found["run"], found["iterations"]) == (str(root), ["iter_0000100"])
    (about,) = json.loads(mcorefs("status", mnt, "--json"))["opened"]
    assert (about["iteration"], about["family"]) == (100, "qwen3_moe")
    assert counted(found, "served_bytes") > 800_000
    assert "iterations  iter_0000100" in mcorefs("status", mnt)
    assert sorted(os.listdir(mnt)) == ["iter_0000100", "latest"]


def test_what_cannot_be_asked(fixture: Fixture, place: Path) -> None:
    mnt = place / "mnt"
    assert "is not a mount point" in mcorefs("status", mnt, status=1)
    assert "/proc is a proc mount" in mcorefs("status", "/proc", status=1)
    mcorefs("mount", fixture.root, mnt)
    pid = int(counted(asked(mnt), "pid"))
    os.kill(pid, signal.SIGSTOP)
    try:
        assert "does not answer" in mcorefs("status", mnt, status=1)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "errors  0" in mcorefs("status", mnt)


def test_a_silent_run_hangs_no_command(fixture: Fixture, place: Path) -> None:
    """The kernel forgets within a second what it knows of a run: what looks at the mount hangs."""
    mnt = place / "mnt"
    mcorefs("mount", fixture.root, mnt, "--all-iterations")
    pid = int(counted(asked(mnt), "pid"))
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(2 * INTERVAL)
        assert "does not answer" in mcorefs("status", mnt, status=1)
        mcorefs("umount", "--force", mnt)
        assert mounted(mnt) is None
    finally:
        os.kill(pid, signal.SIGKILL)


def test_counting_loses_nothing() -> None:
    counter = Counter()

    def add(_: int) -> None:
        for _ in range(5000):
            counter.add(3)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(add, range(16)))
    assert counter.total == 16 * 5000 * 3
