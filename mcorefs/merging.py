"""A LoRA adapter in the tensors of a Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mcorefs import catalog, deltas, peft
from mcorefs.adapters import Outline, outline
from mcorefs.files import FileIdentity
from mcorefs.mapping.plan import HfTensor
from mcorefs.mapping.reference import read_reference
from mcorefs.model import Options
from mcorefs.sources import Adapted, Sources, read_adapter


@dataclass(frozen=True)
class Merged:
    """What becomes of such a directory."""

    tensors: tuple[HfTensor, ...]
    """As many as before, with the same names, shapes and dtypes."""
    adapted: Adapted
    outline: Outline
    """What the adapter changes."""
    files: Mapping[str, FileIdentity]
    """Those of the adapter that are read."""
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def merge_into(
    directory: Path, tensors: Sequence[HfTensor], config: Mapping[str, object], options: Options
) -> Merged:
    """The adapter of `options` in `tensors`, which are those of `directory`.

    Raises CheckpointError where the adapter cannot be opened.
    """
    path = options.adapter
    assert path is not None
    tied = _is_tied(tensors, config)
    if not peft.is_adapter(path):
        return _of_megatron(directory, tensors, tied, options, read_adapter(path))
    added = peft.read_adapter(path)
    base = peft.Base(tied, "vision_config" in config)
    merged, problems = peft.merge(tensors, added, options.adapter_scale, base)
    adapted = Adapted(path, directory, added.training, {}, peft.NAME)
    remarks = _remarks(adapted)
    return Merged(tuple(merged), adapted, added.outline, added.files, tuple(problems), remarks)


def _of_megatron(
    directory: Path,
    tensors: Sequence[HfTensor],
    tied: bool,
    options: Options,
    source: Sources,
) -> Merged:
    reference = read_reference(directory, str(directory / "config.json"))
    merged, problems = deltas.add_to(tensors, source, options.adapter_scale, reference)
    if tied:
        both = zip(merged, tensors, strict=True)
        problems += peft.untied(new.name for new, old in both if new.view is not old.view)
    assert source.adapted is not None
    adapted = replace(source.adapted, base=directory)
    return Merged(
        tuple(merged),
        adapted,
        outline(catalog.build(source.checkpoint.tensors).adapter),
        source.checkpoint.files,
        tuple(problems),
        (*source.checkpoint.remarks, *_remarks(adapted)),
    )


def _remarks(adapted: Adapted) -> tuple[str, ...]:
    remark = f"the LoRA adapter in {adapted.path} is merged on read into {adapted.base}"
    named = adapted.training.base
    if named is None or named == str(adapted.base):
        return (remark,)
    return remark, f"it was trained on top of {named}, as its run says: is that the base model?"


def _is_tied(tensors: Sequence[HfTensor], config: Mapping[str, object]) -> bool:
    """Whether the model's output layer is its embedding."""
    text = config.get("text_config")
    stated = config.get("tie_word_embeddings")
    if stated is None and isinstance(text, dict):
        stated = text.get("tie_word_embeddings")
    if stated is None:
        return not any(tensor.name.endswith("lm_head.weight") for tensor in tensors)
    return stated is True
