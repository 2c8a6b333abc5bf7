"""Mount points, mountinfo and the choice of libfuse: what needs no mount of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcorefs.errors import MountError
from mcorefs.files import BytesFile
from mcorefs.mount import MountOptions, check_mountpoint, mounted, unmount
from mcorefs.mount.mountpoint import parse_mountinfo
from mcorefs.mount.nodes import build_nodes
from mcorefs.mount.operations import FaultLog
from mcorefs.mount.place import claimed
from mcorefs.tree import VirtualTree


def load_elsewhere(code: str = "", **variables: str) -> str:
    """What `load_binding` says in a process of its own: a binding, once loaded, stays."""
    text = (
        "from mcorefs.errors import MountError\n"
        "from mcorefs.mount.binding import load_binding\n"
        f"import os\n{code}\n"
        "try:\n"
        "    binding = load_binding()\n"
        "    print(binding.flavour.name, *binding.version, os.environ.get('FUSE_LIBRARY_PATH'))\n"
        "except MountError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-c", text],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_libfuse3_is_preferred_and_the_environment_left_alone() -> None:
    said = load_elsewhere(MCOREFS_FUSE="")
    assert said.startswith("libfuse3 3 ")
    assert said.endswith(" None\n")


@pytest.mark.parametrize("name", ["libfuse2", "libfuse3"])
def test_the_choice_can_be_forced(name: str) -> None:
    assert load_elsewhere(MCOREFS_FUSE=name).startswith(f"{name} {name[-1]} ")


def test_both_bindings_can_be_loaded_in_one_process() -> None:
    code = (
        "os.environ['MCOREFS_FUSE'] = 'libfuse2'\n"
        "load_binding()\n"
        "os.environ['MCOREFS_FUSE'] = 'libfuse3'\n"
    )
    assert load_elsewhere(code).startswith("libfuse3 3 ")


def test_unknown_choice() -> None:
    said = load_elsewhere(MCOREFS_FUSE="libfuse4")
    assert "'libfuse4', expected libfuse3 or libfuse2" in said


def test_no_library_says_why_and_what_to_do() -> None:
    said = load_elsewhere(MCOREFS_FUSE="", FUSE_LIBRARY_PATH="/nonexistent/libfuse.so")
    for expected in (
        "libfuse3 through mfusepy: /nonexistent/libfuse.so: cannot open",
        "libfuse2 through fusepy: /nonexistent/libfuse.so: cannot open",
        "apt-get install fuse3",
        "mcorefs materialize",
        "mcorefs.open()",
    ):
        assert expected in said


def test_missing_binding_falls_back() -> None:
    code = "import sys; sys.modules['mfusepy'] = None"
    assert load_elsewhere(code, MCOREFS_FUSE="").startswith("libfuse2 2 ")
    assert "libfuse3 through mfusepy: import of mfusepy halted" in load_elsewhere(
        code, MCOREFS_FUSE="libfuse3"
    )


def test_other_module_called_fuse_is_told_apart() -> None:
    code = "import sys, types; sys.modules['fuse'] = types.ModuleType('fuse')"
    assert "is not that of fusepy" in load_elsewhere(code, MCOREFS_FUSE="libfuse2")


def test_binding_in_use_with_the_other_library() -> None:
    code = "os.environ['FUSE_LIBRARY_PATH'] = 'libfuse.so.2'; import mfusepy"
    code += "; del os.environ['FUSE_LIBRARY_PATH']"
    said = load_elsewhere(code, MCOREFS_FUSE="libfuse3")
    assert "mfusepy is already in use with libfuse 2" in said


def test_mountinfo() -> None:
    text = (
        b"22 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n"
        b"40 22 0:35 / /mnt/with\\040blank\\134and\\011tab rw shared:7 master:2 - "
        b"fuse.mcorefs hf-mount ro,user_id=0\n"
        b"41 22 0:36 /sub /mnt/\xff rw - tmpfs none\n"
        b"not a line of mountinfo\n"
    )
    root, ours, last = parse_mountinfo(text)
    assert (root.mountpoint, root.device, root.fstype) == (Path("/"), "254:0", "ext4")
    assert ours.mountpoint == Path("/mnt/with blank\\and\ttab")
    assert (ours.source, ours.ours, ours.device) == ("hf-mount", True, "0:35")
    assert ours.options == {"rw", "ro", "user_id=0"}
    assert os.fsencode(last.mountpoint) == b"/mnt/\xff"


def test_mounted() -> None:
    root = mounted(Path("/"))
    assert root is not None
    assert not root.ours
    proc = mounted(Path("/sys/../proc"))
    assert proc is not None
    assert proc.fstype == "proc"


def test_mounted_follows_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    (tmp_path / "again").symlink_to("link")
    entry = mounted(tmp_path / "again")
    assert entry is not None
    assert entry.mountpoint == Path("/proc")
    assert mounted(tmp_path) is None
    assert mounted(tmp_path / "absent/below") is None
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(MountError, match="too many levels"):
        mounted(tmp_path / "loop")


def test_a_good_mountpoint(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    check_mountpoint(tmp_path / "mnt")


def test_bad_mountpoints(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thing").touch()
    for mnt, message in (
        (Path("/"), "is the root directory"),
        (tmp_path / "absent", f"does not exist. Create it with: mkdir -p {tmp_path}/absent"),
        (tmp_path / "file", "is not a directory"),
        (tmp_path / "file/below", "does not exist"),
        (tmp_path / "full", "is not empty .it has 'thing'."),
        (Path("/proc"), "already a mount point .proc from proc.: .*: umount /proc"),
    ):
        with pytest.raises(MountError, match=message):
            check_mountpoint(mnt)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_place_is_claimed_by_one(tmp_path: Path) -> None:
    options = MountOptions()
    with claimed(tmp_path, options) as release:
        with pytest.raises(MountError, match="about to mount there"), claimed(tmp_path, options):
            pass
        release()
        with claimed(tmp_path, options):
            pass
    with claimed(tmp_path, options):
        pass
    with pytest.raises(MountError, match="already a mount point"), claimed(Path("/proc"), options):
        pass


def test_mountpoint_of_another_user(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "closed/mnt").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    for directory in (tmp_path, *tmp_path.parents[:-2]):
        directory.chmod(directory.stat().st_mode | 0o055)
    try:
        os.seteuid(65534)
        with pytest.raises(MountError, match=r"not writable for this user \(uid 65534\)"):
            check_mountpoint(tmp_path / "mnt")
        with pytest.raises(MountError, match="cannot be looked into: Permission denied"):
            check_mountpoint(tmp_path / "closed/mnt")
    finally:
        os.seteuid(0)


def test_unmounting_what_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="not a mount point"):
        unmount(tmp_path)
    with pytest.raises(MountError, match="is a proc mount from proc, not one of mcorefs"):
        unmount(Path("/proc"), force=True)


@pytest.mark.parametrize("fsname", ["", "two words", "a,allow_other", "a\\", "x" * 65])
def test_names_that_libfuse_would_misread(fsname: str) -> None:
    with pytest.raises(MountError, match="file system name"):
        MountOptions(fsname=fsname)


@pytest.mark.parametrize("path", ["", "/a", "a//b", "a/", "./a", "a/..", "a\0b", "n" * 256])
def test_paths_that_cannot_be_shown(path: str) -> None:
    with pytest.raises(MountError, match="cannot be shown"):
        build_nodes(VirtualTree({path: BytesFile(b"")}, 0))


def test_repeated_faults_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    faults = FaultLog(interval=1000, remembered=2)
    for _ in range(10):
        faults.report("one")
    faults.report("two")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["one", "two (9 repeated messages not shown)"]
    faults.report("three")  # forgets the others rather than growing
    faults.report("one")
    assert len(caplog.records) == 4
