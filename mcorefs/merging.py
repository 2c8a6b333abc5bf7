"""A LoRA adapter in the tensors of a Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcorefs import peft
from mcorefs.adapters import Outline
from mcorefs.errors import CheckpointError
from mcorefs.files import FileIdentity
from mcorefs.locate import locate
from mcorefs.mapping.plan import HfTensor
from mcorefs.model import Options
from mcorefs.sources import Adapted


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
    if not peft.is_adapter(path):
        raise CheckpointError(
            "--adapter cannot be given for a Hugging Face model directory unless it is in PEFT's "
            f"format; {locate(path).path} is not"
        )
    added = peft.read_adapter(path)
    base = peft.Base(_is_tied(tensors, config), "vision_config" in config)
    merged, problems = peft.merge(tensors, added, options.adapter_scale, base)
    adapted = Adapted(path, directory, added.training, {}, peft.NAME)
    remark = f"the LoRA adapter in {path} is merged on read into {directory}"
    return Merged(tuple(merged), adapted, added.outline, added.files, tuple(problems), (remark,))


def _is_tied(tensors: Sequence[HfTensor], config: Mapping[str, object]) -> bool:
    """Whether the model's output layer is its embedding."""
    text = config.get("text_config")
    stated = config.get("tie_word_embeddings")
    if stated is None and isinstance(text, dict):
        stated = text.get("tie_word_embeddings")
    if stated is None:
        return not any(tensor.name.endswith("lm_head.weight") for tensor in tensors)
    return stated is True
