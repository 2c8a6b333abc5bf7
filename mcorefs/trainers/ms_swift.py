"""ms-swift (its Megatron side): `args.json` beside the iterations, or above them.

    <output>/vN-<time>/args.json
    <output>/vN-<time>/checkpoint-<n>/{args.json, latest_checkpointed_iteration.txt, iter_*}    4.x
    <save>/{args.json, latest_checkpointed_iteration.txt, iter_*}                               3.x

It names the model that was trained (`model`: a directory or the hub's name; `model_dir`: where that
was on the machine that trained) and its kind (`model_type`, mostly Hugging Face's own). Config and
tokenizer are seldom saved, so they are looked for there, and where the hubs' clients keep what they
downloaded; nothing is downloaded. Layout facts: ms-swift:swift/megatron/trainers/base.py
save_checkpoint, swift/arguments/base_args/base_args.py save_args.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mcorefs.formats import Checkpoint
from mcorefs.locate import Location
from mcorefs.steps import read_json
from mcorefs.trainers.base import Companions, is_model_directory
from mcorefs.trainers.hub import local_copies

ARGS = "args.json"
_LEVELS = 2
"""Directories above the iterations in which `args.json` is looked for too."""
_MODEL_TYPES: Mapping[str, str] = {
    "qwen3_moe_thinking": "qwen3_moe",
    "qwen3_coder": "qwen3_moe",
    "qwen3_thinking": "qwen3",
    "qwen3_nothinking": "qwen3",
    "qwen2_5": "qwen2",
}
"""ms-swift's own names of kinds of model; the others are Hugging Face's."""


class MsSwift:
    """Known by what its `args.json` holds."""

    name = "ms-swift"

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        found = _args(location.root)
        if found is None:
            return None
        stated = found.get("model_type")
        kind = _MODEL_TYPES.get(stated, stated) if isinstance(stated, str) else None
        named = [name for key in ("model_dir", "model") if isinstance(name := found.get(key), str)]
        directories = tuple(
            place
            for place in dict.fromkeys((location.path, location.root, *local_copies(named)))
            if is_model_directory(place)
        )
        remarks: tuple[str, ...] = ()
        if not directories and named:
            remarks = (
                f"ms-swift trained it from {named[-1]!r}, which is not on this machine; where "
                "config or tokenizer are wanting, give that model with --hf-config DIR",
            )
        return Companions(
            self.name,
            checkpoint.args,
            checkpoint.args_source,
            model_type=kind,
            hf_directories=directories,
            remarks=remarks,
        )


def _args(root: Path) -> dict[str, object] | None:
    """The nearest `args.json` that ms-swift wrote."""
    for place in (root, *root.parents[:_LEVELS]):
        found = read_json(place / ARGS) if (place / ARGS).is_file() else None
        if found is not None and ("swift_version" in found or "tuner_type" in found):
            return found
        if found is not None and {"model", "model_type", "template"} <= set(found):
            return found  # 3.x, before the version was recorded
    return None
