"""The command line: with `commands` the only place that prints or exits."""

from __future__ import annotations

import errno
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcorefs import wording
from mcorefs.arguments import CHOICES, Address, Ckpt, Executor, Finish, Part, with_options
from mcorefs.commands import mount, status, umount
from mcorefs.console import err, out, progress, remarks, say
from mcorefs.errors import McorefsError
from mcorefs.model import Options
from mcorefs.patience import patiently

if TYPE_CHECKING:
    from mcorefs.shares import Share
    from mcorefs.tree import Opened

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
app.command()(mount)
app.command()(umount)
app.command()(status)


@app.command()
@with_options(*CHOICES, "tokenizer", "require_tokenizer", "dtype", "shard_size", "max_read_rate")
def materialize(
    ckpt: Ckpt,
    out_directory: Annotated[
        Path, typer.Argument(metavar="OUT", help="An empty directory, or one to be made.")
    ],
    options: Options,
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", min=1, help="Threads that read and write."),
    ] = None,
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
@with_options(*CHOICES, "tokenizer")
def inspect(
    ckpt: Ckpt,
    options: Options,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what CKPT is and whether it is whole: format, iterations, layout, family, missing shards.

    Reads metadata only. Exits with 1 if it cannot be mounted.
    """
    from mcorefs.inspection import inspect as look

    found = look(ckpt, options)
    if as_json:
        out.print(json.dumps(found.to_json(), indent=2))
    else:
        for label, text in wording.inspection(found):
            say(f"{label:>13}  {text}")
    if found.problems:
        raise typer.Exit(1)


@app.command()
@with_options(*CHOICES, "dtype")
def verify(
    ckpt: Ckpt,
    options: Options,
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
    seconds = options.read_timeout
    sound = True
    if deep or hf_dir is not None:
        opened = open_tree(ckpt, options)
        sound = hf_dir is None or _compare(opened, hf_dir, seconds)
        checks += deep_checks(opened, seconds) if deep else ()
    if hf_dir is None:
        location = patiently(lambda: locate(ckpt, options.iteration, options.format), seconds)
        if not (deep and location.format is HUGGINGFACE):
            checks.append(own_proof(location, options.weights, seconds))
    for check in checks:
        with progress(check.doing, check.total_bytes) as advance:
            findings = check.run(advance)
        for line in wording.findings(check, findings):
            say(line)
        sound = sound and not findings.differences
    if not sound:
        raise typer.Exit(1)


def _compare(opened: Opened, hf_dir: Path, seconds: float | None) -> bool:
    """Whether a checkpoint is equal to a directory; says what is not."""
    from mcorefs.verify import verify as compare

    source = opened.source
    total = sum(tensor.nbytes for tensor in source.tensors)
    with progress("Comparing", total) as advance:
        verdict = compare(source.tensors, source.config, opened.reader, hf_dir, advance, seconds)
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
    except MemoryError:
        err.print("mcorefs: there is not enough memory (is it limited by ulimit -v?)")
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        err.print(f"mcorefs: the output cannot be written: {error.strerror}")
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("mcorefs: interrupted")
        sys.exit(130)
