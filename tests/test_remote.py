"""Checkpoints in an S3 store: the same as local ones, and what goes wrong on the way there."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import mcorefs
from mcorefs.errors import CheckpointError, ReadFault
from mcorefs.files import read_all
from mcorefs.mount import mounted
from mcorefs.remote.filesystem import DEADLINE_VARIABLE
from tests.checkpoints import SPECS, Fixture, Spec, ensure
from tests.object_store import KEY, SECRET, ObjectStore, Request, s3
from tests.test_cli import mcorefs as mcorefs_said
from tests.test_mount import in_child
from tests.test_roundtrip import assert_same_files

MOE, LEGACY, FSDP = "qwen3_moe-tp2-pp2-ep2", "torch-qwen3-tp2-pp2-vpp2-tied", "dcp-qwen3-dp2"


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure([MOE, LEGACY, FSDP])


@pytest.fixture(scope="module")
def store(fixtures: dict[str, Fixture]) -> Iterator[ObjectStore]:
    """Has all fixtures."""
    with s3() as store:
        for name, fixture in fixtures.items():
            store.upload(fixture.root, name)
        yield store


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEADLINE_VARIABLE, "1")


def vocabulary(spec: Spec) -> int | None:
    """What must be said of it, since the checkpoint does not."""
    return None if spec.vocab_size_in_args else spec.vocab_size


def opened(name: str, prefix: str | None = None) -> mcorefs.api.Checkpoint:
    return mcorefs.open(
        f"s3://bucket/{prefix or name}",
        framework="np",
        vocab_size=vocabulary(SPECS[name]),
        shard_size=SPECS[name].hf_max_shard_size or "50GB",
    )


def copied(store: ObjectStore, fixture: Fixture, prefix: str) -> str:
    """A copy that a test may spoil; its iteration, below the bucket."""
    store.upload(fixture.root, prefix)
    return f"{prefix}/{fixture.iteration.name}"


def shards(fixture: Fixture) -> list[Path]:
    return sorted(fixture.iteration.glob("*.distcp"))


# ---------------------------------------------------------------- the same as local ones


@pytest.mark.parametrize("name", [MOE, LEGACY, FSDP])
def test_files_are_those_of_save_pretrained(
    store: ObjectStore, fixtures: dict[str, Fixture], name: str
) -> None:
    with opened(name) as checkpoint:
        assert_same_files(checkpoint.files, fixtures[name].hf)


@pytest.mark.parametrize("name", [MOE, LEGACY, FSDP])
def test_opening_reads_no_tensor_and_little_else(
    store: ObjectStore, fixtures: dict[str, Fixture], name: str
) -> None:
    ranks = len(list(fixtures[name].iteration.glob("mp_rank_*")))
    with store.noted() as requests, opened(name) as checkpoint:
        assert len(requests) <= 12 + 3 * ranks, requests
        asked = [request for request in requests if request.bytes_asked]
        assert len(set(asked)) == len(asked), "what was read is read again"
        if name == MOE:
            assert not [request for request in asked if request.name.endswith(".distcp")]
        requests.clear()
        for file in checkpoint.files.values():
            read_all(file)
        files = fixtures[name].iteration.rglob("*")
        holding = sorted(path.name for path in files if is_weights(path.name))
        assert sorted(request.name for request in requests) == holding, "a request for each"


def is_weights(name: str) -> bool:
    return name.endswith(".distcp") or name == "model_optim_rng.pt"


def test_every_level_is_found(store: ObjectStore, fixtures: dict[str, Fixture]) -> None:
    iteration = fixtures[MOE].iteration.name
    store.upload(fixtures[MOE].root, "run/deeper/checkpoint")
    for place in (MOE, f"{MOE}/{iteration}", f"{MOE}/{iteration}/", "run/deeper"):
        with mcorefs.open(f"s3://bucket/{place}") as checkpoint:
            assert checkpoint.keys()
    for place, why in {
        "nothing": "s3://bucket/nothing does not exist",
        f"{MOE}/latest_checkpointed_iteration.txt": f"the directory above it, s3://bucket/{MOE}",
    }.items():
        with pytest.raises(CheckpointError, match=why):
            mcorefs.open(f"s3://bucket/{place}")


def test_markers_of_directories_do_not_matter(
    store: ObjectStore, fixtures: dict[str, Fixture]
) -> None:
    """Consoles and copying tools make an empty object for each directory."""
    iteration = copied(store, fixtures[MOE], "marked")
    for directory in ("marked/", f"{iteration}/"):
        store.put(directory, b"")
    with opened(MOE, "marked") as checkpoint:
        assert_same_files(checkpoint.files, fixtures[MOE].hf)


def test_a_model_directory_is_passed_on(store: ObjectStore, fixtures: dict[str, Fixture]) -> None:
    url = store.upload(fixtures[MOE].hf, "hf")
    with mcorefs.open(url) as checkpoint:
        assert {name: read_all(file) for name, file in checkpoint.files.items()} == {
            path.name: path.read_bytes() for path in fixtures[MOE].hf.iterdir()
        }
    (weights,) = sorted(fixtures[MOE].hf.glob("*.safetensors"))[:1]
    store.put(f"hf/{weights.name}", weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"hf/model.*is not a valid safetensors file"):
        mcorefs.open(url)


def test_config_and_tokenizer_may_be_remote_too(
    store: ObjectStore, fixtures: dict[str, Fixture]
) -> None:
    fixture = fixtures[MOE]
    store.upload(fixture.hf, "base")
    url = store.upload(fixture.tokenizer, "tokenizer")
    with mcorefs.open(fixture.root, hf_config="s3://bucket/base", tokenizer=url) as checkpoint:
        content = (fixture.tokenizer / "tokenizer.json").read_bytes()
        assert read_all(checkpoint.files["tokenizer.json"]) == content


def test_ranks_are_looked_at_side_by_side(store: ObjectStore, fixtures: dict[str, Fixture]) -> None:
    url = store.upload(fixtures[LEGACY].root, "legacy")
    ranks = len(list(fixtures[LEGACY].iteration.iterdir()))
    assert ranks == 4
    meeting = threading.Barrier(ranks, timeout=20)
    met: set[str] = set()

    def meet(request: Request) -> None:
        if request.name == "model_optim_rng.pt" and request.path not in met:
            met.add(request.path)
            meeting.wait()

    with store.failing(meet), mcorefs.open(url, vocab_size=fixtures[LEGACY].spec.vocab_size):
        assert len(met) == ranks
    assert not meeting.broken, "some waited in vain for the others"


# ---------------------------------------------------------------- the command line


def run(*arguments: object, status: int = 0) -> str:
    """What the command prints, no secret among it."""
    said = mcorefs_said(*arguments, status=status)
    assert KEY not in said
    assert SECRET not in said
    return said


def like_hf(fixture: Fixture) -> list[object]:
    """Options with which the files are those of `fixture.hf`."""
    return ["--vocab-size", fixture.spec.vocab_size, "--shard-size", fixture.spec.hf_max_shard_size]


def test_inspect_materialize_verify(
    store: ObjectStore, fixtures: dict[str, Fixture], tmp_path: Path
) -> None:
    fixture, url = fixtures[MOE], f"s3://bucket/{MOE}"
    found = json.loads(run("inspect", url, "--json"))
    assert (found["path"], found["format"]) == (f"{url}/{fixture.iteration.name}", "torch_dist")
    assert not found["problems"]
    run("materialize", url, tmp_path / "out", *like_hf(fixture))
    for weights in fixture.hf.glob("model*"):
        assert (tmp_path / "out" / weights.name).read_bytes() == weights.read_bytes()
    assert "by torch's CRC-32" in run("verify", url)


def test_verify_by_the_manifest(store: ObjectStore, fixtures: dict[str, Fixture]) -> None:
    iteration = copied(store, fixtures[FSDP], "manifest")
    files = {path.name: path for path in fixtures[FSDP].iteration.iterdir()}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    manifest = {"algorithm": "sha256", "files": digests}
    store.put(f"{iteration}/integrity.json", json.dumps(manifest).encode())
    assert f"{len(files)} files as saved, by the SHA-256" in run("verify", "s3://bucket/manifest")
    name = "__0_0.distcp"
    store.put(f"{iteration}/{name}", files[name].read_bytes()[::-1])
    said = run("verify", "s3://bucket/manifest", status=1)
    assert f"{name} was changed" in said


@pytest.fixture
def mnt() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="mcorefs-remote-"))
    yield path
    while mounted(path) is not None:
        subprocess.run(["umount", "-l", str(path)], check=False)
    path.rmdir()


def read_in_pieces(path: Path) -> bytes:
    """Past the page cache, so that each read asks the mount."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return b"".join(iter(lambda: file.read(128 << 10), b""))


def test_a_mount(
    store: ObjectStore, fixtures: dict[str, Fixture], mnt: Path, tmp_path: Path
) -> None:
    """The daemon is forked from a process that has connections and a thread that serves them."""
    fixture, log = fixtures[MOE], tmp_path / "log"
    said = run("mount", f"s3://bucket/{MOE}", mnt, *like_hf(fixture), "--log-file", log)
    assert f"from s3://bucket/{MOE}/{fixture.iteration.name}: " in said
    weights = sorted(fixture.hf.glob("*.safetensors"))
    with ThreadPoolExecutor(len(weights)) as pool:
        found = list(pool.map(lambda path: read_in_pieces(mnt / path.name), weights))
    assert found == [path.read_bytes() for path in weights]
    run("umount", mnt)
    assert SECRET not in log.read_text()


def test_what_goes_wrong_under_a_mount(
    store: ObjectStore,
    fixtures: dict[str, Fixture],
    mnt: Path,
    tmp_path: Path,
    impatient: None,
) -> None:
    """Replaced, deleted, the server gone: EIO with the reason in the log, and nothing worse."""
    fixture, log = fixtures[MOE], tmp_path / "log"
    iteration = copied(store, fixture, "spoilt")
    run("mount", "s3://bucket/spoilt", mnt, "--vocab-size", 301, "--log-file", log)
    weights = mnt / "model.safetensors"
    store.stop()
    started = time.monotonic()
    with pytest.raises(OSError, match="Input/output error"):
        read_in_pieces(weights)
    assert time.monotonic() - started < 5
    assert "no answer within 1 s" in log.read_text()
    store.start()
    content = {path.name: path.read_bytes() for path in shards(fixture)}
    name, other = list(content)[:2]
    store.put(f"{iteration}/{name}", content[name][:-1] + b"!")
    with pytest.raises(OSError, match="Input/output error"):
        read_in_pieces(weights)
    assert f"{name} was replaced after the checkpoint was opened" in log.read_text()
    store.put(f"{iteration}/{name}", content[name])
    store.delete(f"{iteration}/{other}")
    with pytest.raises(OSError, match="Input/output error"):
        read_in_pieces(weights)
    assert f"{other} is not there any more" in log.read_text()
    store.put(f"{iteration}/{other}", content[other])
    with mcorefs.open(fixture.root, vocab_size=301) as local:
        assert read_in_pieces(weights) == read_all(local.files[weights.name])
    assert SECRET not in log.read_text()


# ---------------------------------------------------------------- trouble on the way


def is_shard(request: Request) -> bool:
    return request.method == "GET" and request.name.endswith(".distcp")


def test_transient_failures_are_tried_again(
    store: ObjectStore, fixtures: dict[str, Fixture]
) -> None:
    answers = ["503 Service Unavailable", "500 Internal Server Error", "429 Too Many Requests"]
    failed: list[Request] = []

    def trouble(request: Request) -> tuple[str, str] | None:
        if len(failed) < 3 * len(answers) and request.method == "GET":
            failed.append(request)
            status = answers[len(failed) % len(answers)]
            return status, {"5": "SlowDown", "4": "TooManyRequests"}[status[0]]
        return None

    with store.failing(trouble), opened(MOE) as checkpoint:
        failed.clear()
        assert_same_files(checkpoint.files, fixtures[MOE].hf)
    assert len(failed) == 3 * len(answers)


@pytest.mark.parametrize("how", ["slow", "busy"])
def test_a_read_ends_within_the_deadline(store: ObjectStore, impatient: None, how: str) -> None:
    def trouble(request: Request) -> tuple[str, str] | None:
        if not is_shard(request):
            return None
        if how == "slow":
            time.sleep(1.5)
        return "503 Service Unavailable", "ServiceUnavailable"

    with store.failing(trouble), opened(MOE) as checkpoint:
        name = checkpoint.keys()[0]
        started = time.monotonic()
        with pytest.raises(ReadFault, match="no answer within 1 s"):
            checkpoint.get_tensor(name)
        assert time.monotonic() - started < 3
        store.trouble = lambda request: None
        checkpoint.get_tensor(name)


def test_no_access(store: ObjectStore, capfd: pytest.CaptureFixture[str]) -> None:
    """Said at once, without trying again, and without what identifies who asked."""
    refused: list[Request] = []

    def trouble(request: Request) -> tuple[str, str]:
        refused.append(request)
        return "403 Forbidden", "AccessDenied"

    with store.failing(trouble):
        said = run("inspect", f"s3://bucket/{MOE}", status=1)
    assert "s3://bucket/qwen3_moe-tp2-pp2-ep2 cannot be looked at: access denied" in said
    assert len(refused) == 1


def elements(checkpoint: mcorefs.api.Checkpoint, name: str) -> bytes:
    return np.asarray(checkpoint.get_tensor(name)).tobytes()


def test_an_object_replaced_between_reads(store: ObjectStore, fixtures: dict[str, Fixture]) -> None:
    """What was read stays what it was; the rest is refused, also if size and time are the same."""
    fixture = fixtures[MOE]
    iteration = copied(store, fixture, "replaced")
    with opened(MOE, "replaced") as checkpoint, opened(MOE) as original:
        first, *_, last = checkpoint.keys()
        before = elements(checkpoint, first)
        for path in shards(fixture):
            store.put(f"{iteration}/{path.name}", bytes(path.stat().st_size))
        assert elements(checkpoint, first) == before
        refused: set[str] = set()
        for name in original.keys():  # noqa: SIM118 (not a dict)
            try:
                assert elements(checkpoint, name) == elements(original, name)
            except ReadFault as fault:
                refused.add(str(fault).partition("distcp ")[2])
        assert refused == {
            "was replaced after the checkpoint was opened; open it again to read the new one"
        }
    with pytest.raises(ReadFault, match="not a well-formed"), opened(MOE, "replaced") as other:
        other.get_tensor(last)


def test_it_is_opened_as_it_is_now(store: ObjectStore, fixtures: dict[str, Fixture]) -> None:
    """No listing outlives what it was made for."""
    store.upload(fixtures[MOE].root, "growing")
    tracker = "growing/latest_checkpointed_iteration.txt"
    with opened(MOE, "growing"):
        pass
    store.put(tracker, b"200")
    with pytest.raises(CheckpointError, match="iter_0000200"):
        opened(MOE, "growing")
    for path in fixtures[MOE].iteration.iterdir():
        store.put(f"growing/iter_0000200/{path.name}", path.read_bytes())
    with opened(MOE, "growing") as checkpoint:
        assert checkpoint.keys()


def test_forked_processes_read_on_their_own(
    store: ObjectStore, fixtures: dict[str, Fixture]
) -> None:
    """As the workers of a data loader do, of a checkpoint that was opened before."""
    with opened(MOE) as checkpoint:
        checkpoint.get_tensor(checkpoint.keys()[0])
        in_child(lambda: assert_same_files(checkpoint.files, fixtures[MOE].hf), timeout=20)
        in_child(lambda: assert_same_files(checkpoint.files, fixtures[MOE].hf), timeout=20)
        assert_same_files(checkpoint.files, fixtures[MOE].hf)


def test_interrupting_leaves_nothing_behind(store: ObjectStore, tmp_path: Path) -> None:
    reading = threading.Event()

    def slow(request: Request) -> None:
        if is_shard(request):
            reading.set()
            time.sleep(0.5)

    with store.failing(slow):
        command = [sys.executable, "-m", "mcorefs", "materialize", f"s3://bucket/{MOE}"]
        process = subprocess.Popen([*command, str(tmp_path / "out")], stderr=subprocess.PIPE)
        assert reading.wait(120)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
