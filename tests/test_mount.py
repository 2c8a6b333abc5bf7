"""Real mounts of synthetic trees, through both bindings.

The server is always a forked process, so this process never loads libfuse and both libraries can
be tested in one run. What may block on a mount runs in forked children too; a watchdog kills the
servers, which fails every waiting read instead of hanging the tests.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from mcorefs.errors import MountError, ReadFault
from mcorefs.files import BytesFile, VirtualFile, read_all
from mcorefs.mount import (
    MountOptions,
    check_fuse,
    check_mountpoint,
    daemon,
    mounted,
    mounting,
    serve,
    unmount,
)
from mcorefs.mount.binding import load_binding
from mcorefs.tree import VirtualTree

MTIME_NS = 1_700_000_000_123_456_789
MIB = 1 << 20
NOBODY = 65534
HANG_AFTER = 90.0


def _fuse_missing() -> str:
    try:
        check_fuse(allow_other=False)
    except MountError as error:
        return str(error)
    return "" if os.geteuid() == 0 else "mount tests expect root"


pytestmark = pytest.mark.skipif(bool(_fuse_missing()), reason=_fuse_missing() or "-")


def test_a_daemon_is_watched_by_any_descriptor() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    reading, writing = os.pipe()
    high = fcntl.fcntl(reading, fcntl.F_DUPFD_CLOEXEC, 2000)  # select takes none beyond 1023
    os.close(reading)
    with open(high, "rb") as reports:
        server = daemon._Server(os.getpid(), reports)
        assert server._alive(0.05)
        os.close(writing)
        assert not server._alive(30)


@dataclass(frozen=True)
class PatternFile:
    """Bytes that tell their offset: a random block whose length is prime, over and over."""

    size: int
    seed: int
    period: int = 1_000_003
    block: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        block = random.Random(self.seed).randbytes(self.period)
        object.__setattr__(self, "block", block)

    def read_into(self, offset: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            start = (offset + done) % self.period
            piece = self.block[start : start + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)

    def expected(self, offset: int, size: int) -> bytes:
        out = bytearray(size)
        self.read_into(offset, memoryview(out))
        return bytes(out)


@dataclass(frozen=True)
class FaultyFile:
    """Its first page is fine; any read that reaches further raises."""

    error: Callable[[], BaseException]
    size: int = 8 * MIB

    def read_into(self, offset: int, out: memoryview) -> None:
        if offset + len(out) > mmap.PAGESIZE:
            raise self.error()
        out[:] = bytes(len(out))


def make_tree(**more: VirtualFile) -> VirtualTree:
    files: dict[str, VirtualFile] = {
        "config.json": BytesFile(b'{"model_type": "pattern"}'),
        "empty.txt": BytesFile(b""),
        "additional_chat_templates/tool.jinja": BytesFile(b"{{ tool }}"),
        "additional_chat_templates/deep/er.txt": BytesFile(b"deeper"),
        "model-00001-of-00002.safetensors": PatternFile(64 * MIB + 12_345, seed=1),
        "model-00002-of-00002.safetensors": PatternFile(5 * MIB + 1, seed=2),
    }
    return VirtualTree({**files, **more}, MTIME_NS)


def servers(logs: Path) -> list[int]:
    """The serving processes of this test, known by their log files."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "fd/2").startswith(f"{logs}/"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def kill_servers(logs: Path) -> None:
    for pid in servers(logs):
        os.kill(pid, signal.SIGKILL)


def become(uid: int) -> None:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def open_device_to_all(place: Path) -> None:
    """In a mount namespace of this process only: /dev/fuse as most distributions have it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    device = place / "fuse"
    os.mknod(device, stat.S_IFCHR | 0o666, os.stat("/dev/fuse").st_rdev)
    device.chmod(0o666)
    subprocess.run(["mount", "--bind", str(device), "/dev/fuse"], check=True)


def in_child(function: Callable[[], None], timeout: float = 60.0) -> None:
    """Run `function` in a forked child; fail with its traceback, or if it takes too long."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = ""
        try:
            function()
        except BaseException:
            text = traceback.format_exc()
        finally:
            os.write(writing, text.encode()[:60_000])
            os._exit(0)
    os.close(writing)
    timer = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
    timer.start()
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    timer.cancel()
    _, status = os.waitpid(pid, 0)
    assert not text, text
    assert status == 0, f"child ended with status {status:#x} (killed after {timeout} s?)"


def wait_until(condition: Callable[[], bool], what: str, patience: float = 15.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.02)


@pytest.fixture(params=["libfuse3", "libfuse2"])
def libfuse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    monkeypatch.setenv("MCOREFS_FUSE", name)
    return name


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can reach, with an empty `mnt` and `logs`; cleaned however the
    test ended."""
    place = Path(tempfile.mkdtemp(prefix="mcorefs-test-"))
    place.chmod(0o755)
    (place / "mnt").mkdir()
    (place / "logs").mkdir()
    watchdog = threading.Timer(HANG_AFTER, kill_servers, (place / "logs",))
    watchdog.start()
    yield place
    watchdog.cancel()
    kill_servers(place / "logs")
    while mounted(place / "mnt") is not None:
        subprocess.run(["umount", "-l", str(place / "mnt")], check=False)
    shutil.rmtree(place)


def options_in(place: Path, fsname: str = "mcorefs", allow_other: bool = False) -> MountOptions:
    return MountOptions(
        fsname=fsname, allow_other=allow_other, log_file=place / "logs" / "server.log"
    )


@pytest.fixture
def mnt(libfuse: str, place: Path) -> Iterator[Path]:
    with mounting(make_tree(), place / "mnt", options_in(place)) as path:
        yield path


# --- what a mount shows ---------------------------------------------------------------------


def test_metadata(mnt: Path) -> None:
    tree = make_tree()
    assert sorted(os.listdir(mnt)) == sorted({path.split("/")[0] for path in tree.files})
    assert sorted(os.listdir(mnt / "additional_chat_templates")) == ["deep", "tool.jinja"]
    for path, file in tree.files.items():
        found = (mnt / path).stat()
        assert found.st_size == file.size
        assert stat.S_IMODE(found.st_mode) == 0o444
        assert (found.st_mtime_ns, found.st_ctime_ns) == (MTIME_NS, MTIME_NS)
        assert (found.st_uid, found.st_gid, found.st_nlink) == (os.getuid(), os.getgid(), 1)
        assert found.st_blocks == -(-file.size // 512)
        assert found.st_blksize == MIB
    root, inner = mnt.stat(), (mnt / "additional_chat_templates").stat()
    assert stat.S_IMODE(root.st_mode) == stat.S_IMODE(inner.st_mode) == 0o555
    assert (root.st_nlink, inner.st_nlink) == (3, 3)
    assert not (mnt / "pytorch_model.bin").exists()
    assert not (mnt / os.fsdecode(b"not-utf8-\xff")).exists()
    whole = os.statvfs(mnt)
    assert whole.f_blocks * whole.f_frsize >= sum(file.size for file in tree.files.values())
    assert (whole.f_bfree, whole.f_namemax) == (0, 255)


def test_inodes_do_not_change(libfuse: str, place: Path) -> None:
    seen = []
    for _ in range(2):
        with mounting(make_tree(), place / "mnt", options_in(place)) as mnt:
            seen.append({path: (mnt / path).stat().st_ino for path in make_tree().files})
            listed = {entry.name: entry.inode() for entry in os.scandir(mnt)}
            assert listed["config.json"] == seen[-1]["config.json"]
    assert seen[0] == seen[1]
    assert len(set(seen[0].values())) == len(seen[0])


def test_mount_options(libfuse: str, place: Path) -> None:
    for fsname in ("mcorefs", "hf-mount"):
        with mounting(make_tree(), place / "mnt", options_in(place, fsname)) as mnt:
            entry = mounted(mnt)
            assert entry is not None
            assert (entry.source, entry.fstype) == (fsname, "fuse.mcorefs")
            assert entry.options >= {"ro", "nosuid", "nodev", "noexec", "default_permissions"}
            assert "allow_other" not in entry.options
            line = f"{fsname} {mnt} fuse.mcorefs ro,"
            assert line in Path("/proc/mounts").read_text()
        assert mounted(place / "mnt") is None


def test_no_extended_attributes(mnt: Path) -> None:
    for call in (
        lambda: os.getxattr(mnt / "config.json", "user.origin"),
        lambda: os.listxattr(mnt / "config.json"),
    ):
        with pytest.raises(OSError, match=r"not supported|No data") as caught:
            call()
        assert caught.value.errno in (errno.ENOTSUP, errno.ENODATA)


def test_usual_commands_are_quiet(mnt: Path, place: Path) -> None:
    for command in (
        ["ls", "-laR", str(mnt)],
        ["du", "-s", "--block-size=1", str(mnt)],
        ["cp", "-a", str(mnt), str(place / "copy")],
        ["diff", "-r", str(mnt), str(place / "copy")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command
    assert (place / "copy/config.json").stat().st_mtime_ns == MTIME_NS
    subprocess.run(["chmod", "-R", "u+w", str(place / "copy")], check=True)


# --- the bytes ------------------------------------------------------------------------------


def test_copies_are_equal(mnt: Path, place: Path) -> None:
    subprocess.run(["cp", "-r", str(mnt), str(place / "copy")], check=True, timeout=60)
    for path, file in make_tree().files.items():
        assert (place / "copy" / path).read_bytes() == read_all(file), path
    subprocess.run(["chmod", "-R", "u+w", str(place / "copy")], check=True)


def test_end_of_file(mnt: Path) -> None:
    fd = os.open(mnt / "model-00002-of-00002.safetensors", os.O_RDONLY)
    size = os.fstat(fd).st_size
    assert len(os.pread(fd, 100, size - 10)) == 10
    assert os.pread(fd, 100, size) == b""
    assert os.pread(fd, 100, size + 10 * MIB) == b""
    os.close(fd)
    assert (mnt / "empty.txt").read_bytes() == b""
    # Past the page cache, where the kernel does not clamp for us.
    fd = os.open(mnt / "model-00002-of-00002.safetensors", os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, MIB)
    assert os.preadv(fd, [buffer], size - 1) == 1
    assert os.preadv(fd, [buffer], size + MIB) == 0
    os.close(fd)


def test_mmap_is_equal(mnt: Path) -> None:
    file = PatternFile(64 * MIB + 12_345, seed=1)
    with (
        open(mnt / "model-00001-of-00002.safetensors", "rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert mapped[:] == file.expected(0, file.size)


def test_random_reads_from_many_threads(mnt: Path) -> None:
    file = PatternFile(64 * MIB + 12_345, seed=1)

    def reader(seed: int) -> None:
        choose = random.Random(seed)
        fd = os.open(mnt / "model-00001-of-00002.safetensors", os.O_RDONLY)
        for _ in range(60):
            offset = choose.randrange(file.size)
            size = choose.choice((1, 100, 4096, 100_000, 3 * MIB))
            expected = file.expected(offset, min(size, file.size - offset))
            assert os.pread(fd, size, offset) == expected
        os.close(fd)

    def readers() -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(reader, range(16)))

    in_child(readers)


def test_concurrent_opens(mnt: Path) -> None:
    def readers() -> None:
        with ThreadPoolExecutor(32) as pool:
            texts = list(pool.map(lambda _: (mnt / "config.json").read_bytes(), range(400)))
        assert set(texts) == {b'{"model_type": "pattern"}'}

    in_child(readers)


@pytest.mark.parametrize("fsname", ["mcorefs", "hf-mount"])
def test_parallel_page_faults(libfuse: str, place: Path, fsname: str) -> None:
    """64 threads fault pages of four mapped files at once, in random order: users.md 0.4."""
    files = {f"shard-{number}.bin": PatternFile(12 * MIB + 77, seed=number) for number in range(4)}

    def faulting(mnt: Path) -> None:
        mapped, expected = [], []
        for name, file in files.items():
            with open(mnt / name, "rb") as opened:
                whole = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            whole.madvise(mmap.MADV_RANDOM)
            mapped.append(np.frombuffer(whole, np.uint8))
            expected.append(np.frombuffer(file.expected(0, file.size), np.uint8))

        def touch(seed: int) -> None:
            pages = [(n, at) for n in range(4) for at in range(0, len(mapped[n]), 4096)]
            for n, at in random.Random(seed).sample(pages, 1500):
                # NumPy copies outside the interpreter lock, so the faults really are parallel.
                page = mapped[n][at : at + 4096].copy()
                assert np.array_equal(page, expected[n][at : at + 4096]), (n, at)

        with ThreadPoolExecutor(64) as pool:
            list(pool.map(touch, range(64)))

    with mounting(make_tree(**files), place / "mnt", options_in(place, fsname)) as mnt:
        in_child(lambda: faulting(mnt))


def test_small_requests_do_not_grow_the_server(libfuse: str, place: Path) -> None:
    """What Python keeps per thread of libfuse is bounded."""

    def resident() -> int:
        (server,) = servers(place / "logs")
        return int(Path(f"/proc/{server}/statm").read_text().split()[1]) * mmap.PAGESIZE

    def burst(mnt: Path) -> None:
        fd = os.open(mnt / "model-00001-of-00002.safetensors", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        with ThreadPoolExecutor(48) as pool:
            list(pool.map(lambda page: os.pread(fd, 100, page * 4096), range(4000)))
        os.close(fd)

    with mounting(make_tree(), place / "mnt", options_in(place)) as mnt:
        for _ in range(3):
            in_child(lambda: burst(mnt))
        before = resident()
        for _ in range(5):
            in_child(lambda: burst(mnt))
        assert resident() - before < 8 * MIB


# --- what is refused ------------------------------------------------------------------------


def test_writes_are_refused(mnt: Path) -> None:
    config = mnt / "config.json"
    attempts: list[Callable[[], object]] = [
        lambda: os.open(config, os.O_WRONLY),
        lambda: os.open(config, os.O_RDWR),
        lambda: os.open(mnt / "new", os.O_WRONLY | os.O_CREAT),
        lambda: os.truncate(config, 0),
        lambda: os.chmod(config, 0o644),
        lambda: os.chown(config, 1, 1),
        lambda: os.utime(config),
        lambda: os.unlink(config),
        lambda: os.rename(config, mnt / "other"),
        lambda: os.link(config, mnt / "other"),
        lambda: os.symlink("config.json", mnt / "other"),
        lambda: os.mkdir(mnt / "new"),
        lambda: os.rmdir(mnt / "additional_chat_templates"),
        lambda: os.setxattr(config, "user.origin", b"x"),
        lambda: os.mkfifo(mnt / "fifo"),
    ]

    def refused() -> None:
        for number, attempt in enumerate(attempts):
            with pytest.raises(OSError, match=r"Read-only|Permission denied") as caught:
                attempt()
            assert caught.value.errno in (errno.EROFS, errno.EACCES), number

    refused()
    # Even if root takes the kernel's own protection away.
    subprocess.run(["mount", "-i", "-o", "remount,rw", str(mnt)], check=True)
    refused()
    assert config.read_bytes() == b'{"model_type": "pattern"}'


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (lambda: ReadFault("shard __3_0.distcp is gone"), "shard __3_0.distcp is gone"),
        (lambda: ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
        (lambda: MemoryError("no more"), "MemoryError: no more"),
        (lambda: SystemExit(3), "SystemExit(3)"),
    ],
)
def test_read_errors_are_eio(
    libfuse: str, place: Path, error: Callable[[], BaseException], logged: str
) -> None:
    tree = make_tree(**{"faulty.safetensors": FaultyFile(error)})
    with mounting(tree, place / "mnt", options_in(place)) as mnt:
        fd = os.open(mnt / "faulty.safetensors", os.O_RDONLY)
        for _ in range(20):
            with pytest.raises(OSError, match="Input/output") as caught:
                os.pread(fd, 4096, MIB)
            assert caught.value.errno == errno.EIO
        os.close(fd)
        assert (mnt / "config.json").read_bytes() == b'{"model_type": "pattern"}'
        assert len(servers(place / "logs")) == 1
    lines = [
        line
        for line in (place / "logs/server.log").read_text().splitlines()
        if '"mcorefs.mount"' in line
    ]
    assert len(lines) == 1
    assert logged in lines[0]


def test_other_users(libfuse: str, place: Path) -> None:
    def refused() -> None:
        become(NOBODY)
        with pytest.raises(PermissionError):
            (place / "mnt/config.json").read_bytes()

    def allowed() -> None:
        become(NOBODY)
        assert (place / "mnt/config.json").read_bytes().startswith(b"{")

    with mounting(make_tree(), place / "mnt", options_in(place)):
        in_child(refused)
    with mounting(make_tree(), place / "mnt", options_in(place, allow_other=True)):
        in_child(allowed)


def test_mounted_by_an_ordinary_user(libfuse: str, place: Path) -> None:
    program = shutil.which("fusermount3" if libfuse == "libfuse3" else "fusermount")
    if program is None or not os.stat(program).st_mode & stat.S_ISUID:
        pytest.skip("fusermount is not setuid root here")
    for directory in ("mnt", "logs"):
        os.chown(place / directory, NOBODY, NOBODY)

    def use() -> None:
        load_binding()  # the interpreter may lie where only root can read
        open_device_to_all(place)
        become(NOBODY)
        with mounting(make_tree(), place / "mnt", options_in(place)) as mnt:
            assert (mnt / "config.json").stat().st_uid == NOBODY
            assert (
                read_all(PatternFile(5 * MIB + 1, seed=2))
                == (mnt / "model-00002-of-00002.safetensors").read_bytes()
            )
            with open(mnt / "config.json"), pytest.raises(MountError, match="in use by pid"):
                unmount(mnt)
            unmount(mnt)
        assert mounted(place / "mnt") is None
        if "\nuser_allow_other" not in Path("/etc/fuse.conf").read_text():
            with pytest.raises(MountError, match="user_allow_other"):
                check_fuse(allow_other=True)

    in_child(use)


# --- the daemon -----------------------------------------------------------------------------


def test_daemon(libfuse: str, place: Path) -> None:
    mnt, checked, ready = place / "mnt", [], []

    def factory() -> VirtualTree:
        # A thread of the tree must live in the process that serves.
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        return make_tree()

    def check(path: Path) -> None:
        checked.append((path / "config.json").read_bytes())

    serve(factory, mnt, options_in(place), check, lambda: ready.append(True))
    assert (len(checked), ready) == (1, [True])
    (server,) = servers(place / "logs")
    assert os.getsid(server) != os.getsid(0)
    assert os.readlink(f"/proc/{server}/cwd") == "/"
    assert (mnt / "config.json").stat().st_size == 25
    with pytest.raises(MountError, match=r"already a mount point \(fuse.mcorefs from mcorefs\)"):
        serve(make_tree, mnt, options_in(place))
    with open(mnt / "config.json"):
        with pytest.raises(MountError, match=rf"in use by .*pid {os.getpid()} "):
            unmount(mnt)
        assert mounted(mnt) is not None
    unmount(mnt)
    assert mounted(mnt) is None
    wait_until(lambda: not servers(place / "logs"), "the daemon ended")
    with pytest.raises(MountError, match="not a mount point"):
        unmount(mnt)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_daemon_unmounts_on_signals(libfuse: str, place: Path, number: signal.Signals) -> None:
    serve(make_tree, place / "mnt", options_in(place))
    (server,) = servers(place / "logs")
    os.kill(server, number)
    wait_until(lambda: not servers(place / "logs"), "the daemon ended")
    wait_until(lambda: mounted(place / "mnt") is None, "the mount is gone")


def test_forced_unmount_of_a_busy_mount(libfuse: str, place: Path) -> None:
    serve(make_tree, place / "mnt", options_in(place))
    with open(place / "mnt/model-00001-of-00002.safetensors", "rb") as opened:
        unmount(place / "mnt", force=True)
        assert mounted(place / "mnt") is None
        expected = PatternFile(64 * MIB + 12_345, seed=1).expected(0, 30 * MIB)
        assert opened.read(30 * MIB) == expected  # who has it open reads on
    wait_until(lambda: not servers(place / "logs"), "the daemon ended")


def test_errors_of_the_daemon_reach_the_caller(libfuse: str, place: Path) -> None:
    def impossible() -> VirtualTree:
        raise MountError("the tree cannot be built: no tokenizer")

    def broken() -> VirtualTree:
        raise KeyError("a bug")

    def dying() -> VirtualTree:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def unreadable() -> VirtualTree:
        return make_tree(**{"bad.safetensors": FaultyFile(lambda: ReadFault("shard gone"), 10_000)})

    for factory, message in (
        (impossible, "no tokenizer"),
        (broken, "a bug"),
        (dying, "ended before the mount was live"),
        (lambda: VirtualTree({"a": BytesFile(b""), "a/b": BytesFile(b"")}, 0), "both as a file"),
        (lambda: VirtualTree({"../x": BytesFile(b"")}, 0), "cannot be shown"),
    ):
        for foreground in (False, True):
            options = MountOptions(log_file=place / "logs/log", foreground=foreground)
            if foreground and factory is dying:
                continue
            with pytest.raises((MountError, KeyError), match=message):
                serve(factory, place / "mnt", options)
        assert mounted(place / "mnt") is None
        assert not servers(place / "logs")

    serve(unreadable, place / "mnt", options_in(place))  # only its head is read
    unmount(place / "mnt")


def test_a_failed_check_removes_the_mount(libfuse: str, place: Path) -> None:
    def check(path: Path) -> None:
        raise MountError(f"{path.name} is not what it should be")

    with pytest.raises(MountError, match="mnt is not what it should be"):
        serve(make_tree, place / "mnt", options_in(place), check)
    assert mounted(place / "mnt") is None
    assert not servers(place / "logs")

    def in_foreground() -> None:
        options = MountOptions(foreground=True)
        with pytest.raises(MountError, match="mnt is not what it should be"):
            serve(make_tree, place / "mnt", options, check)

    in_child(in_foreground)
    assert mounted(place / "mnt") is None


def test_first_read_compares_bytes(libfuse: str, place: Path) -> None:
    @dataclass
    class Fickle:
        size: int = 100
        asked: int = 0

        def read_into(self, offset: int, out: memoryview) -> None:
            self.asked += 1
            out[:] = bytes([self.asked]) * len(out)

    with pytest.raises(MountError, match=r"fickle\.bin is not what was prepared"):
        serve(lambda: make_tree(**{"fickle.bin": Fickle()}), place / "mnt", options_in(place))
    assert mounted(place / "mnt") is None


def test_libfuse_says_why(libfuse: str, place: Path) -> None:
    def vanishing() -> VirtualTree:
        (place / "mnt").rmdir()
        return make_tree()

    with pytest.raises(MountError, match=r"libfuse \d\.\d+ could not mount .*mnt: .*No such file"):
        serve(vanishing, place / "mnt", options_in(place))
    (place / "mnt").mkdir()


def test_foreground(libfuse: str, place: Path) -> None:
    def serving() -> None:
        os.chdir(place)
        reading, writing = os.pipe()

        def stop() -> None:
            os.write(writing, b"r")
            assert mounted(place / "mnt") is not None
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

        serve(make_tree, Path("mnt"), MountOptions(foreground=True), lambda _: None, stop)
        assert os.read(reading, 10) == b"r"
        assert Path.cwd() == place
        assert mounted(place / "mnt") is None

    in_child(serving)


def kill_daemon(place: Path, auto_unmount: bool) -> None:
    options = MountOptions(log_file=place / "logs/server.log", auto_unmount=auto_unmount)
    serve(make_tree, place / "mnt", options)
    kill_servers(place / "logs")
    wait_until(lambda: not servers(place / "logs"), "the daemon is gone")


def test_killed_daemon(libfuse: str, place: Path) -> None:
    mnt = place / "mnt"
    kill_daemon(place, auto_unmount=False)
    with pytest.raises(MountError, match=f"dead fuse.mcorefs mount.*mcorefs umount {mnt}"):
        check_mountpoint(mnt)
    unmount(mnt)
    check_mountpoint(mnt)
    serve(make_tree, mnt, options_in(place))
    unmount(mnt)


def test_auto_unmount_of_a_killed_daemon(libfuse: str, place: Path) -> None:
    """fusermount may look while the dying daemon still holds the device, and then leaves the dead
    mount; `unmount` clears it. Seldom: so one of a few attempts must succeed."""
    for _ in range(4):
        kill_daemon(place, auto_unmount=True)
        deadline = time.monotonic() + 3.0
        while (left := mounted(place / "mnt")) is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        if left is None:
            return
        unmount(place / "mnt")
    raise AssertionError("auto_unmount never removed the mount")


def test_log_file_that_cannot_be_written(place: Path) -> None:
    with pytest.raises(MountError, match=r"log file .*: No such file"):
        serve(make_tree, place / "mnt", MountOptions(log_file=place / "absent/log"))


def test_a_log_that_waits_for_a_reader(place: Path) -> None:
    os.mkfifo(place / "log")
    options = MountOptions(log_file=place / "log")
    with pytest.raises(MountError, match=r"log file .* cannot be written"):
        serve(make_tree, place / "mnt", options)
    reader = os.open(place / "log", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(MountError, match=r"log file .* is a FIFO"):
        serve(make_tree, place / "mnt", options)
    os.close(reader)
    assert mounted(place / "mnt") is None


def test_importing_loads_no_libfuse() -> None:
    code = (
        "import sys, mcorefs.mount\n"
        "assert 'libfuse' not in open('/proc/self/maps').read()\n"
        "assert not {'torch', 'transformers', 'fuse', 'mfusepy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
