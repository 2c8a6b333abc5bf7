"""`verify` without a directory to compare with: manifests and checksums that the run saved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mcorefs.errors import CheckpointError
from mcorefs.formats import Checkpoint, detect
from mcorefs.locate import locate
from mcorefs.storage import Storage
from mcorefs.verify import Findings, checksums, integrity
from mcorefs.verify.checks import own_proof
from mcorefs.verify.findings import PIECE, threads
from tests.checkpoints import Fixture, ensure
from tests.edited import copy, unprivileged
from tests.test_torch_legacy import rewritten

NAME, LEGACY = "qwen3-tp2", "torch-qwen3_moe-tp2-pp2-ep2-etp1"


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure([NAME, LEGACY])


@pytest.fixture
def iteration(fixtures: dict[str, Fixture], tmp_path: Path) -> Path:
    return with_manifest(copy(fixtures[NAME], tmp_path))


def with_manifest(directory: Path) -> Path:
    """As megatron-core writes it: megatron/core/dist_checkpointing/validation.py."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    payload = {"algorithm": "sha256", "files": digests}
    (directory / "integrity.json").write_text(json.dumps(payload, indent=2))
    return directory


def checked(directory: Path) -> Findings:
    digests = integrity.read_manifest(directory)
    assert digests is not None
    return integrity.check(directory, digests)


def wrong(findings: Findings) -> dict[str, str]:
    return {difference.name: difference.problem for difference in findings.differences}


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


# -- integrity.json -------------------------------------------------------------------------------


def test_all_files_as_saved(iteration: Path) -> None:
    files = [path for path in iteration.iterdir() if path.name != "integrity.json"]
    seen: list[int] = []
    digests = integrity.read_manifest(iteration)
    assert digests is not None
    findings = integrity.check(iteration, digests, seen.append)
    assert (findings.differences, findings.remarks) == ((), ())
    assert findings.sound == len(files)
    size = sum(path.stat().st_size for path in files)
    assert sum(seen) == findings.total_bytes == integrity.total_bytes(iteration, digests) == size
    assert own_proof(locate(iteration)).doing == "Hashing"


def test_changed_missing_and_added_files_are_all_named(iteration: Path) -> None:
    shards = sorted(iteration.glob("*.distcp"))
    flip(shards[0], shards[0].stat().st_size // 2)
    with shards[1].open("ab") as file:
        file.write(b"\0")
    (iteration / "common.pt").unlink()
    (iteration / "__9_9.distcp").write_bytes(b"another save")
    (iteration / ".metadata.bak").touch()
    (iteration / "tokenizer").mkdir()
    (iteration / "config.json").write_text("{}")
    found = checked(iteration)
    assert wrong(found).keys() == {shards[0].name, shards[1].name, "common.pt", "__9_9.distcp"}
    for shard in shards[:2]:
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        assert (
            f"was changed: its SHA-256 is {digest[:16]}..., saved was" in wrong(found)[shard.name]
        )
    assert "is missing, but integrity.json lists it" in wrong(found)["common.pt"]
    assert "is not listed in integrity.json" in wrong(found)["__9_9.distcp"]
    assert found.remarks == (
        "not listed in integrity.json, so not checked: .metadata.bak, config.json, tokenizer/",
    )


def test_a_common_pt_that_was_slipped_in(iteration: Path) -> None:
    """It would be read, and believed, before what the shards hold."""
    manifest = json.loads((iteration / "integrity.json").read_text())
    del manifest["files"]["common.pt"]
    (iteration / "integrity.json").write_text(json.dumps(manifest))
    assert wrong(checked(iteration)).keys() == {"common.pt"}


def test_files_that_are_no_files(iteration: Path) -> None:
    shards = sorted(iteration.glob("*.distcp"))
    shutil.move(shards[0], iteration.parent / "elsewhere")
    shards[0].symlink_to(iteration.parent / "elsewhere")
    shards[1].unlink()
    os.mkfifo(shards[1])
    (iteration / "common.pt").unlink()
    (iteration / "common.pt").mkdir()
    found = wrong(checked(iteration))
    assert "is a symbolic link" in found[shards[0].name]
    assert found[shards[1].name] == found["common.pt"] == "is not a regular file"


def test_files_that_cannot_be_read(iteration: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(shutil.copytree(iteration, Path(directory) / "x"))
        Path(directory).chmod(0o755)
        (place / ".metadata").chmod(0)
        with unprivileged():
            found = checked(place)
    (problem,) = wrong(found).values()
    assert wrong(found).keys() == {".metadata"}
    assert problem.startswith("cannot be read: ")
    assert "Permission denied" in problem


def test_a_file_that_is_written_to_meanwhile(iteration: Path) -> None:
    shard = sorted(iteration.glob("*.distcp"))[0]
    digests = integrity.read_manifest(iteration)
    assert digests is not None

    def write(count: int) -> None:
        if count == shard.stat().st_size:
            os.utime(shard, ns=(0, 0))

    found = integrity.check(iteration, {shard.name: digests[shard.name]}, write)
    assert wrong(found)[shard.name] == "was written to while it was read"


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/b", "", ".", "..", "a\0b", "\ud800", "x" * 300]
)
def test_names_that_lead_elsewhere(iteration: Path, name: str) -> None:
    (iteration.parent / "secret").write_text("x")
    manifest = json.loads((iteration / "integrity.json").read_text())
    manifest["files"][name] = "0" * 64
    (iteration / "integrity.json").write_text(json.dumps(manifest))
    if len(name) == 300:
        assert "File name too long" in wrong(checked(iteration))[name]
        return
    with pytest.raises(CheckpointError, match="which is not one of this directory") as caught:
        integrity.read_manifest(iteration)
    assert "secret" not in str(caught.value).replace("../secret", "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"files": []}', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"files": {"a": "x", "a": "y"}}', "a name comes twice"),
        ('{"algorithm": "md5", "files": {}}', "is of algorithm 'md5'; only sha256"),
        ('{"algorithm": ["sha256"], "files": {}}', "only sha256"),
        ('{"files": {"a": "0"}}', "gives '0' for a, which is no SHA-256"),
        ('{"files": {"a": 7}}', "which is no SHA-256"),
        (json.dumps({"files": {"a": "F" * 64}}), "which is no SHA-256"),
    ],
)
def test_manifests_that_cannot_be(iteration: Path, text: str, why: str) -> None:
    (iteration / "integrity.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        integrity.read_manifest(iteration)
    assert why in str(caught.value)


def test_a_manifest_that_is_no_file(iteration: Path) -> None:
    manifest = iteration / "integrity.json"
    manifest.rename(iteration.parent / "other.json")
    assert integrity.read_manifest(iteration) is None
    manifest.symlink_to("../other.json")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        integrity.read_manifest(iteration)
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        integrity.read_manifest(iteration)


def test_memory_is_bounded(tmp_path: Path) -> None:
    for number in range(12):
        with (tmp_path / f"__{number}_0.distcp").open("wb") as file:
            file.truncate(3 * PIECE + number)
    with_manifest(tmp_path)
    digests = integrity.read_manifest(tmp_path)
    assert digests is not None
    tracemalloc.start()
    try:
        assert integrity.check(tmp_path, digests).differences == ()
        assert tracemalloc.get_traced_memory()[1] < (threads() + 1) * PIECE
    finally:
        tracemalloc.stop()


# -- checksums ------------------------------------------------------------------------------------


def index(directory: Path) -> Checkpoint:
    format_ = detect(directory)
    assert format_ is not None
    return format_.index(directory)


def damaged(directory: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each of a checkpoint's tensors, with what flips one bit of its data."""
    storage = Storage(index(directory).files)
    for fqn, tensor in index(directory).tensors.items():
        chunk = tensor.chunks[-1]
        placed = storage.place(chunk, tensor.dtype)
        path, at = Path(placed.path), placed.offset + 5
        yield fqn, lambda path=path, at=at: flip(path, at)  # type: ignore[misc]
    storage.close()


@pytest.mark.parametrize("name", [NAME, LEGACY])
def test_every_flipped_bit_is_found(
    fixtures: dict[str, Fixture], tmp_path: Path, name: str
) -> None:
    iteration = copy(fixtures[name], tmp_path)
    assert own_proof(locate(iteration)).doing == "Checking"
    seen: list[int] = []
    whole = checksums.check(index(iteration), seen.append)
    assert (whole.differences, whole.remarks) == ((), ())
    assert sum(seen) == whole.total_bytes
    assert whole.total_bytes == pytest.approx(checksums.total_bytes(index(iteration)), rel=0.2)
    spans = {
        (c.span.path, c.span.offset) for t in index(iteration).tensors.values() for c in t.chunks
    }
    assert whole.sound >= len(spans)
    for number, (fqn, flip_it) in enumerate(list(damaged(iteration))):
        if number % 7 == 0:
            flip_it()
            found = wrong(checksums.check(index(iteration)))
            assert found.keys() == {fqn}
            assert "is damaged on disk" in found[fqn]
            flip_it()


def test_what_does_not_hold_weights_is_not_read(
    fixtures: dict[str, Fixture], tmp_path: Path
) -> None:
    """An optimizer in the same file is larger than the model, and nobody serves it."""
    fixture = ensure(["torch-qwen3-tp2"])["torch-qwen3-tp2"]
    assert fixture.spec.optimizer_entries
    checkpoint = index(fixture.iteration)
    size = sum(identity.size for identity in checkpoint.files.values())
    assert checksums.check(checkpoint).total_bytes < size / 3


def test_archives_without_checksums(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        root = rewritten(fixtures[LEGACY], tmp_path / "root", lambda state, name: None)
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(CheckpointError, match="was saved without any checksum, so nothing says"):
        checksums.check(index(root / fixtures[LEGACY].iteration.name))
    one = sorted((root / fixtures[LEGACY].iteration.name).glob("*/*.pt"))[0]
    shutil.copy(fixtures[LEGACY].iteration / one.parent.name / one.name, one)
    found = checksums.check(index(root / fixtures[LEGACY].iteration.name))
    assert found.sound > 0
    assert "records were saved without a checksum" in found.remarks[0]


def test_shards_that_go_while_they_are_checked(iteration: Path) -> None:
    checkpoint = index(iteration)
    shards = sorted(iteration.glob("*.distcp"))
    shards[0].unlink()
    found = wrong(checksums.check(checkpoint))
    assert found
    assert all(str(shards[0]) in problem for problem in found.values())


def test_a_directory_that_nothing_proves(fixtures: dict[str, Fixture]) -> None:
    with pytest.raises(CheckpointError, match=r"nothing in it says what bytes.*HF_DIR.*--deep"):
        own_proof(locate(fixtures[NAME].hf))
