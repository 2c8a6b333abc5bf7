"""Indexes kept on disk: with them all is as without; what is not surely the same is not used."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import pytest

from mcorefs import index_cache
from mcorefs.errors import McorefsError, ReadFault
from mcorefs.files import read_all
from mcorefs.formats import Checkpoint, WeightsFrom, detect
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.model import Options
from mcorefs.tree import Opened, open_tree
from tests.checkpoints import Fixture, ensure

NAMES = (
    "qwen3_moe-tp2-pp2-ep2-etp2",  # torch_dist
    "torch-qwen3_moe-tp2-pp2-ep2-etp1",
    "fsdp-qwen3-tp2-dp2",
    "zarr-qwen3_moe-tp2-pp2-ep2",
)
MOE = NAMES[0]


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure(list(NAMES))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indexes are kept; even of what was just written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "SETTLED", -(1 << 62))
    return index_cache.directory()


def opened(fixture: Fixture, root: Path | None = None, **more: object) -> Opened:
    options = Options(vocab_size=fixture.spec.vocab_size, index_cache=True, **more)  # type: ignore[arg-type]
    return open_tree(root or fixture.root, options)


def contents(found: Opened) -> dict[str, bytes]:
    return {name: read_all(file) for name, file in found.tree.files.items()}


def fresh(fixture: Fixture, root: Path | None = None, **more: object) -> dict[str, bytes]:
    options = Options(vocab_size=fixture.spec.vocab_size, **more)  # type: ignore[arg-type]
    return contents(open_tree(root or fixture.root, options))


def never(self: object, path: Path, weights: WeightsFrom = "model") -> Checkpoint:
    raise AssertionError("the index is made again")


def forbid(patch: pytest.MonkeyPatch, root: Path) -> None:
    """From here on, an index must come from the cache."""
    format_ = next(found for child in root.iterdir() if (found := detect(child)))
    patch.setattr(type(format_), "index", never)


def copy(fixture: Fixture, tmp_path: Path) -> Path:
    return shutil.copytree(fixture.root, tmp_path / "run")


@pytest.mark.parametrize("name", NAMES)
def test_the_second_time_is_as_the_first(
    name: str, fixtures: dict[str, Fixture], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = fixtures[name]
    expected = fresh(fixture)
    assert contents(first := opened(fixture)) == expected
    (file,) = kept.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    forbid(monkeypatch, fixture.root)
    assert contents(again := opened(fixture)) == expected
    assert again.source.remarks == first.source.remarks
    assert again.source.checkpoint == _but_tensors(again, first)
    assert again.tree.source == first.tree.source


def _but_tensors(found: Opened, other: Opened) -> Checkpoint:
    """The checkpoint of `other`, with the tensors of `found`, which are equal only to themselves,
    if they are cut alike."""
    ours, theirs = found.source.checkpoint, other.source.checkpoint
    assert list(ours.tensors) == list(theirs.tensors)
    for one, two in zip(ours.tensors.values(), theirs.tensors.values(), strict=True):
        assert (one.fqn, one.dtype, one.shape) == (two.fqn, two.dtype, two.shape)
        assert one.chunks == two.chunks
    return Checkpoint(**{**theirs.__dict__, "tensors": ours.tensors})


def test_options_that_an_index_does_not_depend_on_are_free(
    fixtures: dict[str, Fixture], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = fixtures[MOE]
    expected = fresh(fixture, dtype="float32", shard_size="200KB")
    opened(fixture)
    forbid(monkeypatch, fixture.root)
    assert contents(opened(fixture, dtype="float32", shard_size="200KB")) == expected


def test_other_weights_are_another_index(fixtures: dict[str, Fixture], kept: Path) -> None:
    fixture = fixtures[MOE]
    expected = fresh(fixture, weights="optimizer")
    assert expected != contents(opened(fixture))
    for _ in range(2):
        assert contents(opened(fixture, weights="optimizer")) == expected
    assert len(list(kept.iterdir())) == 2


def test_a_tokenizer_that_comes_later_is_seen(
    fixtures: dict[str, Fixture], kept: Path, tmp_path: Path
) -> None:
    fixture = fixtures[MOE]
    root = copy(fixture, tmp_path)
    before = contents(opened(fixture, root))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / name).write_bytes(before[name] + b"\n")
    after = contents(opened(fixture, root))
    assert after["tokenizer.json"] == before["tokenizer.json"] + b"\n"


def _touched(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def _rewritten(file: Path) -> None:
    """In place, with the time set back: only ctime tells."""
    status = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replaced(file: Path) -> None:
    other = shutil.copy2(file, file.with_name("other"))
    os.replace(other, file)


def _added(file: Path) -> None:
    file.with_name("new").touch()


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "metadata.json"])
@pytest.mark.parametrize("change", [_touched, _rewritten, _replaced, _added])
def test_any_change_is_noticed(
    name: str,
    change: Callable[[Path], None],
    fixtures: dict[str, Fixture],
    kept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fixture = fixtures[MOE]
    root = copy(fixture, tmp_path)
    opened(fixture, root)
    (iteration,) = (child for child in root.iterdir() if detect(child))
    change(iteration / name)
    monkeypatch.setattr(TorchDist, "index", never)
    with pytest.raises(AssertionError, match="made again"):
        opened(fixture, root)


def test_a_shard_that_is_gone_is_reported_as_ever(
    fixtures: dict[str, Fixture], kept: Path, tmp_path: Path
) -> None:
    fixture = fixtures[MOE]
    root = copy(fixture, tmp_path)
    opened(fixture, root)
    next(root.rglob("__0_0.distcp")).unlink()
    with pytest.raises(McorefsError, match=r"__0_0\.distcp"):
        opened(fixture, root)


def test_another_program_makes_its_own(
    fixtures: dict[str, Fixture], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = fixtures[MOE]
    opened(fixture)
    program = tmp_path / "mcorefs"
    program.mkdir()
    (program / "index_cache.py").write_text("")
    monkeypatch.setattr(index_cache, "__file__", str(program / "index_cache.py"))
    monkeypatch.setattr(TorchDist, "index", never)
    with pytest.raises(AssertionError, match="made again"):
        opened(fixture)


def test_what_was_just_written_is_not_kept(
    fixtures: dict[str, Fixture], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_cache, "SETTLED", 2_000_000_000)
    opened(fixtures[MOE], copy(fixtures[MOE], tmp_path))
    assert not kept.exists()


def test_links_are_not_kept(fixtures: dict[str, Fixture], kept: Path, tmp_path: Path) -> None:
    root = copy(fixtures[MOE], tmp_path)
    (iteration,) = (child for child in root.iterdir() if detect(child))
    (iteration / "link").symlink_to("/")
    opened(fixtures[MOE], root)
    assert not kept.exists()


def _sealed(body: bytes) -> bytes:
    return index_cache.MAGIC + blake2b(body, digest_size=32).digest() + body


def _damages(data: bytes) -> dict[str, bytes]:
    start = len(index_cache.MAGIC) + 32
    body = data[start:]
    size = int.from_bytes(body[32:40], "little")
    described = json.loads(body[40 : 40 + size])

    def changed(rest: bytes = body[40 + size :], **fields: object) -> bytes:
        text = json.dumps({**described, **fields}).encode()
        text += b" " * (-len(text) % 8)
        return _sealed(body[:32] + len(text).to_bytes(8, "little") + text + rest)

    first, *others = described["tensors"]
    return {
        "empty": b"",
        "cut": data[:-1],
        "head only": data[:start],
        "one bit": data[: start + 200] + bytes([data[start + 200] ^ 1]) + data[start + 201 :],
        "other magic": b"X" + data[1:],
        "no state": _sealed(b""),
        "other state": _sealed(b"\0" * 32 + body[32:]),
        "no JSON": _sealed(body[:40] + b"\xff" * size + body[40 + size :]),
        "a list": _sealed(body[:32] + (8).to_bytes(8, "little") + b"[1]     "),
        "deep JSON": _sealed(body[:32] + (1 << 20).to_bytes(8, "little") + b"[" * (1 << 20)),
        "long header": _sealed(body[:32] + b"\xff" * 8 + body[40:]),
        "other path": changed(path="/etc"),
        "file elsewhere": changed(files=["../../../etc/passwd", *described["files"][1:]]),
        "absolute file": changed(files=["/etc/passwd", *described["files"][1:]]),
        "unknown dtype": changed(tensors=[[*first[:2], "X", *first[3:]], *others]),
        "negative shape": changed(tensors=[[*first[:3], [-1], first[4]], *others]),
        "huge count": changed(tensors=[[*first[:4], 1 << 62], *others]),
        "no count": changed(tensors=[[*first[:4], None], *others]),
        "fewer numbers": changed(body[40 + size : -8]),
        "more numbers": changed(body[40 + size :] + b"\0" * 8),
        "no tensors": changed(tensors=None),
    }


def test_what_is_not_whole_is_ignored(
    fixtures: dict[str, Fixture], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = fixtures[MOE]
    opened(fixture)
    (file,) = kept.iterdir()
    data = file.read_bytes()
    for what, damaged in _damages(data).items():
        file.write_bytes(damaged)
        with monkeypatch.context() as patch:
            patch.setattr(TorchDist, "index", never)
            try:
                opened(fixture)
            except AssertionError:
                continue
        pytest.fail(what)
    opened(fixture)  # which replaces it
    assert file.read_bytes() == data


def test_numbers_that_somebody_sealed_cannot_make_wrong_bytes(
    fixtures: dict[str, Fixture], kept: Path
) -> None:
    """Only this user could; chunks that do not tile a tensor are found when it is read."""
    fixture = fixtures[MOE]
    opened(fixture)
    (file,) = kept.iterdir()
    data = file.read_bytes()
    start = len(index_cache.MAGIC) + 32
    body = bytearray(data[start:])
    size = int.from_bytes(body[32:40], "little")
    body[40 + size :] = bytes(len(body) - 40 - size)
    file.write_bytes(_sealed(bytes(body)))
    with pytest.raises(ReadFault, match="remembered wrongly"):
        contents(opened(fixture))


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_what_others_can_write_is_ignored(
    mode: int, fixtures: dict[str, Fixture], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = fixtures[MOE]
    opened(fixture)
    (file,) = kept.iterdir()
    file.chmod(mode)
    monkeypatch.setattr(TorchDist, "index", never)
    with pytest.raises(AssertionError, match="made again"):
        opened(fixture)


def test_links_fifos_and_other_owners_are_ignored(
    fixtures: dict[str, Fixture], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = fixtures[MOE]
    opened(fixture)
    (file,) = kept.iterdir()
    monkeypatch.setattr(TorchDist, "index", never)
    with monkeypatch.context() as patch:
        patch.setattr("os.geteuid", lambda: 12345)
        with pytest.raises(AssertionError, match="made again"):
            opened(fixture)
    os.rename(file, tmp_path / "elsewhere")
    for is_link in (True, False):
        if is_link:
            file.symlink_to(tmp_path / "elsewhere")
        else:
            os.mkfifo(file)
        with pytest.raises(AssertionError, match="made again"):
            opened(fixture)
        file.unlink()


def test_where_nothing_can_be_written_opening_goes_on(
    fixtures: dict[str, Fixture], kept: Path, tmp_path: Path
) -> None:
    fixture = fixtures[MOE]
    (tmp_path / "cache").write_text("a file in the place of the directory")
    assert contents(opened(fixture)) == fresh(fixture)
    (tmp_path / "cache").unlink()
    kept.mkdir(parents=True)
    kept.chmod(0o777)
    opened(fixture)
    assert list(kept.iterdir()) == []


def test_the_least_used_goes_first(
    fixtures: dict[str, Fixture], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = fixtures[MOE]
    roots = [shutil.copytree(fixture.root, tmp_path / name) for name in "abc"]
    opened(fixture, roots[0])
    (first,) = kept.iterdir()
    opened(fixture, roots[1])
    (second,) = set(kept.iterdir()) - {first}
    os.utime(first, ns=(0, 1))
    os.utime(second, ns=(0, 2))
    opened(fixture, roots[0])  # is used, and so newer
    monkeypatch.setattr(index_cache, "MAX_BYTES", 2 * first.stat().st_size + 100)
    opened(fixture, roots[2])
    assert len(list(kept.iterdir())) == 2
    assert first.exists()
    assert not second.exists()
