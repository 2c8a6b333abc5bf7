"""A mount that somebody else made, whose descriptor of /dev/fuse is handed over, as CSI drivers do;
and mounts of one's own in namespaces without privileges."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcorefs.mount import mounted
from tests.checkpoints import Fixture, ensure

NAME = "qwen3_moe-tp2-pp2-ep2"
SHOWN = ("--vocab-size", "301", "--shard-size", "100KB")
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure([NAME])[NAME]


@pytest.fixture
def place() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="mcorefs-fd-"))
    (place / "mnt").mkdir()
    yield place
    while mounted(place / "mnt") is not None:
        subprocess.run(["umount", "-l", str(place / "mnt")], check=False)
    shutil.rmtree(place)


def mount_device(mnt: Path) -> int:
    """What a CSI driver does: open /dev/fuse, mount it, hand the descriptor on."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,max_read=1048576"
    libc = ctypes.CDLL(None, use_errno=True)
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV
    done = libc.mount(b"mcorefs", os.fsencode(mnt), b"fuse.mcorefs", flags, options.encode())
    assert done == 0, os.strerror(ctypes.get_errno())
    return fd


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mcorefs", *map(str, arguments)]


def run(*arguments: object, fd: int | None = None, status: int = 0, **variables: str) -> str:
    done = subprocess.run(
        command(*arguments),
        pass_fds=() if fd is None else (fd,),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **variables},
    )
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    assert "Traceback" not in said
    return said


def assert_shows(mnt: Path, fixture: Fixture) -> None:
    for file in fixture.hf.glob("*.safetensors"):
        # By another process: a daemon that does not answer must not hang the tests.
        subprocess.run(["cmp", str(file), str(mnt / file.name)], check=True, timeout=60)


def test_with_the_mount_point_in_sight(fixture: Fixture, place: Path) -> None:
    mnt = place / "mnt"
    fd = mount_device(mnt)
    said = run("mount", fixture.root, mnt, *SHOWN, "--fuse-fd", fd, fd=fd)
    os.close(fd)
    assert f"at {mnt}" in said
    assert_shows(mnt, fixture)
    run("umount", mnt)
    assert mounted(mnt) is None


@pytest.mark.parametrize("how", ["--fuse-fd", "/dev/fd"])
def test_in_the_foreground_with_no_mount_point(fixture: Fixture, place: Path, how: str) -> None:
    """As a sidecar, which does not see where it is mounted; SIGTERM ends it, not the mount."""
    mnt = place / "mnt"
    fd = mount_device(mnt)
    given = ["--fuse-fd", str(fd)] if how == "--fuse-fd" else [f"/dev/fd/{fd}"]
    server = subprocess.Popen(
        command("mount", fixture.root, *given, *SHOWN, "--foreground"),
        pass_fds=(fd,),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    assert f"on descriptor {fd}" in server.stdout.readline()
    assert_shows(mnt, fixture)
    server.terminate()
    assert server.wait(timeout=30) == 0
    assert mounted(mnt) is not None
    os.close(fd)
    with pytest.raises(OSError, match="not connected"):
        os.statvfs(mnt)
    server.stdout.close()


def test_a_sidecar_without_any_right(fixture: Fixture, place: Path) -> None:
    """No capability, none to be gained, and neither fusermount nor /dev/fuse is needed."""
    fd = mount_device(place / "mnt")
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    server = subprocess.Popen(
        [*drop, *command("mount", fixture.root, f"/dev/fd/{fd}", *SHOWN, "--foreground")],
        pass_fds=(fd,),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    os.close(fd)
    assert f"on descriptor {fd}" in server.stdout.readline()
    status = Path(f"/proc/{server.pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert_shows(place / "mnt", fixture)
    run("umount", place / "mnt")
    assert server.wait(timeout=30) == 0
    server.stdout.close()


def test_all_iterations(fixture: Fixture, place: Path) -> None:
    fd = mount_device(place / "mnt")
    options = ["--all-iterations", *SHOWN, "--fuse-fd", fd]
    run("mount", fixture.root, place / "mnt", *options, fd=fd)
    os.close(fd)
    assert_shows(place / "mnt/latest", fixture)
    run("umount", place / "mnt")


def test_descriptors_that_are_none(fixture: Fixture, place: Path) -> None:
    root, mnt = fixture.root, place / "mnt"
    assert "77 is not open" in run("mount", root, "--fuse-fd", 77, status=1)
    with open("/dev/null") as null:
        fd = null.fileno()
        said = run("mount", root, "--fuse-fd", fd, fd=fd, status=1)
        assert f"descriptor {fd} is /dev/null, not /dev/fuse" in said
    fd = os.open("/dev/fuse", os.O_RDWR)
    said = run("mount", root, "--fuse-fd", fd, fd=fd, status=1)
    assert "nobody has mounted it" in said
    os.close(fd)
    fd = mount_device(mnt)
    said = run("mount", root, place, "--fuse-fd", fd, fd=fd, status=1)
    assert f"{place} is not where it is mounted" in said
    said = run("mount", root, "--fuse-fd", fd, fd=fd, status=1, MCOREFS_FUSE="libfuse2")
    assert "needs libfuse 3.3" in said
    os.close(fd)
    said = run("mount", root, status=2)
    assert "MNT" in said


# --- namespaces without privileges ----------------------------------------------------------


def test_in_namespaces_of_a_user(fixture: Fixture, place: Path) -> None:
    """Root in a user namespace is nobody outside; FUSE may be mounted there since Linux 4.18."""
    script = f"""
set -e
{sys.executable} -m mcorefs mount {fixture.root} {place}/mnt {" ".join(SHOWN)}
for file in {fixture.hf}/*.safetensors; do cmp $file {place}/mnt/$(basename $file); done
grep -c ' {place}/mnt fuse.mcorefs ro,' /proc/mounts
{sys.executable} -m mcorefs umount {place}/mnt
"""
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n1\n" in done.stdout
    assert mounted(place / "mnt") is None


def test_the_right_to_mount_is_missed_with_words(fixture: Fixture, place: Path) -> None:
    """As a container with /dev/fuse but no CAP_SYS_ADMIN."""
    done = subprocess.run(
        [
            "setpriv",
            "--bounding-set=-sys_admin",
            "--inh-caps=-all",
            *command("mount"),
            str(fixture.root),
            str(place / "mnt"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "Operation not permitted" in done.stderr
    assert "--device /dev/fuse --cap-add SYS_ADMIN" in done.stderr
    assert mounted(place / "mnt") is None


def test_a_host_mount_is_seen_in_a_user_namespace(fixture: Fixture, place: Path) -> None:
    run("mount", fixture.root, place / "mnt", *SHOWN)
    file = min(fixture.hf.glob("*.safetensors"))
    command = ["unshare", "-Urm", "cmp", str(file), str(place / "mnt" / file.name)]
    subprocess.run(command, check=True, timeout=60)
    run("umount", place / "mnt")


def test_a_host_mount_is_seen_where_it_propagates(fixture: Fixture, place: Path) -> None:
    """Mounted first and then bound, or mounted later below what is bound rslave (Kubernetes'
    HostToContainer): both are seen in another mount namespace."""
    file = min(fixture.hf.glob("*.safetensors"))
    script = f"""
set -e
mount --bind {place} {place} && mount --make-rshared {place}
unshare -m --propagation slave sh -c 'while [ ! -e {place}/go ]; do sleep 0.05; done
    cmp {file} {place}/mnt/{file.name} && echo seen' &
{sys.executable} -m mcorefs mount {fixture.root} {place}/mnt {" ".join(SHOWN)} > /dev/null
touch {place}/go
wait $!
{sys.executable} -m mcorefs umount {place}/mnt
umount {place}
"""
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "seen\n"), done.stderr
