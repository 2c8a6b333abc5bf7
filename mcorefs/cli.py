"""The command line: the only place that prints or exits."""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated

import typer

from mcorefs import wording
from mcorefs.arguments import (
    Adapter,
    Address,
    AllIterations,
    CacheSize,
    Ckpt,
    Dtype,
    Executor,
    FamilyName,
    Finish,
    FormatName,
    HfConfig,
    Iteration,
    MaxReadRate,
    Part,
    ReadTimeout,
    RequireTokenizer,
    ShardSize,
    TaskName,
    TokenizerPath,
    VocabSize,
    WhichWeights,
    WithMtp,
    to_options,
)
from mcorefs.console import err, out, progress, remarks, say
from mcorefs.errors import McorefsError

if TYPE_CHECKING:
    from mcorefs.model import Options
    from mcorefs.mount import MountOptions
    from mcorefs.shares import Share
    from mcorefs.tree import Opened, VirtualTree

app = typer.Typer(
    name="mcorefs",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Read Megatron-Core checkpoints as Hugging Face models, without converting them.\n\n"
    "CKPT is the directory a training run saved to (with `latest_checkpointed_iteration.txt`), "
    "one `iter_XXXXXXX` directory of it, or a run directory above. No GPU, no Megatron and no copy "
    "is needed; nothing in a checkpoint is ever executed. What is a Hugging Face model already is "
    "served as it is.",
    epilog="Begin with `mcorefs inspect CKPT`, then `mcorefs mount CKPT MNT`. Without FUSE: "
    "`mcorefs materialize CKPT OUT`, or `mcorefs.open(CKPT)` in Python.",
)


@app.command()
def mount(
    ckpt: Ckpt,
    mnt: Annotated[Path, typer.Argument(metavar="MNT", help="An empty directory.")],
    iteration: Iteration = None,
    all_iterations: AllIterations = False,
    format_name: FormatName = None,
    family: FamilyName = None,
    task: TaskName = None,
    hf_config: HfConfig = None,
    tokenizer: TokenizerPath = None,
    require_tokenizer: RequireTokenizer = False,
    vocab_size: VocabSize = None,
    dtype: Dtype = None,
    weights: WhichWeights = "model",
    adapter: Adapter = None,
    mtp: WithMtp = True,
    shard_size: ShardSize = "50GB",
    cache_size: CacheSize = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Serve in this process until unmounted.")
    ] = False,
    log_file: Annotated[
        Path | None, typer.Option("--log-file", metavar="FILE", help="Where the daemon logs.")
    ] = None,
    allow_other: Annotated[
        bool, typer.Option("--allow-other", help="Let every user of this machine read the mount.")
    ] = False,
    fsname: Annotated[
        str,
        typer.Option(
            "--fsname",
            metavar="NAME",
            help="Device name in /proc/mounts; transformers reads without mmap where it is "
            "`hf-mount`.",
        ),
    ] = "mcorefs",
    max_read_rate: MaxReadRate = None,
    read_timeout: ReadTimeout = 30.0,
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
    from mcorefs.mount import MountOptions, check_fuse, check_mountpoint, serve
    from mcorefs.tree import open_tree

    started = time.monotonic()
    mount_options = MountOptions(
        fsname=fsname, allow_other=allow_other, foreground=foreground, log_file=log_file
    )
    check_fuse(allow_other)
    check_mountpoint(mnt)
    options = to_options(
        iteration,
        family,
        hf_config,
        tokenizer,
        require_tokenizer,
        vocab_size,
        dtype,
        weights,
        format_name,
        adapter,
        task,
        mtp,
    )
    options = replace(
        options,
        shard_size=shard_size,
        cache_bytes=cache_size,
        max_read_rate=max_read_rate,
        read_timeout=read_timeout,
    )
    if foreground:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s: %(message)s")
    if all_iterations:
        if iteration is not None or prefetch:
            raise typer.BadParameter("--all-iterations takes neither --iteration nor --prefetch")
        _mount_run(ckpt, mnt, options, mount_options)
        return
    with gc_paused():
        opened = open_tree(ckpt, options)
        gc.freeze()  # it stays as long as the daemon does, which is forked and so shares it
    source, tree = opened.source, opened.tree

    def ready() -> None:
        files = wording.count(len(tree.weights), "file")
        say(f"{wording.summary(source)} in {files}, at {mnt}")
        remarks(source)
        say(wording.how_to_load(mnt, source.architecture))
        say(f"Mounted in {time.monotonic() - started:.2f} s. Unmount: mcorefs umount {mnt}")
        if prefetch and foreground:
            Thread(target=_prefetch, args=(mnt, tree), daemon=True).start()

    serve(lambda: tree, mnt, mount_options, on_ready=ready)
    if prefetch and not foreground:
        _prefetch(mnt, tree)


def _mount_run(ckpt: Path, mnt: Path, options: Options, mount_options: MountOptions) -> None:
    """Show all iterations of the run that CKPT is."""
    from mcorefs.mount import Living, serve
    from mcorefs.mount.living import LATEST
    from mcorefs.published import Run, find_run

    run = Run(find_run(ckpt), options.format)
    living = Living.over(run, options)
    source = living.open_newest()

    def ready() -> None:
        say(f"{wording.count(len(living.names), 'iteration')} of {run.root}, at {mnt}")
        if source is not None:
            say(f"The newest is {wording.summary(source)}")
            remarks(source)
            say(f"{mnt / LATEST} leads to it for now; give an engine $(realpath {mnt / LATEST})")
            say(wording.how_to_load(mnt / living.names[-1], source.architecture))
        else:
            say("None is complete yet: they appear when they have been saved")
        say(f"Unmount: mcorefs umount {mnt}")

    serve(lambda: living, mnt, mount_options, on_ready=ready)


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


@app.command()
def umount(
    mnt: Annotated[Path, typer.Argument(metavar="MNT", help="Where it is mounted.")],
    force: Annotated[
        bool, typer.Option("--force", help="Even if it is in use, or does not answer.")
    ] = False,
) -> None:
    """Take a mount away; also one whose daemon has died."""
    from mcorefs.mount import unmount

    unmount(mnt, force)


@app.command()
def materialize(
    ckpt: Ckpt,
    out_directory: Annotated[
        Path, typer.Argument(metavar="OUT", help="An empty directory, or one to be made.")
    ],
    iteration: Iteration = None,
    format_name: FormatName = None,
    family: FamilyName = None,
    task: TaskName = None,
    hf_config: HfConfig = None,
    tokenizer: TokenizerPath = None,
    require_tokenizer: RequireTokenizer = False,
    vocab_size: VocabSize = None,
    dtype: Dtype = None,
    weights: WhichWeights = "model",
    adapter: Adapter = None,
    mtp: WithMtp = True,
    shard_size: ShardSize = "50GB",
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", min=1, help="Threads that read and write."),
    ] = None,
    max_read_rate: MaxReadRate = None,
    part: Part = None,
    finish: Finish = False,
    executor: Executor = None,
    address: Address = None,
) -> None:
    """Write the same directory that a mount shows as real files to OUT.

    Interrupted, it goes on where it stopped when it is called again.
    """
    from mcorefs.materialize import finish_parts
    from mcorefs.materialize import materialize as write
    from mcorefs.tree import open_tree

    _check_way(part, finish, executor, address)

    started = time.monotonic()
    options = to_options(
        iteration,
        family,
        hf_config,
        tokenizer,
        require_tokenizer,
        vocab_size,
        dtype,
        weights,
        format_name,
        adapter,
        task,
        mtp,
    )
    options = replace(options, shard_size=shard_size, max_read_rate=max_read_rate)
    opened = open_tree(ckpt, options)
    source, tree = opened.source, opened.tree
    remarks(source)
    if finish:
        finish_parts(tree, out_directory)
        say(f"{wording.summary(source)} is complete in {out_directory}")
        return
    with progress("Writing", None if part else tree.total_bytes) as advance:
        if executor is not None:
            from mcorefs.materialize.on_ray import materialize_on_ray

            written = materialize_on_ray(tree, ckpt, options, out_directory, address, advance)
        else:
            written = write(tree, out_directory, threads, advance, part)
    for line in wording.written(written, source, out_directory, time.monotonic() - started, part):
        say(line)


def _check_way(part: Share | None, finish: bool, executor: str | None, address: str | None) -> None:
    given = {"--part": part is not None, "--finish": finish, "--executor": executor is not None}
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise typer.BadParameter(f"{' and '.join(names)} exclude each other")
    if executor not in (None, "ray"):
        raise typer.BadParameter(f"{executor!r} is not an executor; there is only ray")
    if address is not None and executor is None:
        raise typer.BadParameter("--address is that of a Ray cluster: pass --executor ray too")


@app.command()
def inspect(
    ckpt: Ckpt,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    iteration: Iteration = None,
    format_name: FormatName = None,
    family: FamilyName = None,
    task: TaskName = None,
    hf_config: HfConfig = None,
    tokenizer: TokenizerPath = None,
    vocab_size: VocabSize = None,
    weights: WhichWeights = "model",
    adapter: Adapter = None,
    mtp: WithMtp = True,
) -> None:
    """Say what CKPT is and whether it is whole: format, iterations, layout, family, missing shards.

    Reads metadata only. Exits with 1 if it cannot be mounted.
    """
    from mcorefs.inspection import inspect as look

    options = to_options(
        iteration,
        family,
        hf_config,
        tokenizer,
        False,
        vocab_size,
        None,
        weights,
        format_name,
        adapter,
        task,
        mtp,
    )
    found = look(ckpt, options)
    if as_json:
        out.print(json.dumps(found.to_json(), indent=2))
    else:
        for label, text in wording.inspection(found):
            say(f"{label:>13}  {text}")
    if found.problems:
        raise typer.Exit(1)


@app.command()
def verify(
    ckpt: Ckpt,
    hf_dir: Annotated[
        Path | None, typer.Argument(metavar="[HF_DIR]", help="A directory of safetensors files.")
    ] = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Also look for NaN and infinity, and for copies of one tensor that differ between "
            "ranks.",
        ),
    ] = False,
    iteration: Iteration = None,
    format_name: FormatName = None,
    family: FamilyName = None,
    task: TaskName = None,
    hf_config: HfConfig = None,
    vocab_size: VocabSize = None,
    dtype: Dtype = None,
    weights: WhichWeights = "model",
    adapter: Adapter = None,
    mtp: WithMtp = True,
) -> None:
    """Compare CKPT with an existing Hugging Face directory, every byte of every tensor.

    Without HF_DIR, prove that its files are what was saved: by the SHA-256 of every file, if
    Megatron-LM saved them (`--verify-integrity`), else by the CRC-32 that torch saves with every
    tensor. Exits with 1 if anything differs.
    """
    from mcorefs.formats import HUGGINGFACE
    from mcorefs.locate import locate
    from mcorefs.tree import open_tree
    from mcorefs.verify.checks import Check, deep_checks, own_proof

    checks: list[Check] = []
    options = to_options(
        iteration,
        family,
        hf_config,
        None,
        False,
        vocab_size,
        dtype,
        weights,
        format_name,
        adapter,
        task,
        mtp,
    )
    sound = True
    if deep or hf_dir is not None:
        opened = open_tree(ckpt, options)
        sound = hf_dir is None or _compare(opened, hf_dir)
        checks += deep_checks(opened) if deep else ()
    if hf_dir is None:
        location = locate(ckpt, iteration, format_name)
        if not (deep and location.format is HUGGINGFACE):
            checks.append(own_proof(location, weights))
    for check in checks:
        with progress(check.doing, check.total_bytes) as advance:
            findings = check.run(advance)
        for line in wording.findings(check, findings):
            say(line)
        sound = sound and not findings.differences
    if not sound:
        raise typer.Exit(1)


def _compare(opened: Opened, hf_dir: Path) -> bool:
    """Whether a checkpoint is equal to a directory; says what is not."""
    from mcorefs.verify import verify as compare

    source = opened.source
    total = sum(tensor.nbytes for tensor in source.tensors)
    with progress("Comparing", total) as advance:
        verdict = compare(source.tensors, source.config, opened.reader, hf_dir, advance)
    for difference in verdict.config:
        say(f"config.json: {difference.name} {difference.problem}")
    for difference in verdict.differences:
        say(f"{difference.name} {difference.problem}")
    say(
        f"{wording.count(verdict.equal, 'tensor')} equal, {len(verdict.differences)} different "
        f"({wording.size(verdict.total_bytes)} compared)"
    )
    return not verdict.differences


def main() -> None:
    """Entry point: an error that a person can act on ends with its text and status 1."""
    try:
        app(prog_name="mcorefs")
    except McorefsError as error:
        err.print(wording.printable(f"mcorefs: {error}"))
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("mcorefs: interrupted")
        sys.exit(130)
