"""Which checkpoints a model is made of: one, or a base model and a LoRA adapter of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mcorefs import index_cache
from mcorefs.errors import CheckpointError
from mcorefs.formats import HUGGINGFACE, Checkpoint, WeightsFrom
from mcorefs.locate import Location, locate
from mcorefs.names import is_of_adapter, is_wrapped, unwrapped
from mcorefs.trainers import Companions, LoraTraining, companions

_MERGE_ELSEWHERE = (
    "or merge them with the framework that trained it (ms-swift: --merge_lora true; "
    "Megatron-Bridge: examples/peft/merge_lora.py)"
)


@dataclass(frozen=True)
class Adapted:
    """The adapter among the tensors of a model."""

    path: Path
    """Where it was saved."""
    base: Path | None
    """The checkpoint of its base model; None where both were saved as one."""
    training: LoraTraining
    args: Mapping[str, object]
    """How the run that trained it was set up."""
    format: str
    """In which format that run saved it."""


@dataclass(frozen=True)
class Sources:
    """What a model is made of."""

    location: Location
    """What the user named."""
    checkpoint: Checkpoint
    """All tensors, and all files they are in; args are those of the base model."""
    companions: Companions
    adapted: Adapted | None = None


@dataclass(frozen=True)
class _Read:
    """One checkpoint, with what lies beside it."""

    location: Location
    checkpoint: Checkpoint
    beside: Companions

    @property
    def adapter(self) -> list[str]:
        """Fqns of the tensors that are an adapter's."""
        return [fqn for fqn in self.checkpoint.tensors if is_of_adapter(unwrapped(fqn))]

    @property
    def has_base(self) -> bool:
        return _has_base(self.checkpoint.tensors)

    @property
    def training(self) -> LoraTraining:
        return self.beside.lora or LoraTraining()


def _has_base(names: Iterable[str]) -> bool:
    """Whether there is a model; an adapter may come with biases of the modules it adapts."""
    return any(not is_of_adapter(unwrapped(fqn)) and not is_wrapped(fqn) for fqn in names)


def read_sources(
    location: Location, weights: WeightsFrom, adapter: Path | None, remembers: bool = False
) -> Sources:
    """The checkpoint at `location` with the one at `adapter`; or, where it is only an adapter
    itself, with the base model that the adapter was trained on top of. What `location` holds may be
    remembered from before, and will be, if that is wanted (`index_cache`).

    Raises CheckpointError, which says what to pass where the other one is missing.
    """
    own = _read(location, weights, remembers)
    given = None if adapter is None else locate(adapter)
    if given is not None and given.path != location.path:
        return _with_adapter(own, given, weights)
    if not own.adapter:
        if given is not None:
            raise _no_adapter(given)
        return Sources(location, own.checkpoint, own.beside)
    refuse_main_params(weights)
    if own.has_base:
        adapted = Adapted(location.path, None, own.training, own.beside.args, own.checkpoint.format)
        return Sources(location, own.checkpoint, own.beside, adapted)
    base = _recorded_base(own)
    remark = f"{location.path} holds a LoRA adapter: merged on read into {base.location.path}"
    return _joined(location, base, own, remark)


def _read(location: Location, weights: WeightsFrom, remembers: bool = False) -> _Read:
    if remembers:
        checkpoint = index_cache.index(location.format, location.path, weights)
    else:
        checkpoint = location.format.index(location.path, weights)
    return _Read(location, checkpoint, companions(location, checkpoint))


def read_adapter(path: Path) -> Sources:
    """The adapter in the checkpoint at `path`, without the base model that may be in it too.

    Raises CheckpointError where there is none.
    """
    located = locate(path)
    if located.format is HUGGINGFACE:
        raise _no_adapter(located)
    read = _read(located, "model")
    if not read.adapter:
        raise _no_adapter(located)
    added = {fqn: read.checkpoint.tensors[fqn] for fqn in read.adapter}
    adapted = Adapted(located.path, None, read.training, read.beside.args, read.checkpoint.format)
    return Sources(located, replace(read.checkpoint, tensors=added), read.beside, adapted)


def _with_adapter(own: _Read, located: Location, weights: WeightsFrom) -> Sources:
    refuse_main_params(weights)
    here = own.location.path
    if own.adapter:
        what = "a LoRA adapter of its own" if own.has_base else "only a LoRA adapter itself"
        raise CheckpointError(
            f"{here} holds {what}: pass the checkpoint of its base model as CKPT, and one adapter"
        )
    if located.format is HUGGINGFACE:
        raise _no_adapter(located)
    other = _read(located, "model")
    if not other.adapter:
        raise _no_adapter(located)
    remark = f"the LoRA adapter in {located.path} is merged on read into {here}"
    return _joined(own.location, own, other, remark)


def _no_adapter(located: Location) -> CheckpointError:
    return CheckpointError(f"--adapter: {located.path} holds a model, but no LoRA adapter")


def _joined(location: Location, base: _Read, adapter: _Read, remark: str) -> Sources:
    added = {fqn: adapter.checkpoint.tensors[fqn] for fqn in adapter.adapter}
    remarks = dict.fromkeys((*base.checkpoint.remarks, *adapter.checkpoint.remarks))
    checkpoint = replace(
        base.checkpoint,
        tensors={**base.checkpoint.tensors, **added},
        files={**base.checkpoint.files, **adapter.checkpoint.files},
        remarks=(*remarks, remark),
    )
    mine, its = base.beside, adapter.beside
    # Those of `location` are looked for anyway.
    other = adapter.location if location is base.location else base.location
    places = (other.path, other.path / "tokenizer", other.root, other.root / "tokenizer")
    beside = replace(
        mine,
        model_type=mine.model_type or its.model_type,
        hf_directories=tuple(dict.fromkeys((*mine.hf_directories, *its.hf_directories))),
        tokenizers=tuple(dict.fromkeys((*its.tokenizers, *mine.tokenizers, *places))),
        remarks=tuple(dict.fromkeys((*mine.remarks, *its.remarks))),
        lora=its.lora,
    )
    adapted = Adapted(
        adapter.location.path,
        base.location.path,
        adapter.training,
        its.args,
        adapter.checkpoint.format,
    )
    return Sources(location, checkpoint, beside, adapted)


def _recorded_base(adapter: _Read) -> _Read:
    """The checkpoint that the run which trained `adapter` began with, if it is on this machine."""
    place = adapter.training.base_checkpoint
    if place is None:
        raise CheckpointError(_no_base(adapter, "loaded from Hugging Face weights"))
    if not (place.is_absolute() and place.exists()):
        raise CheckpointError(_no_base(adapter, "which is not on this machine"))
    try:
        location = locate(place)
        if location.format is HUGGINGFACE:
            raise CheckpointError(f"{place} is a Hugging Face model: it is not taken unasked")
        base = _read(location, "model")
    except CheckpointError as problem:
        raise CheckpointError(_no_base(adapter, f"which cannot be used: {problem}")) from None
    if not base.has_base or base.adapter:
        raise CheckpointError(_no_base(adapter, "which holds an adapter itself"))
    return base


def _no_base(adapter: _Read, why: str) -> str:
    """What to do with an adapter whose base model is not there."""
    path, training = adapter.location.path, adapter.training
    named = f" ({training.base}, {why})" if training.base else ""
    text = (
        f"{path} holds only a LoRA adapter ({len(adapter.adapter)} tensors), not the base model "
        f"that it was trained on top of{named}. Pass the base model, as a Megatron checkpoint or a "
        f"Hugging Face model directory{_perhaps(adapter)}, as CKPT, and --adapter {path}"
    )
    if training.merged is not None:
        return f"{text}; the two were merged already when it was saved: pass {training.merged}"
    return f"{text}; {_MERGE_ELSEWHERE}"


def _perhaps(adapter: _Read) -> str:
    """Which directories on this machine have the model that the run names, in words."""
    found = [place for place in adapter.beside.hf_directories if HUGGINGFACE.detect(place)]
    return f" (perhaps {' or '.join(map(str, found))})" if found else ""


def refuse_main_params(weights: WeightsFrom) -> None:
    """Raises CheckpointError unless `weights` are those that an adapter is made for."""
    if weights != "model":
        raise CheckpointError(
            f"--weights {weights} cannot be given where a LoRA adapter is merged: its base model "
            "was not trained, and has no main parameters"
        )
