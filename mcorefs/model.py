"""A checkpoint as a Hugging Face model: every stage up to the layout, with all problems at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from mcorefs import adapters, catalog, interleaving, peft
from mcorefs.adapters import Adapter, Outline, Saved, Terms, outline
from mcorefs.catalog import Catalog
from mcorefs.dtypes import BY_TORCH, DType
from mcorefs.errors import CheckpointError, MappingError
from mcorefs.formats import HUGGINGFACE, Checkpoint, WeightsFrom
from mcorefs.locate import Location, locate
from mcorefs.mapping import config as configs
from mcorefs.mapping.blocks.model import gamma
from mcorefs.mapping.choose import Choice, choose
from mcorefs.mapping.facts import gather
from mcorefs.mapping.family import Facts, Family
from mcorefs.mapping.heads import TASKS, for_task, task_of
from mcorefs.mapping.layer_lists import without_mtp
from mcorefs.mapping.plan import HfTensor, cast, plan
from mcorefs.mapping.reference import HF_CONFIG, NO_REFERENCE, Reference, own_code, read_reference
from mcorefs.mapping.tokenizer import Tokenizer, find, with_processor
from mcorefs.names import is_of_mtp
from mcorefs.patience import READ_TIMEOUT
from mcorefs.peft import PeftAdapter
from mcorefs.remote import is_url, parse_path
from mcorefs.sources import Adapted, Sources, read_sources, refuse_main_params
from mcorefs.trainers import Companions
from mcorefs.views import View

DTYPES = ("bfloat16", "float16", "float32")
WEIGHTS: tuple[WeightsFrom, ...] = get_args(WeightsFrom)


@dataclass(frozen=True)
class Options:
    """What a user may say about a checkpoint; every field is optional."""

    iteration: int | None = None
    """Which iteration of the run; None: the one its tracker file names."""
    format: str | None = None
    """Which on-disk format, by name; None: the one there is."""
    family: str | None = None
    task: str | None = None
    """What it was trained for, one of TASKS; None: what the trainer says, or generating text."""
    hf_config: Path | None = None
    """A Hugging Face model directory: config keys, tokenizer, generation config."""
    tokenizer: Path | None = None
    """A tokenizer directory or file."""
    require_tokenizer: bool = False
    vocab_size: int | None = None
    dtype: str | None = None
    """Cast weights on read: one of DTYPES."""
    weights: str = "model"
    """One of WEIGHTS; "optimizer" gives float32 unless `dtype` says otherwise."""
    adapter: Path | None = None
    """A LoRA adapter, as a checkpoint or in PEFT's format, to be merged into the weights."""
    adapter_scale: float | None = None
    """What B @ A is multiplied with; None: alpha / r, as in training."""
    mtp: bool = True
    """Whether layers for multi-token prediction are part of the model."""
    shard_size: int | str = "50GB"
    """Largest safetensors file; default as transformers 5."""
    cache_bytes: int | None = None
    """Budget of the tile cache; None: chosen from the memory there is."""
    max_read_rate: int | None = None
    """Most bytes a second that are read of the shards by this process; None: no limit."""
    read_timeout: float | None = READ_TIMEOUT
    """Seconds after which what the storage has not answered fails; None: it waits."""
    index_cache: bool = False
    """Whether the index of the checkpoint is kept for the next time (`index_cache`)."""


@dataclass(frozen=True)
class Model:
    """What is served, before it is laid out in files."""

    location: Location
    checkpoint: Checkpoint
    companions: Companions
    choice: Choice
    facts: Facts
    tensors: tuple[HfTensor, ...]
    config: Mapping[str, object]
    generation_config: bytes
    tokenizer: Tokenizer
    remarks: tuple[str, ...]
    """What the user should know: what was assumed, cut, kept or not found."""
    adapted: Adapted | None = None
    """The LoRA adapter that is merged into the weights, if any."""
    outline: Outline | None = None
    """What it changes."""
    code: Mapping[str, bytes] = field(default_factory=dict)
    """Files of Python that the model comes with, where transformers has no class of it."""

    @property
    def architecture(self) -> str:
        return self.choice.family.architecture


def load(path: Path, options: Options) -> Model:
    """The model in the checkpoint at `path`. Reads metadata only, no tensor data.

    Raises CheckpointError if it cannot be opened, MappingError with every problem of its mapping.
    """
    return load_at(locate(path, options.iteration, options.format), options)


def load_at(location: Location, options: Options) -> Model:
    """`load`, of what was located."""
    weights = which_weights(options.weights)
    named = options.dtype or ("float32" if weights == "optimizer" else None)
    dtype = _dtype(named)
    if location.format is HUGGINGFACE:
        raise CheckpointError(
            f"{location.path} is a Hugging Face model directory already: no conversion is needed, "
            "pass it to from_pretrained as it is"
        )
    sources, added = _sources(location, weights, options)
    checkpoint, beside = sources.checkpoint, sources.companions
    reference = _reference(options, beside)
    canonical = catalog.build(checkpoint.tensors, checkpoint.fc1_ranks)
    canonical, beside, left_out = _with_mtp(options.mtp, canonical, beside)
    refused = f"{location.path} cannot be presented as a Hugging Face model:"
    if not canonical.tensors:
        raise MappingError(refused, canonical.problems)
    adapter = adapters.sort_out(canonical.adapter, canonical.tensors)
    ordered, in_turns = interleaving.undone(
        canonical.tensors, beside.args, beside.trainer, bool(adapter.pairs)
    )
    trained: dict[str, View] = {**ordered, **adapter.whole}
    task, unfit = task_of(trained, _task(options.task) or beside.task)
    if unfit:
        raise MappingError(refused, unfit)
    facts, said, problems = gather(trained, beside.args, reference, options.vocab_size, task)
    choice = choose(trained, facts, options.family, reference, beside.model_type)
    choice = replace(choice, family=for_task(choice.family, task, facts, reference.config))
    remarks = [*location.remarks, *checkpoint.remarks, *beside.remarks, *left_out, *said]
    remarks += _on_values(choice.family, facts, dtype)
    remarks += [text for remark in choice.family.remarks if (text := remark(facts)) is not None]
    if sources.adapted is not None:
        trained, faults = _merged(adapter, trained, facts, sources.adapted, options)
        problems += [*adapter.problems, *faults]
        remarks += adapter.remarks
    tensors, faults = _planned(choice.family, trained, facts, dtype, added, options)
    problems += [*canonical.problems, *in_turns, *faults]
    tokenizer = find(
        options.tokenizer,
        location.path,
        options.hf_config,
        beside.args,
        (*beside.tokenizers, *beside.hf_directories),
    )
    tokenizer = _with_processor(choice.family, tokenizer, reference, beside)
    remarks += tokenizer.remarks
    if tokenizer.largest_id is not None and tokenizer.largest_id >= facts.dims.get(
        "vocab", 1 << 62
    ):
        remarks.append(
            f"the tokenizer in {tokenizer.source} has ids up to {tokenizer.largest_id} but the "
            f"model only {facts.dims['vocab']} tokens: is it the one that was trained with?"
        )
    config: Mapping[str, object] = {}
    if "vocab" in facts.dims:
        config, said, faults = configs.synthesise(
            choice.family, facts, reference, tokenizer.token_ids, named or facts.dtype
        )
        remarks += said
        problems += faults
    code: Mapping[str, bytes] = {}
    if choice.family.has_own_code:
        code, said = own_code(reference)
        remarks += said
    if options.require_tokenizer and not tokenizer.found:
        problems.append(f"--require-tokenizer: none found in {tokenizer.source}")
    if problems:
        raise MappingError(
            f"{location.path} cannot be presented as {choice.family.architecture}:", problems
        )
    generation = configs.generation_config(config, reference, tokenizer.token_ids)
    return Model(
        location,
        checkpoint,
        beside,
        choice,
        facts,
        tuple(tensors),
        config,
        generation,
        tokenizer,
        tuple(remarks),
        sources.adapted,
        outline(canonical.adapter) if added is None else added.outline,
        code,
    )


def _sources(
    location: Location, weights: WeightsFrom, options: Options
) -> tuple[Sources, PeftAdapter | None]:
    """What the model is made of, and the adapter if that is one in PEFT's format."""
    adapter = options.adapter
    if adapter is None or not peft.is_adapter(adapter):
        return read_sources(location, weights, adapter, options.index_cache), None
    added = peft.read_adapter(adapter)
    sources = read_sources(location, weights, None, options.index_cache)
    if sources.adapted is not None:
        raise CheckpointError(
            f"{location.path} holds a LoRA adapter itself: pass the checkpoint of its base model "
            "as CKPT, and one adapter"
        )
    refuse_main_params(weights)
    checkpoint = replace(
        sources.checkpoint,
        files={**sources.checkpoint.files, **added.files},
        remarks=(
            *sources.checkpoint.remarks,
            f"the LoRA adapter in {adapter} is merged on read into {location.path}",
        ),
    )
    adapted = Adapted(adapter, location.path, added.training, {}, peft.NAME)
    return replace(sources, checkpoint=checkpoint, adapted=adapted), added


def _with_mtp(
    wanted: bool, canonical: Catalog, beside: Companions
) -> tuple[Catalog, Companions, list[str]]:
    """Both without multi-token prediction unless it is `wanted`, and a remark on what that is."""
    if wanted:
        return canonical, beside, []
    count = sum(map(is_of_mtp, canonical.tensors))
    args = without_mtp(beside.args)
    said = [f"left out: {count} tensors for multi-token prediction (--no-mtp)"] if count else []
    return canonical.without(is_of_mtp), replace(beside, args=args), said


def _with_processor(
    family: Family, tokenizer: Tokenizer, reference: Reference, beside: Companions
) -> Tokenizer:
    if not family.sections:
        return tokenizer
    places = (reference.directory, *beside.hf_directories)
    given = reference.directory if reference.where == HF_CONFIG else None
    return with_processor(tokenizer, [place for place in places if place is not None], given)


def _merged(
    adapter: Adapter,
    trained: Mapping[str, View],
    facts: Facts,
    adapted: Adapted,
    options: Options,
) -> tuple[dict[str, View], list[str]]:
    """The tensors of the model with the adapter, and every problem."""
    saved = Saved.of(adapted.args, adapted.format)
    terms = Terms(adapted.training, options.adapter_scale, facts.dims, saved)
    return adapters.merge(adapter, trained, terms)


def _planned(
    family: Family,
    trained: Mapping[str, View],
    facts: Facts,
    dtype: DType | None,
    added: PeftAdapter | None,
    options: Options,
) -> tuple[list[HfTensor], list[str]]:
    """The Hugging Face tensors, with an adapter in PEFT's format if one is `added`, and every
    problem."""
    if added is None:
        return plan(family, trained, facts, dtype)
    tensors, problems = plan(family, trained, facts)
    base = peft.Base(facts.tied, bool(family.sections))
    tensors, faults = peft.merge(tensors, added, options.adapter_scale, base)
    return cast(tensors, dtype), [*problems, *faults]


def parse_adapter(text: str) -> tuple[Path, float | None]:
    """A path, or a path and the scale behind a colon. Raises ValueError if that is no number."""
    before, colon, behind = text.rpartition(":")
    if "/" in behind if is_url(text) else not colon or Path(text).exists():
        return parse_path(text), None
    try:
        scale = float(behind)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise ValueError(f"{text}: there is no such path, and {behind!r} is no scale")
    return parse_path(before), scale


def _reference(options: Options, beside: Companions) -> Reference:
    """The config.json that the user names, else the first one that lies beside the checkpoint."""
    if options.hf_config is not None:
        return read_reference(options.hf_config)
    for directory in beside.hf_directories:
        if (directory / "config.json").is_file():
            return read_reference(directory, str(directory / "config.json"))
    if beside.config:
        return Reference(beside.config, beside.args_source)
    return NO_REFERENCE


def which_weights(name: str) -> WeightsFrom:
    """The weights of that name. Raises CheckpointError."""
    for weights in WEIGHTS:
        if name == weights:
            return weights
    raise CheckpointError(f"--weights {name}: expected one of {', '.join(WEIGHTS)}")


def _task(name: str | None) -> str | None:
    if name is not None and name not in TASKS:
        raise CheckpointError(f"--task {name}: expected one of {', '.join(TASKS)}")
    return name


def _on_values(family: Family, facts: Facts, dtype: DType | None) -> Iterator[str]:
    """What else the weights could be, or were in training."""
    trained_in = facts.args.get("params_dtype")
    if facts.dtype == "float32" and trained_in in ("bfloat16", "float16") and dtype is None:
        yield (
            f"the run computed in {trained_in} but saved the float32 weights that its optimizer "
            f"keeps, which are served as they are (--dtype {trained_in} rounds them)"
        )
    if facts.norms_at_zero and any(rule.block is gamma for rule in family.rules):
        yield (
            "its norms were trained around zero: 1 is added to their weights when they are read, "
            "and the sum rounded to the dtype in which they are stored"
        )


def _dtype(name: str | None) -> DType | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise CheckpointError(f"--dtype {name}: expected one of {', '.join(DTYPES)}")
    return BY_TORCH[name]
