"""ms-swift (its Megatron side): `args.json` beside the iterations, or above them.

    <output>/vN-<time>/args.json
    <output>/vN-<time>/checkpoint-<n>/{args.json, latest_checkpointed_iteration.txt, iter_*}    4.x
    <save>/{args.json, latest_checkpointed_iteration.txt, iter_*}                               3.x

It names the model that was trained (`model`: a directory or the hub's name; `model_dir`: where that
was on the machine that trained) and its kind (`model_type`). Config and
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
from mcorefs.trainers.base import Companions, LoraTraining, is_model_directory, number
from mcorefs.trainers.hub import local_copies

ARGS = "args.json"
_LEVELS = 2
"""Directories above the iterations in which `args.json` is looked for too."""
_LLAMA, _QWEN2, _DEEPSEEK_V3 = "llama", "qwen2", "deepseek_v3"
_MODEL_TYPES: Mapping[str, str] = {
    "codefuse_codellama": _LLAMA,
    "openbuddy_llama": _LLAMA,
    "yi": _LLAMA,
}
"""Kinds of model that its Megatron side trains, by ms-swift's own name where that is not Hugging
Face's `model_type`; since 4.0 it mostly is (ms-swift:swift/model/constant.py)."""
_MODEL_TYPES_3: Mapping[str, str | None] = {
    **_MODEL_TYPES,
    **dict.fromkeys(("qwen2_5", "qwen2_5_math", "qwq", "qwq_preview", "marco_o1"), _QWEN2),
    **dict.fromkeys(("qwen3_thinking", "qwen3_guard"), "qwen3"),
    **dict.fromkeys(("qwen3_moe_thinking", "qwen3_coder"), "qwen3_moe"),
    "qwen3_next_thinking": "qwen3_next",
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2", "longwriter_llama3_1"), _LLAMA),
    **dict.fromkeys(("deepseek", "yi_coder", "sus", "skywork_o1", "openbuddy_llama3"), _LLAMA),
    **dict.fromkeys(("megrez", "reflection", "numina", "ziya", "mengzi3"), _LLAMA),
    **dict.fromkeys(("deepseek_r1", "deepseek_v3_1", "moonlight", "kimi_k2"), _DEEPSEEK_V3),
    "deepseek_v3_2": "deepseek_v32",
    **dict.fromkeys(("glm4_5", "glm4_7"), "glm4_moe"),
    "glm4_0414": "glm4",
    "deepseek_moe": "deepseek",
    # One name for several kinds, or for another kind than Hugging Face's of that name.
    **dict.fromkeys(("qwen3_nothinking", "deepseek_r1_distill", "deepseek_v2_5"), None),
    **dict.fromkeys(("ernie", "ernie_thinking", "glm4"), None),
}
"""The same before 4.0, when a name also told the chat template; None: nothing can be told by it
(ms-swift@v3.12.6:swift/megatron/model/gpt/__init__.py, `architectures` in swift/llm/model)."""


class MsSwift:
    """Known by what its `args.json` holds."""

    name = "ms-swift"

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        found = _args(location.root)
        if found is None:
            return None
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
            model_type=_model_type(found),
            task=_text(found.get("task_type")),
            hf_directories=directories,
            remarks=remarks,
            lora=_lora(found, location.root),
        )


def _model_type(args: Mapping[str, object]) -> str | None:
    """Hugging Face's name of the kind of model; None if it cannot be told."""
    stated, version = args.get("model_type"), args.get("swift_version")
    if not isinstance(stated, str):
        return None
    major = version.partition(".")[0] if isinstance(version, str) else ""
    is_old = not major.isdecimal() or int(major) < 4
    return _MODEL_TYPES_3.get(stated, stated) if is_old else _MODEL_TYPES.get(stated, stated)


def _lora(args: Mapping[str, object], root: Path) -> LoraTraining | None:
    """What was trained, if that was a LoRA adapter; `train_type` and `load` are 3.x's names.

    Its base model is a Megatron checkpoint (`mcore_model`) or was loaded from Hugging Face weights.
    """
    kind = args.get("tuner_type", args.get("train_type"))
    if not (isinstance(kind, str) and kind.startswith("lora")):
        return None
    rank, alpha, targets = (args.get(n) for n in ("lora_rank", "lora_alpha", "target_modules"))
    checkpoint = _text(args.get("mcore_model")) or _text(args.get("load"))
    merged = root.with_name(f"{root.name}-merged")
    return LoraTraining(
        rank=rank if type(rank) is int else None,
        alpha=number(alpha),
        is_rank_stabilised=args.get("use_rslora") is True,
        targets=tuple(map(str, targets)) if isinstance(targets, list) else (str(targets or ""),),
        base=checkpoint or _text(args.get("model")),
        base_checkpoint=None if checkpoint is None else Path(checkpoint),
        merged=merged if is_model_directory(merged) else None,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value and "\0" not in value else None


def _args(root: Path) -> dict[str, object] | None:
    """The nearest `args.json` that ms-swift wrote."""
    for place in (root, *root.parents[:_LEVELS]):
        found = read_json(place / ARGS) if (place / ARGS).is_file() else None
        if found is not None and ("swift_version" in found or "tuner_type" in found):
            return found
        if found is not None and {"model", "model_type", "template"} <= set(found):
            return found  # 3.x, before the version was recorded
    return None
