"""verl's checkpoints: which directory below global_step_N holds the weights.

    RUN/latest_checkpointed_iteration.txt           N; not there yet while saves are asynchronous
    RUN/global_step_N/actor/                        one role: actor or critic (PPO), or none (SFT)
        transformer_config.json
        ckpt_contents.json                          layout 2; written last
        model/dist_ckpt/       model/huggingface/   layout 2; each may be missing
        optimizer/dist_ckpt/   extra/dist_ckpt/
        dist_ckpt/             huggingface/         layout 1: all sharded state in one directory

Where verl saves weights through a bridge (its default) they are in `huggingface`, and the sharded
directory of layout 1 holds the optimizer only.

Layout facts: verl:verl/utils/checkpoint/megatron_checkpoint_manager.py, utils/megatron_utils.py,
trainer/ppo/ray_trainer.py; scripts/migrate_megatron_checkpoint_layout.py for layout 1.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from mcorefs.errors import CheckpointError
from mcorefs.storage import read_file

STEP = re.compile(r"global_step_([0-9]+)")
CONTENTS, TRANSFORMER_CONFIG = "ckpt_contents.json", "transformer_config.json"
_ROLES = ("actor", "critic")
_PARTS = ("model", "optimizer", "extra")
_LEAVES = ("dist_ckpt", "huggingface")
_MAX_JSON = 1 << 22


@dataclass(frozen=True)
class Role:
    """What was saved of one model of a step."""

    path: Path
    """Its directory: RUN/global_step_N/actor."""
    sharded: Path
    """Where sharded weights are, if there are any."""
    huggingface: Path
    """Where config.json and tokenizer are, and perhaps weights, if it exists."""
    is_finished: bool
    """Whether verl says that it was saved completely; layout 1 cannot say."""
    is_fsdp: bool
    """Whether verl's FSDP backend wrote it: no Megatron checkpoint."""


def above(path: Path) -> Path | None:
    """The step that `path` is, or is a part of."""
    places = (path, *list(path.parents)[:3])
    return next((place for place in places if STEP.fullmatch(place.name)), None)


def role_at(path: Path) -> Role | None:
    """The model to read in `path`: a role's directory, or a step's, of whose roles the actor is
    taken. None if it is neither."""
    if (role := _role(path)) is not None or not STEP.fullmatch(path.name):
        return role
    roles = [role for name in _ROLES if (role := _role(path / name)) is not None]
    return roles[0] if roles else None


def enclosing(path: Path) -> Role | None:
    """The role of which `path` is a part: its `model`, `dist_ckpt`, `optimizer/dist_ckpt`, ..."""
    above = path.parent
    if path.name in _LEAVES and above.name in _PARTS:
        return _role(above.parent)
    if path.name in _LEAVES or path.name in _PARTS:
        return _role(above)
    return None


def _role(path: Path) -> Role | None:
    try:
        if not _is_role(path):
            return None
        split = any((path / part).is_dir() for part in _PARTS)
        at = path / "model" if split else path
        finished = (path / CONTENTS).is_file() or not split
        fsdp = any(path.glob("model_world_size_*_rank_*.pt"))
        return Role(path, at / "dist_ckpt", at / "huggingface", finished, fsdp)
    except OSError:
        return None


def _is_role(path: Path) -> bool:
    """Whether verl saved a model in `path`: names as plain as `model` need a witness."""
    leaves = (path / leaf for leaf in _LEAVES)
    parts = (path / part / leaf for part in _PARTS for leaf in _LEAVES)
    if not any(place.is_dir() for place in (*leaves, *parts)):
        return False
    named = STEP.fullmatch(path.name) or STEP.fullmatch(path.parent.name) or path.name in _ROLES
    return bool(named) or any((path / name).is_file() for name in (CONTENTS, TRANSFORMER_CONFIG))


def read_json(path: Path) -> dict[str, object] | None:
    """The object in one of verl's JSON files; None where there is no such file.

    Raises CheckpointError if it cannot be read.
    """
    try:
        value = json.loads(read_file(path, _MAX_JSON))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as problem:
        why = getattr(problem, "strerror", None) or f"is not JSON: {problem}"
        raise CheckpointError(f"{path} cannot be read: {why:.200}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value
