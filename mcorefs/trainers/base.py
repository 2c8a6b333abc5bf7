"""What a training framework leaves beside the weights, and how one is added.

A trainer is one file in this folder that implements `Trainer`, and one line in
`mcorefs/trainers/__init__.py`. It reads small files as plain data, never runs anything, and knows
nothing of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mcorefs.formats import Checkpoint
from mcorefs.locate import Location
from mcorefs.storage import read_file


@dataclass(frozen=True)
class LoraTraining:
    """How a LoRA adapter was trained, as far as its framework says."""

    rank: int | None = None
    alpha: float | None = None
    is_rank_stabilised: bool = False
    """Scaled by alpha / sqrt(rank) (rsLoRA)."""
    targets: tuple[str, ...] = ()
    """The modules that were to be adapted, as the user named them."""
    base: str | None = None
    """The model it was trained on top of: a directory, or a name on a hub."""
    base_checkpoint: Path | None = None
    """The Megatron checkpoint of that model, if it was one; it need not exist here."""
    merged: Path | None = None
    """A Hugging Face directory on this machine in which the framework merged the two itself."""


@dataclass(frozen=True)
class Companions:
    """What was found beside one checkpoint."""

    trainer: str
    """The framework, as it calls itself: "Megatron-LM"."""
    args: Mapping[str, object]
    """How the model was built and trained, in the names of Megatron-LM's arguments (those that
    `mapping` reads), whatever the framework calls them; empty where nothing says."""
    args_source: str
    """Where `args` were found, or why there are none, in words for the user."""
    model_type: str | None = None
    """The Hugging Face `model_type`, where the framework names it."""
    hf_directories: tuple[Path, ...] = ()
    """Directories on this machine with the config.json of this model or of the model it was trained
    from, the best first."""
    config: Mapping[str, object] = field(default_factory=dict)
    """What the framework itself recorded of the config.json of the model it was trained from."""
    tokenizers: tuple[Path, ...] = ()
    """Places where its tokenizer is, the best first; they need not exist."""
    remarks: tuple[str, ...] = ()
    """What the user should know."""
    lora: LoraTraining | None = None
    """Of the adapter that was trained, if it was one."""
    task: str | None = None
    """What it was trained for, in ms-swift's words (`mapping.heads`), where the framework says."""


def is_model_directory(path: Path) -> bool:
    """Whether the config.json of a model lies in `path`; other programs use that name too."""
    try:
        config = json.loads(read_file(path / "config.json", 16 << 20))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and isinstance(config.get("model_type"), str)


def number(value: object) -> float | None:
    """`value` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e30 else None


class Trainer(Protocol):
    """Recognises what one framework leaves. Stateless."""

    name: str

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        """What is beside `checkpoint`, or None if another framework wrote it.

        Raises CheckpointError where its files are there but cannot be read.
        """
        ...
