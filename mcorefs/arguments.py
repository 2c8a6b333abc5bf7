"""The arguments and options that commands share: their names, and what `--help` says of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mcorefs import wording
from mcorefs.formats import NAMES
from mcorefs.mapping.heads import TASKS
from mcorefs.model import DTYPES, WEIGHTS, Options, parse_adapter
from mcorefs.patience import READ_TIMEOUT, patiently
from mcorefs.remote import parse_path
from mcorefs.shares import Share


def _bytes(text: str) -> int:
    try:
        return wording.parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _share(text: str) -> Share:
    try:
        return Share.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Ckpt = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        parser=parse_path,
        help="The Megatron checkpoint: a directory, or its URL (s3://, gs://, https://, ...).",
    ),
]
Iteration = Annotated[
    int | None,
    typer.Option(
        "--iteration", metavar="N", help="Which iteration; else the one its tracker file names."
    ),
]
FormatName = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="The format to read, where there are several: " + ", ".join(NAMES) + ".",
    ),
]
FamilyName = Annotated[
    str | None,
    typer.Option("--family", help="The model's Hugging Face `model_type`, if it cannot be told."),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="|".join(TASKS),
        help="What the model was trained for, if its trainer does not say: seq_cls is what "
        "classifiers, reward models and value heads are.",
    ),
]
HfConfig = Annotated[
    Path | None,
    typer.Option(
        "--hf-config",
        metavar="DIR",
        parser=parse_path,
        help="A Hugging Face directory (or its URL) of the same architecture (weights not needed): "
        "fills what Megatron does not record. Any contradiction is an error.",
    ),
]
TokenizerPath = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="DIR|FILE",
        parser=parse_path,
        help="The tokenizer, if the checkpoint has none.",
    ),
]
RequireTokenizer = Annotated[
    bool, typer.Option("--require-tokenizer", help="Refuse, rather than warn, if none is found.")
]
VocabSize = Annotated[
    int | None,
    typer.Option("--vocab-size", metavar="N", help="Cut the padding of the vocabulary after N."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help=f"Cast weights when they are read: {', '.join(DTYPES)}."),
]
WhichWeights = Annotated[
    str,
    typer.Option(
        "--weights",
        metavar="|".join(WEIGHTS),
        help="The model's own weights, or the float32 main parameters in the optimizer's state, "
        "of which they are roundings.",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="PATH[:SCALE]",
        help="A LoRA adapter, as a checkpoint (ms-swift, Megatron-Bridge) or in PEFT's format: "
        "merged into the weights when they are read. SCALE replaces alpha / r.",
    ),
]
WithMtp = Annotated[
    bool,
    typer.Option(
        "--mtp/--no-mtp",
        help="Whether the model has its layers for multi-token prediction, where it was trained "
        "with them.",
        show_default=False,
    ),
]
ShardSize = Annotated[
    str, typer.Option("--shard-size", metavar="SIZE", help="Largest safetensors file.")
]
CacheSize = Annotated[
    int | None,
    typer.Option(
        "--cache-size",
        metavar="SIZE",
        parser=_bytes,
        help="Memory for merged tiles, such as 512MiB; default: an eighth of what is free, at "
        "most 512MiB.",
    ),
]
MaxReadRate = Annotated[
    int | None,
    typer.Option(
        "--max-read-rate",
        metavar="SIZE",
        parser=_bytes,
        help="Most bytes a second to read of the shards, such as 500MB: leaves the rest of the "
        "storage to a training run. Each process (part, Ray worker) has it for itself.",
    ),
]
AllIterations = Annotated[
    bool,
    typer.Option(
        "--all-iterations",
        help="Show every iteration of the run as a directory, and `latest`, a link to the newest: "
        "they appear when their save is complete and go when they are deleted.",
    ),
]
ReadAhead = Annotated[
    int | None,
    typer.Option(
        "--read-ahead",
        metavar="SIZE",
        parser=_bytes,
        help="How far the kernel reads ahead on this mount, where root mounts it; default 4MiB. "
        "Less suits many nodes that each read small parts of all tensors.",
    ),
]
ReadTimeout = Annotated[
    float,
    typer.Option(
        "--read-timeout",
        metavar="SECONDS",
        min=0.1,
        help="How long the storage may take to answer; then opening fails, and who reads a mount "
        "gets an I/O error.",
    ),
]
IndexCache = Annotated[
    bool,
    typer.Option(
        "--index-cache",
        envvar="MCOREFS_INDEX_CACHE",
        help="Keep what CKPT was found to hold in ~/.cache/mcorefs, to open it faster the next "
        "time, as long as none of its files is another.",
    ),
]
Part = Annotated[
    Share | None,
    typer.Option(
        "--part",
        metavar="I/N",
        parser=_share,
        help="Write only the I-th of N parts, as one of N jobs (Slurm arrays, Kubernetes indexed "
        "jobs); the last one completes OUT.",
    ),
]
Finish = Annotated[
    bool, typer.Option("--finish", help="Write nothing but what completes OUT after its parts.")
]
Executor = Annotated[
    str | None,
    typer.Option(
        "--executor",
        metavar="ray",
        help="Write as tasks of a Ray cluster whose nodes share CKPT and OUT.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="ADDRESS", help="That of the Ray cluster; auto: this machine's."
    ),
]


_OF_OPTIONS: Mapping[str, tuple[object, object]] = {
    "iteration": (Iteration, None),
    "format": (FormatName, None),
    "family": (FamilyName, None),
    "task": (TaskName, None),
    "hf_config": (HfConfig, None),
    "tokenizer": (TokenizerPath, None),
    "require_tokenizer": (RequireTokenizer, False),
    "vocab_size": (VocabSize, None),
    "dtype": (Dtype, None),
    "weights": (WhichWeights, "model"),
    "adapter": (Adapter, None),
    "mtp": (WithMtp, True),
    "shard_size": (ShardSize, "50GB"),
    "cache_bytes": (CacheSize, None),
    "max_read_rate": (MaxReadRate, None),
    "read_timeout": (ReadTimeout, READ_TIMEOUT),
    "index_cache": (IndexCache, False),
}
"""What the command line says of each field of `Options`, and the default there."""
CHOICES = (
    "iteration", "format", "family", "task", "hf_config", "vocab_size", "weights", "adapter", "mtp",
    "read_timeout",
)  # fmt: skip
"""Fields of `Options` that every command takes."""


def with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command that has a parameter `options: Options`: its place on the command line is
    taken by an option for each of these fields."""
    names = tuple(sorted(names, key=list(_OF_OPTIONS).index))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name == "options":
                parameters += (_parameter(name) for name in names)
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        @functools.wraps(command)
        def taking(**given: object) -> None:
            chosen = {name: given.pop(name) for name in names}
            command(options=_options(chosen), **given)

        taking.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        taking.__annotations__ = {each.name: each.annotation for each in parameters}
        return taking

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    annotation, default = _OF_OPTIONS[name]
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _options(chosen: Mapping[str, object]) -> Options:
    fields = dict(chosen)
    adapter, seconds = chosen["adapter"], chosen["read_timeout"]
    if isinstance(adapter, str):
        assert isinstance(seconds, float)
        try:
            path, scale = patiently(lambda: parse_adapter(adapter), seconds)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--adapter") from None
        fields |= {"adapter": path, "adapter_scale": scale}
    return replace(Options(), **fields)  # type: ignore[arg-type]
