"""The arguments and options that commands share: their names, and what `--help` says of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from mcorefs.formats import NAMES
from mcorefs.mapping.heads import TASKS
from mcorefs.model import DTYPES, WEIGHTS, Options, parse_adapter
from mcorefs.patience import READ_TIMEOUT, patiently
from mcorefs.remote import parse_path
from mcorefs.wording import parse_size

Declare = Callable[[Callable[..., None]], Callable[..., None]]
"""What declares one option or argument of the command that it decorates."""


class Argument(click.Argument):
    """An argument, and what it is; click has a text for arguments only since 8.5."""

    def __init__(self, param_decls: Sequence[str], about: str, **given: object) -> None:
        super().__init__(param_decls, **given)  # type: ignore[arg-type]
        self.about = about


class Command(click.Command):
    """A command of which `--help` explains the arguments too."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        arguments = [each for each in self.get_params(ctx) if isinstance(each, Argument)]
        with formatter.section("Arguments"):
            formatter.write_dl([(each.human_readable_name, each.about) for each in arguments])
        super().format_options(ctx, formatter)

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first paragraph, whole: click's own ends at the end of a line."""
        return " ".join((self.help or "").partition("\n\n")[0].split())


def place(text: str) -> Path:
    """A path as it was given. `click.Path` would look at it, which may hang."""
    return Path(text)


def files(context: click.Context, of: click.Parameter, start: str) -> list[CompletionItem]:
    """Let the shell complete the names of files."""
    return [CompletionItem(start, type="file")]


def argument(
    name: str, metavar: str, about: str, parse: Callable[[str], Path] = place, required: bool = True
) -> Declare:
    shown = metavar if required else f"[{metavar}]"
    return click.argument(
        name, cls=Argument, metavar=shown, about=about, type=parse, required=required,
        shell_complete=files,
    )  # fmt: skip


CKPT = argument(
    "ckpt",
    "CKPT",
    "The Megatron checkpoint: a directory, or its URL (s3://, gs://, https://, ...).",
    parse=parse_path,
)
MNT = argument("mnt", "MNT", "Where it is mounted.")

_OF_OPTIONS: Mapping[str, Declare] = {
    "iteration": click.option(
        "--iteration",
        metavar="N",
        type=int,
        help="Which iteration; else the one its tracker file names.",
    ),
    "format": click.option(
        "--format",
        metavar="NAME",
        help="The format to read, where there are several: " + ", ".join(NAMES) + ".",
    ),
    "family": click.option(
        "--family", help="The model's Hugging Face `model_type`, if it cannot be told."
    ),
    "task": click.option(
        "--task",
        metavar="|".join(TASKS),
        help="What the model was trained for, if its trainer does not say: seq_cls is what "
        "classifiers, reward models and value heads are.",
    ),
    "hf_config": click.option(
        "--hf-config",
        metavar="DIR",
        type=parse_path,
        shell_complete=files,
        help="A Hugging Face directory (or its URL) of the same architecture (weights not needed): "
        "fills what Megatron does not record. Any contradiction is an error.",
    ),
    "tokenizer": click.option(
        "--tokenizer",
        metavar="DIR|FILE",
        type=parse_path,
        shell_complete=files,
        help="The tokenizer, if the checkpoint has none.",
    ),
    "require_tokenizer": click.option(
        "--require-tokenizer", is_flag=True, help="Refuse, rather than warn, if none is found."
    ),
    "vocab_size": click.option(
        "--vocab-size",
        metavar="N",
        type=int,
        help="Cut the padding of the vocabulary after N.",
    ),
    "dtype": click.option("--dtype", help=f"Cast weights when they are read: {', '.join(DTYPES)}."),
    "weights": click.option(
        "--weights",
        metavar="|".join(WEIGHTS),
        default="model",
        help="The model's own weights, or the float32 main parameters in the optimizer's state, "
        "of which they are roundings.",
    ),
    "adapter": click.option(
        "--adapter",
        metavar="PATH[:SCALE]",
        shell_complete=files,
        help="A LoRA adapter, as a checkpoint (ms-swift, Megatron-Bridge) or in PEFT's format: "
        "merged into the weights when they are read. SCALE replaces alpha / r.",
    ),
    "mtp": click.option(
        "--mtp/--no-mtp",
        default=True,
        show_default=False,
        help="Whether the model has its layers for multi-token prediction, where it was trained "
        "with them.",
    ),
    "shard_size": click.option(
        "--shard-size", metavar="SIZE", default="50GB", help="Largest safetensors file."
    ),
    "cache_bytes": click.option(
        "--cache-size",
        "cache_bytes",
        metavar="SIZE",
        type=parse_size,
        help="Memory for merged tiles, such as 512MiB; default: an eighth of what is free, at "
        "most 512MiB.",
    ),
    "max_read_rate": click.option(
        "--max-read-rate",
        metavar="SIZE",
        type=parse_size,
        help="Most bytes a second to read of the shards, such as 500MB: leaves the rest of the "
        "storage to a training run. Each process (part, Ray worker) has it for itself.",
    ),
    "read_timeout": click.option(
        "--read-timeout",
        metavar="SECONDS",
        type=click.FloatRange(min=0.1),
        default=READ_TIMEOUT,
        help="How long the storage may take to answer; then opening fails, and who reads a mount "
        "gets an I/O error.",
    ),
    "index_cache": click.option(
        "--index-cache",
        is_flag=True,
        envvar="MCOREFS_INDEX_CACHE",
        show_envvar=True,
        help="Keep what CKPT was found to hold in ~/.cache/mcorefs, to open it faster the next "
        "time, as long as none of its files is another.",
    ),
}
"""What the command line says of each field of `Options`, and the default there."""
CHOICES = (
    "iteration", "format", "family", "task", "hf_config", "vocab_size", "weights", "adapter", "mtp",
    "read_timeout",
)  # fmt: skip
"""Fields of `Options` that every command takes."""


def with_options(*names: str) -> Declare:
    """Decorate a command that has a parameter `options: Options`: its place on the command line is
    taken by an option for each of these fields."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def taking(**given: object) -> None:
            chosen = {name: given.pop(name) for name in names}
            command(options=_options(chosen), **given)

        declared: Callable[..., None] = taking
        for name in sorted(names, key=list(_OF_OPTIONS).index, reverse=True):
            declared = _OF_OPTIONS[name](declared)  # the last one is shown first
        return declared

    return decorate


def _options(chosen: Mapping[str, object]) -> Options:
    fields = dict(chosen)
    adapter, seconds = chosen["adapter"], chosen["read_timeout"]
    if isinstance(adapter, str):
        assert isinstance(seconds, float)
        try:
            path, scale = patiently(lambda: parse_adapter(adapter), seconds)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--adapter") from None
        fields |= {"adapter": path, "adapter_scale": scale}
    return replace(Options(), **fields)  # type: ignore[arg-type]
