"""`mcorefs mount` and `mcorefs umount`."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated

import typer

from mcorefs import wording
from mcorefs.arguments import CHOICES, AllIterations, Ckpt, ReadAhead, with_options
from mcorefs.console import err, progress, remarks, say
from mcorefs.model import Options
from mcorefs.patience import patiently

Mnt = Annotated[Path, typer.Argument(metavar="MNT", parser=Path, help="Where it is mounted.")]

if TYPE_CHECKING:
    from mcorefs.mount import MountOptions
    from mcorefs.tree import Source, VirtualTree


@with_options(
    *CHOICES, "tokenizer", "require_tokenizer", "dtype", "shard_size", "cache_bytes",
    "max_read_rate", "index_cache",
)  # fmt: skip
def mount(
    ckpt: Ckpt,
    options: Options,
    mnt: Annotated[
        Path | None,
        typer.Argument(
            metavar="MNT",
            parser=Path,  # click's own looks at it, and that may hang
            help="An empty directory; only with --fuse-fd it may be left out.",
        ),
    ] = None,
    all_iterations: AllIterations = False,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Serve in this process until unmounted.")
    ] = False,
    log_file: Annotated[
        Path | None,
        typer.Option(
            "--log-file",
            metavar="FILE",
            help="Where the daemon logs: a line of JSON for each event.",
        ),
    ] = None,
    allow_other: Annotated[
        bool, typer.Option("--allow-other", help="Let every user of this machine read the mount.")
    ] = False,
    fuse_fd: Annotated[
        int | None,
        typer.Option(
            "--fuse-fd",
            metavar="N",
            min=3,
            help="Serve the mount of descriptor N of /dev/fuse, which somebody else has opened, "
            "mounted (at MNT, if that is seen from here) and handed over; MNT may be /dev/fd/N.",
        ),
    ] = None,
    fsname: Annotated[
        str,
        typer.Option(
            "--fsname",
            metavar="NAME",
            help="Device name in /proc/mounts; transformers reads without mmap where it is "
            "`hf-mount`.",
        ),
    ] = "mcorefs",
    read_ahead: ReadAhead = None,
    prefetch: Annotated[
        bool,
        typer.Option(
            "--prefetch",
            help="Then read all weights once, so that they lie in memory (page cache).",
        ),
    ] = False,
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
        raise typer.BadParameter("MNT is missing; only --fuse-fd N without --prefetch needs none")
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
            raise typer.BadParameter("--all-iterations takes neither --iteration nor --prefetch")
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
        err.print(
            f"  WARNING: not read ahead: {wording.size(total)} do not fit into the "
            f"{wording.size(free)} of memory that are free"
        )
        return
    started = time.monotonic()
    try:
        with progress("Reading ahead", total) as advance:
            prefetch(mnt, sizes, advance)
    except OSError as problem:
        err.print(wording.printable(f"  WARNING: reading ahead stopped: {problem}"))
        return
    seconds = time.monotonic() - started
    say(f"Read ahead {wording.size(total)} in {seconds:.1f} s.")


def umount(
    mnt: Mnt,
    force: Annotated[
        bool, typer.Option("--force", help="Even if it is in use, or does not answer.")
    ] = False,
) -> None:
    """Take a mount away; also one whose daemon has died."""
    from mcorefs.mount import unmount

    unmount(mnt, force)
