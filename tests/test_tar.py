"""Files inside tar archives: those that Python and GNU tar write, and those that an enemy does."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any, Literal

import pytest

from mcorefs import tar
from mcorefs.errors import CheckpointError, ReadFault
from mcorefs.formats.base import reading
from mcorefs.locate import locate
from mcorefs.storage import Storage, regular_file
from mcorefs.tar import ArchivePath, archive_path, member_at


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(path)
    return str(caught.value)


Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, data: bytes = b"", **attributes: Any) -> Entry:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, data


def written(archive: Path, *entries: Entry, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(archive, "w:", format=form) as opened:
        for info, data in entries:
            opened.addfile(info, io.BytesIO(data))
    return archive


GOOD = entry("./model_config.yaml", b"num_layers: 1\n")
HOSTILE: list[tuple[list[Entry], str]] = [
    ([GOOD, entry("/etc/passwd", b"x")], "'/etc/passwd', which leads out of it"),
    ([GOOD, entry("./../x", b"x")], "'./../x', which leads out of it"),
    ([GOOD, entry("a/../../x", b"x")], "which leads out of it"),
    ([GOOD, entry("a/" * 40 + "x", b"x")], "which leads out of it"),
    ([GOOD, GOOD], "comes twice"),
    ([GOOD, entry("model_config.yaml", b"y")], "comes twice"),
    ([GOOD, entry(".//model_config.yaml", b"y")], "comes twice"),
    ([GOOD, entry("model_config.yaml/x", b"y")], "is both a file and a directory"),
    ([entry("a/b", b"y"), entry("a", b"y")], "comes twice"),
    ([GOOD, entry("x", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "'x' is a symbolic link"),
    ([GOOD, entry("x", type=tarfile.LNKTYPE, linkname="model_config.yaml")], "'x' is a hard link"),
    ([GOOD, entry("x", type=tarfile.FIFOTYPE)], "'x' is a FIFO"),
    ([GOOD, entry("x", type=tarfile.CHRTYPE)], "'x' is a device"),
    ([GOOD, entry("x", type=tarfile.CONTTYPE)], "'x' is of type b'7'"),
    ([GOOD, entry("x", type=b"S")], "'x' is a sparse file"),
    ([GOOD, entry("x", pax_headers={"GNU.sparse.major": "1"})], "it holds a sparse file"),
    ([GOOD, entry("x" * 70_000, b"x")], "an extended header has 7"),
    ([GOOD, entry("x", pax_headers={"comment": "y" * 70_000})], "an extended header has 7"),
    ([GOOD, entry("a\nb", b"x")], "a member is called 'a\\nb'"),
    ([GOOD, entry("a\udc80", b"x")], "a member is called"),
    ([GOOD, entry(".", b"x")], "a member is called '.'"),
    ([GOOD, entry("x", b"", pax_headers={"path": "/etc/passwd"})], "which leads out of it"),
    ([GOOD, entry("x", b"", pax_headers={"size": "99999"})], "ends at byte"),
    ([GOOD, entry("x", b"", pax_headers={"size": "-1"})], "a member has '-1' bytes"),
    ([GOOD, entry("x", b"", pax_headers={"size": "9" * 400})], "a member has '999"),
]


@pytest.mark.parametrize(("entries", "problem"), HOSTILE)
def test_an_archive_with_more_than_files(
    tmp_path: Path, entries: list[Entry], problem: str
) -> None:
    said = refusal(written(tmp_path / "x.nemo", *entries))
    assert f"{tmp_path / 'x.nemo'} is not an archive that can be opened" in said
    assert problem in said
    assert len(said) < 1000


def test_a_name_that_is_too_long_for_gnu(tmp_path: Path) -> None:
    entries = [GOOD, entry("x" * 70_000, b"x")]
    said = refusal(written(tmp_path / "x.nemo", *entries, form=tarfile.GNU_FORMAT))
    assert "an extended header has 70001 bytes" in said


def test_a_global_header_that_names_members(tmp_path: Path) -> None:
    archive = tmp_path / "x.nemo"
    with tarfile.open(archive, "w:", pax_headers={"path": "elsewhere"}) as opened:
        opened.addfile(GOOD[0], io.BytesIO(GOOD[1]))
    assert "a global header names its members" in refusal(archive)
    with tarfile.open(archive, "w:", pax_headers={"comment": "of git"}) as opened:
        opened.addfile(GOOD[0], io.BytesIO(GOOD[1]))
    assert member_at(f"{archive}/model_config.yaml") is not None


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_MEMBERS", 10)
    archive = written(tmp_path / "x.nemo", *(entry(str(number)) for number in range(11)))
    assert "it has more than 10 members" in refusal(archive)


def test_every_flipped_byte_of_a_header_is_noticed(tmp_path: Path) -> None:
    archive = written(tmp_path / "x.nemo", entry("a/b", b"data"))
    whole = archive.read_bytes()
    for at in (*range(154), *range(156, 512)):  # two bytes end the checksum, with nothing in them
        archive.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
        with pytest.raises(CheckpointError):
            member_at(f"{archive}/a/b")


# -- names in an archive --------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_lie_where_the_standard_library_says(tmp_path: Path, form: int) -> None:
    long = "directory-" * 8 + "/" + "file-" * 10
    names = ["a", "./b/c", "b/d/e", long]
    if form != tarfile.USTAR_FORMAT:
        names += ["x" * 300, "ü/ß", "deep/" * 30 + "er"]
    entries = [entry(name, os.urandom(number * 300)) for number, name in enumerate(names)]
    archive = written(tmp_path / "x.nemo", *entries, form=form)
    with tarfile.open(archive) as opened:
        for info in opened:
            member = member_at(f"{archive}/{os.path.normpath(info.name)}")
            assert member is not None
            assert (member.start, member.nbytes) == (info.offset_data, info.size)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_more_than_8_gib(tmp_path: Path, form: Literal[1, 2]) -> None:
    archive, size = tmp_path / "x.nemo", 9 << 30
    with archive.open("wb") as file:
        info = tarfile.TarInfo("large")
        info.size = size
        file.write(info.tobuf(form))
        start = file.tell()
        file.seek(start + size)
        file.write(entry("small", b"abc")[0].tobuf(form) + b"abc" + bytes(509 + 1024))
    large, small = member_at(f"{archive}/large"), member_at(f"{archive}/small")
    assert large is not None
    assert (large.start, large.nbytes) == (start, size)
    assert (archive_path(archive) / "small").read_bytes() == b"abc"
    assert small is not None


def test_a_path_in_an_archive_is_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "beside").write_text("beside")
    archive = written(tmp_path / "x.nemo", entry("b/c.txt", b"one\ntwo"), entry("b/d/.x", b""))
    path = archive_path(archive)
    assert isinstance(path, ArchivePath)
    assert path.is_dir()
    assert not path.is_file()
    assert sorted(child.name for child in path.iterdir()) == ["b"]
    assert sorted(child.name for child in (path / "b").iterdir()) == ["c.txt", "d"]
    file = path / "b" / "c.txt"
    assert (file.read_bytes(), file.read_text()) == (b"one\ntwo", "one\ntwo")
    assert (file.is_file(), file.is_dir(), file.exists(), file.is_symlink()) == (True, 0, True, 0)
    assert file.stat().st_size == file.lstat().st_size == 7
    assert file.resolve() == file
    assert [str(found) for found in path.glob("*/*.txt")] == [str(file)]
    assert list(path.glob("*/nothing")) == []
    with file.open("rb") as opened:
        assert (opened.read(2), opened.read(100), opened.read()) == (b"on", b"e\ntwo", b"")
    missing = path / "b" / "x"
    assert not missing.exists()
    for look in (missing.stat, missing.read_bytes, lambda: list(missing.iterdir())):
        with pytest.raises(FileNotFoundError):
            look()
    assert path.parent == tmp_path
    assert (path.parent / "beside").read_text() == "beside"
    assert sorted(child.name for child in path.parent.iterdir()) == ["beside", "x.nemo"]
    assert [found.name for found in path.parent.glob("b*")] == ["beside"]


def test_ranges_end_where_a_member_does(tmp_path: Path) -> None:
    archive = written(tmp_path / "x.nemo", entry("a", b"0123456789"), entry("b", b"secret"))
    name = f"{archive}/a"
    identity, why = regular_file(name)
    assert why is None
    assert identity is not None
    assert identity.size == 10
    storage = Storage({name: identity})
    assert storage.read(name, 4, 6) == b"456789"
    for offset, count in ((4, 7), (10, 1), (11, 1), (600, 1)):
        with pytest.raises(ReadFault):
            storage.read(name, offset, count)
        with pytest.raises(CheckpointError), reading(name) as pread:
            pread(offset, count)
    storage.close()
    assert regular_file(f"{archive}/c") == (None, "No such file or directory")
    assert not [fd for fd in os.listdir("/proc/self/fd") if _leads_to(fd, archive)]


def test_an_archive_that_is_replaced_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking for a member and opening the archive, or reading what it holds."""
    archive = written(tmp_path / "x.nemo", entry("a", b"0123456789"))
    member = member_at(f"{archive}/a")
    assert member is not None
    other = written(tmp_path / "y.nemo", entry("b", b"9876543210"), entry("a", b"9876543210"))
    old = archive_path(archive) / "a"
    status = os.lstat(archive)
    os.replace(other, archive)
    with pytest.raises(OSError, match="replaced while it was being opened"):
        tar.open_archive(member)
    tar._read.cache_clear()
    monkeypatch.setattr(tar, "_split", lambda path: (str(archive), "a", status))
    with pytest.raises(CheckpointError, match="replaced while it was being opened"):
        old.read_bytes()


def _leads_to(fd: str, file: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == str(file)
    except FileNotFoundError:
        return False
