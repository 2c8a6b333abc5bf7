"""The command line: the only place that prints or exits."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mcorefs import wording
from mcorefs.arguments import (
    Adapter,
    CacheSize,
    Ckpt,
    Dtype,
    FamilyName,
    FormatName,
    HfConfig,
    Iteration,
    RequireTokenizer,
    ShardSize,
    TaskName,
    TokenizerPath,
    VocabSize,
    WhichWeights,
)
from mcorefs.errors import McorefsError
from mcorefs.model import Options, parse_adapter

if TYPE_CHECKING:
    from mcorefs.tree import Opened, Source

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
out = Console(highlight=False, soft_wrap=True, markup=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


@app.command()
def mount(
    ckpt: Ckpt,
    mnt: Annotated[Path, typer.Argument(metavar="MNT", help="An empty directory.")],
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
) -> None:
    """Show CKPT as a Hugging Face model directory at MNT, read-only.

    Returns when the mount is live and was checked; a daemon serves it until `mcorefs umount MNT`.
    Everything that is wrong with the checkpoint is reported at once, before anything is mounted.
    """
    from mcorefs.mount import MountOptions, check_fuse, check_mountpoint, serve
    from mcorefs.tree import open_tree

    started = time.monotonic()
    mount_options = MountOptions(
        fsname=fsname, allow_other=allow_other, foreground=foreground, log_file=log_file
    )
    check_fuse(allow_other)
    check_mountpoint(mnt)
    options = _options(
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
    )
    opened = open_tree(ckpt, replace(options, shard_size=shard_size, cache_bytes=cache_size))
    source, tree = opened.source, opened.tree
    if foreground:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s: %(message)s")

    def ready() -> None:
        files = sum(name.endswith((".safetensors", ".bin")) for name in tree.files)
        _say(f"{wording.summary(source)} in {wording.count(files, 'file')}, at {mnt}")
        _remarks(source)
        _say(wording.how_to_load(mnt))
        _say(f"Mounted in {time.monotonic() - started:.2f} s. Unmount: mcorefs umount {mnt}")

    serve(lambda: tree, mnt, mount_options, on_ready=ready)


@app.command()
def umount(
    mnt: Annotated[Path, typer.Argument(metavar="MNT", help="Where it is mounted.")],
    force: Annotated[bool, typer.Option("--force", help="Detach it even if it is in use.")] = False,
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
    shard_size: ShardSize = "50GB",
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", min=1, help="Threads that read and write."),
    ] = None,
) -> None:
    """Write the same directory that a mount shows as real files to OUT.

    Interrupted, it goes on where it stopped when it is called again.
    """
    from mcorefs.materialize import materialize as write
    from mcorefs.tree import open_tree

    started = time.monotonic()
    options = _options(
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
    )
    opened = open_tree(ckpt, replace(options, shard_size=shard_size))
    source, tree = opened.source, opened.tree
    _remarks(source)
    total = sum(file.size for file in tree.files.values())
    with _progress("Writing", total) as advance:
        written = write(tree, out_directory, threads, advance)
    seconds = max(time.monotonic() - started, 1e-9)
    speed = (written.total_bytes - written.resumed_bytes) / 1e9 / seconds
    files = wording.count(written.files, "file")
    _say(
        f"{wording.summary(source)} written to {out_directory}: {files} in {seconds:.1f} s "
        f"({speed:.2f} GB/s)"
    )


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
) -> None:
    """Say what CKPT is and whether it is whole: format, iterations, layout, family, missing shards.

    Reads metadata only. Exits with 1 if it cannot be mounted.
    """
    from mcorefs.inspection import inspect as look

    options = _options(
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
    )
    found = look(ckpt, options)
    if as_json:
        out.print(json.dumps(found.to_json(), indent=2))
    else:
        for label, text in wording.inspection(found):
            _say(f"{label:>13}  {text}")
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
    options = _options(
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
        with _progress(check.doing, check.total_bytes) as advance:
            findings = check.run(advance)
        for line in wording.findings(check, findings):
            _say(line)
        sound = sound and not findings.differences
    if not sound:
        raise typer.Exit(1)


def _compare(opened: Opened, hf_dir: Path) -> bool:
    """Whether a checkpoint is equal to a directory; says what is not."""
    from mcorefs.verify import verify as compare

    source = opened.source
    total = sum(tensor.nbytes for tensor in source.tensors)
    with _progress("Comparing", total) as advance:
        verdict = compare(source.tensors, source.config, opened.reader, hf_dir, advance)
    for difference in verdict.config:
        _say(f"config.json: {difference.name} {difference.problem}")
    for difference in verdict.differences:
        _say(f"{difference.name} {difference.problem}")
    _say(
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


# -- pieces --------------------------------------------------------------------------------------


def _options(
    iteration: int | None,
    family: str | None,
    hf_config: Path | None,
    tokenizer: Path | None,
    require_tokenizer: bool,
    vocab_size: int | None,
    dtype: str | None,
    weights: str,
    format_name: str | None,
    adapter: str | None,
    task: str | None,
) -> Options:
    path, scale = (None, None) if adapter is None else _adapter(adapter)
    return Options(
        iteration=iteration,
        format=format_name,
        family=family,
        task=task,
        hf_config=hf_config,
        tokenizer=tokenizer,
        require_tokenizer=require_tokenizer,
        vocab_size=vocab_size,
        dtype=dtype,
        weights=weights,
        adapter=path,
        adapter_scale=scale,
    )


def _adapter(text: str) -> tuple[Path, float | None]:
    try:
        return parse_adapter(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--adapter") from None


def _say(text: str) -> None:
    out.print(wording.printable(text))


def _remarks(source: Source) -> None:
    for remark in source.remarks:
        _say(f"  note: {remark}")
    if not source.tokenizer.found:
        err.print(wording.printable(wording.no_tokenizer(source)), style="bold yellow")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal; yields how to advance it by bytes."""
    if not err.is_terminal:
        yield lambda count: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=total or None)
        yield lambda count: bar.advance(task, count)
