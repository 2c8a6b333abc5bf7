"""`mcorefs mount` and `mcorefs umount`."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import click

from mcorefs import wording
from mcorefs.arguments import CHOICES, CKPT, MNT, Command, argument, files, place, with_options
from mcorefs.console import complain, progress, remarks, say
from mcorefs.model import Options
from mcorefs.patience import patiently

if TYPE_CHECKING:
    from mcorefs.mount import MountOptions
    from mcorefs.tree import Source, VirtualTree


@click.command(cls=Command)
@CKPT
@argument(
    "mnt", "MNT", "An empty directory; only with --fuse-fd it may be left out.", required=False
)
@with_options(
    *CHOICES, "tokenizer", "require_tokenizer", "dtype", "shard_size", "cache_bytes",
    "max_read_rate", "index_cache",
)  # fmt: skip
@click.option(
    "--all-iterations",
    is_flag=True,
    help="Show every iteration of the run as a directory, and `latest`, a link to the newest: "
    "they appear when their save is complete and go when they are deleted.",
)
@click.option("--foreground", "-f", is_flag=True, help="Serve in this process until unmounted.")
@click.option(
    "--log-file",
    metavar="FILE",
    type=place,
    shell_complete=files,
    help="Where the daemon logs: a line of JSON for each event.",
)
@click.option("--allow-other", is_flag=True, help="Let every user of this machine read the mount.")
@click.option(
    "--fuse-fd",
    metavar="N",
    type=click.IntRange(min=3),
    help="Serve the mount of descriptor N of /dev/fuse, which somebody else has opened, mounted "
    "(at MNT, if that is seen from here) and handed over; MNT may be /dev/fd/N.",
)
@click.option(
    "--fsname",
    metavar="NAME",
    default="mcorefs",
    help="Device name in /proc/mounts; transformers reads without mmap where it is `hf-mount`.",
)
@click.option(
    "--read-ahead",
    metavar="SIZE",
    type=wording.parse_size,
    help="How far the kernel reads ahead on this mount, where root mounts it; default 4MiB. Less "
    "suits many nodes that each read small parts of all tensors.",
)
@click.option(
    "--prefetch",
    is_flag=True,
    help="Then read all weights once, so that they lie in memory (page cache).",
)
def mount(
    ckpt: Path,
    options: Options,
    mnt: Path | None,
    all_iterations: bool,
    foreground: bool,
    log_file: Path | None,
    allow_other: bool,
    fuse_fd: int | None,
    fsname: str,
    read_ahead: int | None,
    prefetch: bool,
) -> None:
    """Show CKPT as a Hugging Face model directory at MNT, read-only.

    Returns when the mount is live and was checked; a daemon serves it until `mcorefs umount MNT`.
    Everything that is wrong with the checkpoint is reported at once, before anything is mounted.
    """
    from mcorefs.memory import gc_paused
    from mcorefs.mount import READ_AHEAD_KIB, MountOptions, check_place, descriptor_in, serve
    from mcorefs.tree import open_tree

    started = time.monotonic()
    if mnt is not None and fuse_fd is None and (fuse_fd := descriptor_in(mnt)) is not None:
        mnt = None
    if mnt is None and (fuse_fd is None or prefetch):
        raise click.BadParameter("MNT is missing; only --fuse-fd N without --prefetch needs none")
    mount_options = MountOptions(
        fsname=fsname,
        allow_other=allow_other,
        foreground=foreground,
        log_file=log_file,
        fuse_fd=fuse_fd,
        read_ahead_kib=READ_AHEAD_KIB if read_ahead is None else read_ahead >> 10,
    )
    check_place(mnt, mount_options)
    if foreground:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s: %(message)s")
    if all_iterations:
        if options.iteration is not None or prefetch:
            raise click.BadParameter("--all-iterations takes neither --iteration nor --prefetch")
        _mount_run(ckpt, mnt, options, mount_options)
        return
    with gc_paused():
        opened = open_tree(ckpt, options)
        gc.freeze()  # it stays as long as the daemon does, which is forked and so shares it
    source, tree = opened.source, opened.tree

    def ready() -> None:
        files = wording.count(len(tree.weights), "file")
        say(f"{wording.summary(source)} in {files}, {_where(mnt, fuse_fd)}")
        remarks(source)
        if mnt is not None:
            say(wording.how_to_load(mnt, source.architecture))
        say(f"Mounted in {time.monotonic() - started:.2f} s. {_how_to_end(mnt)}")
        if prefetch and foreground and mnt is not None:
            Thread(target=_prefetch, args=(mnt, tree), daemon=True).start()

    serve(lambda: tree, mnt, mount_options, on_ready=_whoever_listens(ready))
    if prefetch and not foreground and mnt is not None:
        _prefetch(mnt, tree)


def _whoever_listens(ready: Callable[[], None]) -> Callable[[], None]:
    """`ready`, which says that it is mounted; where that cannot be said, it is so all the same."""

    def say_so() -> None:
        with suppress(OSError):
            ready()

    return say_so


def _where(mnt: Path | None, fuse_fd: int | None) -> str:
    return f"on descriptor {fuse_fd}" if mnt is None else f"at {mnt}"


def _how_to_end(mnt: Path | None) -> str:
    if mnt is None:
        return "It ends when whoever mounted it takes it away"
    return f"Unmount: mcorefs umount {mnt}"


def _mount_run(ckpt: Path, mnt: Path | None, options: Options, mount_options: MountOptions) -> None:
    """Show all iterations of the run that CKPT is."""
    from mcorefs.mount import Living, serve
    from mcorefs.mount.living import LATEST
    from mcorefs.published import Run, find_run

    def look() -> tuple[Run, Living, Source | None]:
        run = Run(find_run(ckpt), options.format, options.read_timeout)
        living = Living.over(run, options)
        return run, living, living.open_newest()

    run, living, source = patiently(look, options.read_timeout)

    def ready() -> None:
        where = _where(mnt, mount_options.fuse_fd)
        say(f"{wording.count(len(living.names), 'iteration')} of {run.root}, {where}")
        if source is not None:
            say(f"The newest is {wording.summary(source)}")
            remarks(source)
        if source is not None and mnt is not None:
            say(f"{mnt / LATEST} leads to it for now; give an engine $(realpath {mnt / LATEST})")
            say(wording.how_to_load(mnt / living.names[-1], source.architecture))
        elif source is None:
            say("None is complete yet: they appear when they have been saved")
        say(_how_to_end(mnt))

    serve(lambda: living, mnt, mount_options, on_ready=_whoever_listens(ready))


def _prefetch(mnt: Path, tree: VirtualTree) -> None:
    """Read all weights through the mount; what fails is no reason to take it away."""
    from mcorefs.memory import available_bytes
    from mcorefs.mount.prefetch import prefetch

    sizes = {name: file.size for name, file in tree.weights.items()}
    total, free = sum(sizes.values()), available_bytes()
    if total > free:
        complain(
            f"  WARNING: not read ahead: {wording.size(total)} do not fit into the "
            f"{wording.size(free)} of memory that are free"
        )
        return
    started = time.monotonic()
    try:
        with progress("Reading ahead", total) as advance:
            prefetch(mnt, sizes, advance)
    except OSError as problem:
        complain(f"  WARNING: reading ahead stopped: {problem}")
        return
    seconds = time.monotonic() - started
    say(f"Read ahead {wording.size(total)} in {seconds:.1f} s.")


@click.command(cls=Command)
@MNT
@click.option("--force", is_flag=True, help="Even if it is in use, or does not answer.")
def umount(mnt: Path, force: bool) -> None:
    """Take a mount away; also one whose daemon has died."""
    from mcorefs.mount import unmount

    unmount(mnt, force)
