"""The arguments and options that commands share: their names, and what `--help` says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcorefs import wording
from mcorefs.formats import NAMES
from mcorefs.mapping.heads import TASKS
from mcorefs.model import DTYPES, WEIGHTS, Options, parse_adapter
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
        help="A checkpoint that holds a LoRA adapter (ms-swift, Megatron-Bridge): merged into the "
        "weights when they are read. SCALE replaces alpha / r.",
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
        "storage to a training run.",
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
        help="How long the storage may take to answer a read of a shard before who asked gets an "
        "I/O error.",
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


def to_options(
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
    mtp: bool,
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
        mtp=mtp,
    )


def _adapter(text: str) -> tuple[Path, float | None]:
    try:
        return parse_adapter(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--adapter") from None
