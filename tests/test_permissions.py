"""Who may do what: other users, writing in every way there is, and the daemon itself."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from mcorefs.errors import ReadFault
from mcorefs.files import BytesFile, VirtualFile, read_all
from mcorefs.mount import MountOptions, mounted, mounting
from mcorefs.tree import VirtualTree
from tests.checkpoints import Fixture, ensure

NAME = "qwen3-tp2-common-state"
NOBODY = 65534
CONFIG = b'{"model_type": "plain"}'
SECRET = "s3cr3t-of-the-environment"
AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
DAC_READ_SEARCH, SYS_ADMIN = 1 << 2, 1 << 21

libc = ctypes.CDLL(None, use_errno=True)


class Faulty:
    """Cannot be read beyond its first bytes."""

    size = 1 << 20

    def read_into(self, offset: int, out: memoryview) -> None:
        if offset + len(out) > 4096:
            raise ReadFault("/ckpt/__0_0.distcp\nis gone")
        out[:] = bytes(len(out))


def make_tree(**more: VirtualFile) -> VirtualTree:
    files: dict[str, VirtualFile] = {
        "config.json": BytesFile(CONFIG),
        "sub/file.txt": BytesFile(b"inside"),
        "model.safetensors": BytesFile(bytes(range(256)) * 1000),
    }
    return VirtualTree({**files, **more}, 1_700_000_000_000_000_000)


@pytest.fixture(params=["libfuse3", "libfuse2"])
def libfuse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCOREFS_FUSE", str(request.param))


@pytest.fixture
def place() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="mcorefs-permissions-"))
    place.chmod(0o755)
    (place / "mnt").mkdir()
    yield place
    while mounted(place / "mnt") is not None:
        subprocess.run(["umount", "-l", str(place / "mnt")], check=False)
    shutil.rmtree(place)


def daemon(log: Path) -> int:
    """The process that logs there."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "fd/2") == str(log):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError("there is none")


def as_nobody(code: str, *arguments: object) -> str:
    """What a Python program says that another user runs."""

    def become() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    done = subprocess.run(
        ["/usr/bin/env", "python3", "-c", code, *map(str, arguments)],
        preexec_fn=become,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
    )
    return done.stdout + done.stderr


# --- other users ----------------------------------------------------------------------------

SEE = """
import errno, os, sys
for what in (os.listdir, os.stat, lambda p: os.open(p + "/config.json", os.O_RDONLY),
             lambda p: os.stat(p + "/.mcorefs/status.json"), os.chdir):
    try:
        what(sys.argv[1])
        print("seen")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


def test_other_users_see_nothing_without_allow_other(libfuse: None, place: Path) -> None:
    with mounting(make_tree(), place / "mnt") as mnt:
        assert set(as_nobody(SEE, mnt).split()) == {"EACCES"}


def test_allow_other_lets_them_read_and_no_more(libfuse: None, place: Path) -> None:
    with mounting(make_tree(), place / "mnt", MountOptions(allow_other=True)) as mnt:
        entry = mounted(mnt)
        assert entry is not None
        assert "allow_other" in entry.options
        code = "import sys, os; print(open(sys.argv[1] + '/config.json').read())"
        assert as_nobody(code, mnt).strip() == CONFIG.decode()
        write = "import sys, os; os.open(sys.argv[1] + '/config.json', os.O_WRONLY)"
        assert "Errno" in as_nobody(write, mnt)


def test_all_belongs_to_who_mounts_and_is_only_readable(libfuse: None, place: Path) -> None:
    with mounting(make_tree(), place / "mnt") as mnt:
        for directory, _, files in os.walk(mnt):
            found = os.stat(directory)
            assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())
            assert found.st_mode == stat.S_IFDIR | 0o555
            for name in files:
                found = os.stat(f"{directory}/{name}")
                assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())
                assert found.st_mode == stat.S_IFREG | 0o444


# --- writing: what pjdfstest asks of a file system that is mounted read-only -------------------


def call(name: str, *arguments: object) -> None:
    """A function of libc by its name; raises OSError."""
    given = [os.fsencode(a) if isinstance(a, Path | str) else a for a in arguments]
    if getattr(libc, name)(*given) == -1:
        raise OSError(ctypes.get_errno(), name)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))


def with_open(path: Path, use: Callable[[int], object]) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        use(fd)
    finally:
        os.close(fd)


def ways_to_write(mnt: Path, outside: Path) -> dict[str, Callable[[], object]]:
    """Whatever changes something, by the call."""
    config, sub, new = mnt / "config.json", mnt / "sub", mnt / "new"
    writing = {
        "O_WRONLY": os.O_WRONLY,
        "O_RDWR": os.O_RDWR,
        "O_RDONLY O_TRUNC": os.O_RDONLY | os.O_TRUNC,
        "O_WRONLY O_APPEND": os.O_WRONLY | os.O_APPEND,
        "O_WRONLY O_CREAT": os.O_WRONLY | os.O_CREAT,
    }
    return {
        **{f"open {n}": partial(os.open, config, f) for n, f in writing.items()},
        "open O_CREAT O_EXCL": lambda: os.open(new, os.O_RDONLY | os.O_CREAT | os.O_EXCL),
        "open O_CREAT": lambda: os.open(new, os.O_WRONLY | os.O_CREAT, 0o644),
        "open O_TMPFILE": lambda: os.open(mnt, os.O_TMPFILE | os.O_WRONLY),
        "creat": lambda: call("creat", config, 0o644),
        "truncate": lambda: os.truncate(config, 0),
        "truncate longer": lambda: os.truncate(config, 1 << 20),
        "mkdir": lambda: os.mkdir(new),
        "mkfifo": lambda: os.mkfifo(new),
        "mknod file": lambda: os.mknod(new, stat.S_IFREG | 0o644),
        "mknod character": lambda: os.mknod(new, stat.S_IFCHR | 0o644, os.makedev(1, 3)),
        "mknod block": lambda: os.mknod(new, stat.S_IFBLK | 0o644, os.makedev(7, 0)),
        "bind": lambda: bind(mnt / "socket"),
        "link": lambda: os.link(config, new),
        "symlink": lambda: os.symlink("config.json", new),
        "unlink": lambda: os.unlink(config),
        "rmdir": lambda: os.rmdir(sub),
        "rename": lambda: os.rename(config, new),
        "rename over": lambda: os.rename(config, mnt / "model.safetensors"),
        "rename directory": lambda: os.rename(sub, mnt / "other"),
        "renameat2 exchange": lambda: call(
            "renameat2", AT_FDCWD, config, AT_FDCWD, mnt / "model.safetensors", RENAME_EXCHANGE
        ),
        "renameat2 no replace": lambda: call(
            "renameat2", AT_FDCWD, config, AT_FDCWD, new, RENAME_NOREPLACE
        ),
        "chmod": lambda: os.chmod(config, 0o777),
        "chmod directory": lambda: os.chmod(mnt, 0o777),
        "fchmod": lambda: with_open(config, lambda fd: os.fchmod(fd, 0o777)),
        "chown": lambda: os.chown(config, 1, 1),
        "lchown": lambda: os.lchown(config, 1, 1),
        "fchown": lambda: with_open(config, lambda fd: os.fchown(fd, 1, 1)),
        "utimensat": lambda: os.utime(config, ns=(1, 1)),
        "utimensat now": lambda: os.utime(config),
        "futimens": lambda: with_open(config, lambda fd: os.utime(fd, ns=(1, 1))),
        "setxattr": lambda: os.setxattr(config, "user.a", b"x"),
        "setxattr trusted": lambda: os.setxattr(config, "trusted.a", b"x"),
        "setxattr capability": lambda: os.setxattr(config, "security.capability", b"x"),
        "lsetxattr": lambda: os.setxattr(config, "user.a", b"x", follow_symlinks=False),
        "fsetxattr": lambda: with_open(config, lambda fd: os.setxattr(fd, "user.a", b"x")),
        "removexattr": lambda: os.removexattr(config, "user.a"),
        "fremovexattr": lambda: with_open(config, lambda fd: os.removexattr(fd, "user.a")),
        "move in": lambda: os.rename(outside, mnt / "config.json"),
        "link in": lambda: os.link(outside, new),
        "link out": lambda: os.link(config, outside.with_name("linked")),
        "write": lambda: with_open(config, lambda fd: os.write(fd, b"x")),
        "pwrite": lambda: with_open(config, lambda fd: os.pwrite(fd, b"x", 0)),
        "ftruncate": lambda: with_open(config, lambda fd: os.ftruncate(fd, 0)),
        "fallocate": lambda: with_open(config, lambda fd: os.posix_fallocate(fd, 0, 4096)),
        "copy_file_range": lambda: with_open(
            outside,
            lambda source: with_open(config, lambda fd: os.copy_file_range(source, fd, 1, 0, 0)),
        ),
        "mmap shared, writable": lambda: with_open(
            config, lambda fd: mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_WRITE)
        ),
        "FS_IOC_SETFLAGS": lambda: with_open(
            config, lambda fd: fcntl.ioctl(fd, 0x40086602, b"\x10\0\0\0\0\0\0\0")
        ),
    }


NOT_EROFS = {
    **{name: {errno.EXDEV} for name in ("move in", "link out")},
    # Of what is open for reading:
    **{name: {errno.EBADF} for name in ("write", "pwrite", "fallocate", "copy_file_range")},
    "ftruncate": {errno.EINVAL},
    "mmap shared, writable": {errno.EACCES},
    "FS_IOC_SETFLAGS": {errno.ENOTTY, errno.EROFS, errno.ENOSYS},
    # A file system that has no O_TMPFILE may say so first.
    "open O_TMPFILE": {errno.EROFS, errno.EOPNOTSUPP},
}


def refused(mnt: Path, outside: Path) -> dict[str, str]:
    """What each way to write ended with, where that is not what it should be."""
    wrong = {}
    for name, write in ways_to_write(mnt, outside).items():
        try:
            write()
            wrong[name] = "done"
        except OSError as error:
            number = error.errno or 0
            if number not in NOT_EROFS.get(name, {errno.EROFS}):
                wrong[name] = errno.errorcode[number]
    return wrong


def test_nothing_can_be_written(libfuse: None, place: Path) -> None:
    outside = place / "outside"
    outside.write_bytes(b"x")
    with mounting(make_tree(), place / "mnt") as mnt:
        assert refused(mnt, outside) == {}
        assert os.access(mnt / "config.json", os.R_OK)
        assert not os.access(mnt / "config.json", os.W_OK)
        before = sorted(os.listdir(mnt))
        # Even if root takes the kernel's own protection away, nothing happens.
        subprocess.run(["mount", "-i", "-o", "remount,rw", str(mnt)], check=True)
        assert "done" not in refused(mnt, outside).values()
        assert sorted(os.listdir(mnt)) == before
        assert (mnt / "config.json").read_bytes() == CONFIG
        found = (mnt / "config.json").stat()
        assert (found.st_mode & 0o777, found.st_uid) == (0o444, os.geteuid())


# --- names: what a kernel's own file system says, mounted read-only -----------------------------

PLACES = {
    "of a file": "config.json",
    "of a file below": "sub/file.txt",
    "of a file, slash": "config.json/",
    "of a directory": "sub",
    "of a directory, slash": "sub/",
    "of the root": ".",
    "dot": "sub/.",
    "dot dot": "sub/..",
    "nothing": "",
    "of none": "none",
    "of none, slash": "none/",
    "below none": "none/x",
    "below a file": "config.json/x",
    "as long as may be": "x" * 255,
    "too long": "x" * 256,
    "far too long": "x" * 2000,
    "below what is too long": "x" * 256 + "/x",
    "too long a path": "/".join(["x" * 200] * 25),
}


def calls_of(root: Path, name: str) -> dict[str, Callable[[], object]]:
    """Every call that takes a name, with that one."""
    path, other, new = f"{root}/{name}" if name else "", f"{root}/config.json", f"{root}/new"
    return {
        "open": lambda: os.open(path, os.O_RDONLY),
        "open O_DIRECTORY": lambda: os.open(path, os.O_RDONLY | os.O_DIRECTORY),
        "open O_NOFOLLOW": lambda: os.open(path, os.O_RDONLY | os.O_NOFOLLOW),
        "open O_PATH": lambda: os.open(path, os.O_PATH),
        "open O_WRONLY": lambda: os.open(path, os.O_WRONLY),
        "open O_TRUNC": lambda: os.open(path, os.O_RDONLY | os.O_TRUNC),
        "open O_CREAT": lambda: os.open(path, os.O_WRONLY | os.O_CREAT, 0o644),
        "open O_EXCL": lambda: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644),
        "stat": lambda: os.stat(path),
        "lstat": lambda: os.lstat(path),
        "access R_OK": lambda: call("access", path, os.R_OK),
        "access W_OK": lambda: call("access", path, os.W_OK),
        "access X_OK": lambda: call("access", path, os.X_OK),
        "readlink": lambda: os.readlink(path),
        "opendir": lambda: os.listdir(path),
        "chdir": lambda: os.chdir(path),
        "statvfs": lambda: os.statvfs(path),
        "mkdir": lambda: os.mkdir(path),
        "rmdir": lambda: os.rmdir(path),
        "unlink": lambda: os.unlink(path),
        "mkfifo": lambda: os.mkfifo(path),
        "mknod": lambda: os.mknod(path, stat.S_IFREG | 0o644),
        "link from": lambda: os.link(path, new),
        "link to": lambda: os.link(other, path),
        "symlink": lambda: os.symlink("config.json", path),
        "rename from": lambda: os.rename(path, new),
        "rename to": lambda: os.rename(other, path),
        "rename to itself": lambda: os.rename(path, path),
        "chmod": lambda: os.chmod(path, 0o644),
        "chown": lambda: os.chown(path, 1, 1),
        "lchown": lambda: os.lchown(path, 1, 1),
        "truncate": lambda: os.truncate(path, 0),
        "utimensat": lambda: os.utime(path, ns=(1, 1)),
    }


def answers(root: Path, uid: int) -> dict[str, str]:
    """What that user is answered to each call with each name."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        found = {}
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            for what, name in PLACES.items():
                for way, ask in calls_of(root, name).items():
                    try:
                        ask()
                        found[f"{way} {what}"] = "done"
                    except OSError as error:
                        found[f"{way} {what}"] = errno.errorcode[error.errno or 0]
        finally:
            with os.fdopen(writing, "w") as out:
                json.dump(found, out)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said: dict[str, str] = json.load(pipe)
    os.waitpid(pid, 0)
    assert len(said) > len(PLACES) * 30
    return said


@pytest.fixture
def other(place: Path) -> Iterator[Path]:
    """The same files on a tmpfs that is mounted read-only."""
    other = place / "tmpfs"
    other.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(other)], check=True)
    for name, file in make_tree().files.items():
        (other / name).parent.mkdir(exist_ok=True)
        (other / name).write_bytes(read_all(file))
        (other / name).chmod(0o444)
    for directory in (other / "sub", other):
        directory.chmod(0o555)
    options = "remount,ro,nosuid,nodev,noexec"
    subprocess.run(["mount", "-o", options, str(other)], check=True)
    yield other
    subprocess.run(["umount", str(other)], check=True)


@pytest.mark.parametrize("uid", [0, NOBODY], ids=["root", "nobody"])
def test_names_are_answered_as_elsewhere(libfuse: None, place: Path, other: Path, uid: int) -> None:
    with mounting(make_tree(), place / "mnt", MountOptions(allow_other=True)) as mnt:
        for _ in range(2):  # the kernel may know the second time
            found, expected = answers(mnt, uid), answers(other, uid)
            assert {k: v for k, v in found.items() if v != expected[k]} == {}
    assert expected["open too long"] == "ENAMETOOLONG"
    assert expected["open below a file"] == "ENOTDIR"
    assert expected["mkdir of none"] == "EROFS"


# --- the daemon -----------------------------------------------------------------------------


def capabilities(pid: int) -> set[int]:
    """The effective and permitted ones of every thread."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith(("CapEff:", "CapPrm:")):
                found.add(int(line.split()[1], 16))
    return found


def test_the_daemon_may_only_read(libfuse: None, place: Path) -> None:
    for auto_unmount, kept in ((True, DAC_READ_SEARCH), (False, DAC_READ_SEARCH | SYS_ADMIN)):
        log = place / f"log-{auto_unmount}"
        options = MountOptions(log_file=log, auto_unmount=auto_unmount)
        with mounting(make_tree(), place / "mnt", options) as mnt:
            (mnt / "model.safetensors").read_bytes()
            assert capabilities(daemon(log)) == {kept & os_capabilities()}
        assert mounted(place / "mnt") is None


def os_capabilities() -> int:
    (found,) = capabilities(os.getpid())
    return found


def test_a_checkpoint_that_only_root_may_read_is_read(libfuse: None, place: Path) -> None:
    fixture: Fixture = ensure([NAME])[NAME]
    root = Path(shutil.copytree(fixture.root, place / "run"))
    for path in (root, *root.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o700 if path.is_dir() else 0o600)
    command = [sys.executable, "-m", "mcorefs"]
    options = ["--log-file", str(place / "log"), "--vocab-size", str(fixture.spec.vocab_size)]
    subprocess.run(
        [*command, "mount", str(root), str(place / "mnt"), *options],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=60,
    )
    assert capabilities(daemon(place / "log")) == {DAC_READ_SEARCH & os_capabilities()}
    for file in fixture.hf.glob("*.safetensors"):
        assert (place / "mnt" / file.name).read_bytes() == file.read_bytes()
    subprocess.run([*command, "umount", str(place / "mnt")], check=True, timeout=60)


def test_logs_are_private_and_tell_nothing_of_the_environment(
    libfuse: None, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Faulty):
        def read_into(self, offset: int, out: memoryview) -> None:
            if offset + len(out) > 4096:
                secret = os.environ["AWS_SECRET_ACCESS_KEY"]
                raise ZeroDivisionError(f"a bug, in a frame that knows {len(secret)} characters")
            super().read_into(offset, out)

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    log = place / "log"
    old = os.umask(0)
    try:
        tree = make_tree(**{"a.safetensors": Faulty(), "b.safetensors": Broken()})
        with mounting(tree, place / "mnt", MountOptions(log_file=log)) as mnt:
            for name in ("a.safetensors", "b.safetensors"):
                with pytest.raises(OSError, match="Input/output"):
                    (mnt / name).read_bytes()
    finally:
        os.umask(old)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    text = log.read_text()
    assert "ZeroDivisionError" in text
    assert SECRET not in text
    assert "AWS_" not in text
