"""`inspect`: what a checkpoint is, whether it is whole, and what a mount would make of it.

Looks as far as it can: a checkpoint that cannot be mounted is described up to what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mcorefs.adapters import Outline, outline
from mcorefs.catalog import build
from mcorefs.errors import CheckpointError, MappingError, NoWeightsError
from mcorefs.formats import HUGGINGFACE, Checkpoint
from mcorefs.locate import Location, locate
from mcorefs.model import Model, Options, which_weights
from mcorefs.passthrough import instead
from mcorefs.patience import patiently
from mcorefs.trainers import LoraTraining, companions
from mcorefs.tree import Source, source_at

PARALLEL: Mapping[str, str] = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
    "CP": "context_parallel_size",
    "DP": "data_parallel_size",
}
"""Names of the parallel sizes among the training arguments."""


@dataclass(frozen=True)
class LoraFound:
    """A LoRA adapter, in the checkpoint or given to it."""

    path: str
    ranks: tuple[int, ...]
    alpha: float | None
    """None where the run does not say, as for the rest."""
    is_rank_stabilised: bool
    targets: tuple[str, ...]
    """Names of the modules that it changes."""
    trained_whole: tuple[str, ...]
    """Names of those that it replaces."""
    base: str | None
    """The base model that it is merged into, or else the one that it was trained on top of; None
    where both are in the checkpoint."""


@dataclass(frozen=True)
class Inspection:
    """What was found. Fields that could not be learnt are None or empty; `problems` says why."""

    path: str
    format: str
    iteration: int | None
    iterations: tuple[str, ...]
    """All complete iterations beside it."""
    incomplete: tuple[str, ...]
    """Iterations that are still being written, or never were finished."""
    problems: tuple[str, ...] = ()
    """Why it cannot be mounted; empty if it can."""
    architecture: str | None = None
    evidence: tuple[str, ...] = ()
    """What the family was told by."""
    parallel: Mapping[str, int] = field(default_factory=dict)
    """Sizes as the training arguments state them: {"TP": 4, "PP": 2, ...}."""
    trainer: str | None = None
    """The framework that wrote it."""
    args_source: str | None = None
    parameters: int | None = None
    total_bytes: int | None = None
    """Bytes of all tensors as served."""
    shard_files: int | None = None
    shard_bytes: int | None = None
    """Bytes of the checkpoint's own files that hold weights, whatever else they hold."""
    chunks: int | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Entries left aside, by kind."""
    dtypes: Mapping[str, int] = field(default_factory=dict)
    """Number of tensors of each dtype."""
    adapter: LoraFound | None = None
    tokenizer: str | None = None
    """Where the tokenizer is from; None if there is none."""
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def inspect(path: Path, options: Options) -> Inspection:
    """Describe the checkpoint at `path`.

    Raises CheckpointError where there is none to describe (wrong level, empty, not a checkpoint).
    """
    return patiently(lambda: _inspect(path, options), options.read_timeout)


def _inspect(path: Path, options: Options) -> Inspection:
    location = locate(path, options.iteration, options.format)
    found = Inspection(
        str(location.path),
        location.format.name,
        location.iteration,
        tuple(location.complete),
        tuple(location.incomplete),
    )
    try:
        source = source_at(location, options)
    except CheckpointError as error:
        return _described(location, options, found, (str(error),))
    except MappingError as error:
        summary = str(error).partition("\n")[0]
        return _described(location, options, found, (summary, *error.problems))
    if source.adapted is not None:  # its tensors are not all CKPT's
        return _of_source(_described(location, options, found, ()), source)
    found = replace(found, path=str(source.location.path))
    return _of_source(_of_checkpoint(found, source.checkpoint), source)


def _described(
    location: Location, options: Options, found: Inspection, problems: tuple[str, ...]
) -> Inspection:
    """`found` with what the checkpoint alone shows."""
    try:
        location, checkpoint = _index(location, options)
    except CheckpointError as error:
        return replace(found, problems=(str(error),))
    found = replace(found, path=str(location.path), problems=problems)
    return replace(_of_checkpoint(found, checkpoint), adapter=_adapter(location, checkpoint))


def _index(location: Location, options: Options) -> tuple[Location, Checkpoint]:
    """Where the weights really are, and what is there."""
    try:
        return location, location.format.index(location.path, which_weights(options.weights))
    except NoWeightsError as error:
        return instead(location, error), HUGGINGFACE.index(instead(location, error).path)


def _of_checkpoint(found: Inspection, checkpoint: Checkpoint) -> Inspection:
    return replace(
        found,
        format=checkpoint.format,
        parallel=_parallel(checkpoint.args),
        args_source=checkpoint.args_source,
        shard_files=len(checkpoint.files),
        shard_bytes=sum(identity.size for identity in checkpoint.files.values()),
        chunks=sum(len(tensor.chunks) for tensor in checkpoint.tensors.values()),
        skipped=checkpoint.skipped,
    )


def _adapter(location: Location, checkpoint: Checkpoint) -> LoraFound | None:
    """The adapter that the checkpoint itself holds."""
    added = build(checkpoint.tensors).adapter
    if not added:
        return None
    training = companions(location, checkpoint).lora or LoraTraining()
    return _lora(location.path, outline(added), training, training.base)


def _lora(path: Path, shape: Outline, training: LoraTraining, base: str | None) -> LoraFound:
    return LoraFound(
        str(path),
        shape.ranks,
        training.alpha,
        training.is_rank_stabilised,
        shape.targets,
        shape.whole,
        base,
    )


def _parallel(args: Mapping[str, object]) -> dict[str, int]:
    sizes = {short: args.get(name) for short, name in PARALLEL.items()}
    return {short: size for short, size in sizes.items() if isinstance(size, int)}


def _of_source(found: Inspection, source: Source) -> Inspection:
    dtypes: dict[str, int] = {}
    for tensor in source.tensors:
        dtypes[tensor.dtype.name] = dtypes.get(tensor.dtype.name, 0) + 1
    found = replace(
        found,
        architecture=source.architecture,
        dtypes=dtypes,
        tokenizer=source.tokenizer.source if source.tokenizer.found else None,
        remarks=source.remarks,
    )
    if source.tensors:
        sizes = [(tensor.nbytes, tensor.dtype.itemsize) for tensor in source.tensors]
        parameters = sum(nbytes // itemsize for nbytes, itemsize in sizes)
        total = sum(nbytes for nbytes, _ in sizes)
        found = replace(found, parameters=parameters, total_bytes=total)
    if (adapted := source.adapted) is not None and source.outline is not None:
        base = None if adapted.base is None else str(adapted.base)
        found = replace(found, adapter=_lora(adapted.path, source.outline, adapted.training, base))
    if not isinstance(source, Model):
        return replace(found, args_source=None)
    return replace(
        found,
        evidence=source.choice.evidence,
        trainer=source.companions.trainer,
        args_source=source.companions.args_source,
        parallel=_parallel(source.companions.args),
    )
