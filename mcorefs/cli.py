"""The command line: with `commands` the only place that prints or exits."""

from __future__ import annotations

import errno
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mcorefs import wording
from mcorefs.arguments import CHOICES, CKPT, Command, argument, with_options
from mcorefs.commands import mount, status, umount
from mcorefs.console import complain, progress, remarks, say
from mcorefs.errors import McorefsError
from mcorefs.model import Options
from mcorefs.patience import patiently
from mcorefs.shares import Share

if TYPE_CHECKING:
    from mcorefs.tree import Opened


class Commands(click.Group):
    """The commands, in the order in which a person meets them."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    "mcorefs",
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
    epilog="Begin with `mcorefs inspect CKPT`, then `mcorefs mount CKPT MNT`. Without FUSE: "
    "`mcorefs materialize CKPT OUT`, or `mcorefs.open(CKPT)` in Python.",
)
def app() -> None:
    """Read Megatron-Core checkpoints as Hugging Face models, without converting them.

    CKPT is the directory a training run saved to (with `latest_checkpointed_iteration.txt`), one
    `iter_XXXXXXX` directory of it, or a run directory above. No GPU, no Megatron and no copy is
    needed; nothing in a checkpoint is ever executed. What is a Hugging Face model already is served
    as it is.
    """


app.add_command(mount)
app.add_command(umount)
app.add_command(status)


@app.command()
@CKPT
@argument("out_directory", "OUT", "An empty directory, or one to be made.")
@with_options(*CHOICES, "tokenizer", "require_tokenizer", "dtype", "shard_size", "max_read_rate")
@click.option(
    "--threads", metavar="N", type=click.IntRange(min=1), help="Threads that read and write."
)
@click.option(
    "--part",
    metavar="I/N",
    type=Share.parse,
    help="Write only the I-th of N parts, as one of N jobs (Slurm arrays, Kubernetes indexed "
    "jobs); the last one completes OUT.",
)
@click.option(
    "--finish", is_flag=True, help="Write nothing but what completes OUT after its parts."
)
@click.option(
    "--executor",
    metavar="ray",
    help="Write as tasks of a Ray cluster whose nodes share CKPT and OUT.",
)
@click.option("--address", metavar="ADDRESS", help="That of the Ray cluster; auto: this machine's.")
def materialize(
    ckpt: Path,
    out_directory: Path,
    options: Options,
    threads: int | None,
    part: Share | None,
    finish: bool,
    executor: str | None,
    address: str | None,
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
        raise click.BadParameter(f"{' and '.join(names)} exclude each other")
    if executor not in (None, "ray"):
        raise click.BadParameter(f"{executor!r} is not an executor; there is only ray")
    if address is not None and executor is None:
        raise click.BadParameter("--address is that of a Ray cluster: pass --executor ray too")


@app.command()
@CKPT
@with_options(*CHOICES, "tokenizer")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect(ckpt: Path, options: Options, as_json: bool) -> None:
    """Say what CKPT is and whether it is whole: format, iterations, layout, family, missing shards.

    Reads metadata only. Exits with 1 if it cannot be mounted.
    """
    from mcorefs.inspection import inspect as look

    found = look(ckpt, options)
    if as_json:
        say(json.dumps(found.to_json(), indent=2))
    else:
        for label, text in wording.inspection(found):
            say(f"{label:>13}  {text}")
    if found.problems:
        raise click.exceptions.Exit(1)


@app.command()
@CKPT
@argument("hf_dir", "HF_DIR", "A directory of safetensors files.", required=False)
@with_options(*CHOICES, "dtype")
@click.option(
    "--deep",
    is_flag=True,
    help="Also look for NaN and infinity, and for copies of one tensor that differ between ranks.",
)
def verify(ckpt: Path, options: Options, hf_dir: Path | None, deep: bool) -> None:
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
        raise click.exceptions.Exit(1)


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
        sys.exit(app(prog_name="mcorefs", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except McorefsError as error:
        complain(f"mcorefs: {error}")
        sys.exit(1)
    except MemoryError:
        complain("mcorefs: there is not enough memory (is it limited by ulimit -v?)")
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        complain(f"mcorefs: the output cannot be written: {error.strerror}")
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt) as interrupt:
        if isinstance(interrupt.__cause__, EOFError):
            raise  # click takes that for an end of what a person types; here nobody is asked
        complain("mcorefs: interrupted")
        sys.exit(130)
