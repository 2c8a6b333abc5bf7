"""The sizes of a vision model, which is a module of transformers' or made of Megatron's layers.

Sizes are those of transformers' modules (transformers:src/transformers/models/qwen3_vl/
modeling_qwen3_vl.py, glm4v/modeling_glm4v.py); Megatron's own are named by what they are called
there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from mcorefs.mapping.family import kind
from mcorefs.names import MEGATRON_VISION, VISION
from mcorefs.views import View

_LAYERS = {
    "vision_layers": re.compile(rf"{VISION}(?:blocks|decoder\.layers)\.(\d+)\."),
    "vision_deepstack": re.compile(rf"{VISION}(?:decoder\.)?deepstack_merger_list\.(\d+)\."),
}
_FC1 = (
    "blocks.*.mlp.linear_fc1.weight",
    "decoder.layers.*.mlp.linear_fc1.weight",
    "blocks.*.mlp.gate_proj.weight",
)
_SIZES: Mapping[str, tuple[tuple[str, ...], int, int]] = {
    "vision_hidden": (("patch_embed.proj.weight",), 5, 0),
    "vision_channels": (("patch_embed.proj.weight",), 5, 1),
    "vision_frames": (("patch_embed.proj.weight",), 5, 2),
    "vision_patch": (("patch_embed.proj.weight",), 5, 3),
    "vision_positions": (("pos_embed.weight", "embeddings.position_embedding.weight"), 2, 0),
    "vision_ffn": (_FC1, 2, 0),
    "vision_merger_ffn": (("merger.gate_proj.weight",), 2, 0),
    "vision_merge": (("downsample.weight",), 4, 2),
    "vision_merged": (("merger.linear_fc1.weight", "merger.mlp.*.weight"), 2, 1),
}
"""(which tensor has it, how many axes that has, on which of them)."""


def vision_sizes(
    tensors: Mapping[str, View], config: Mapping[str, object], problems: list[str]
) -> dict[str, int]:
    """vision_layers and the like, of canonical `tensors`; none if there is nothing that sees.

    `config`: the vision config of a reference, for the number of heads, which no shape shows.
    """
    seen = {name: view for name, view in tensors.items() if name.startswith(VISION)}
    if not seen:
        return {}
    dims: dict[str, int] = {}
    for size, pattern in _LAYERS.items():
        found = {int(match[1]) for name in seen if (match := pattern.match(name))}
        dims[size] = len(found)
        if found != set(range(len(found))):
            problems.append(f"of {size.replace('_', ' ')} {sorted(found)}, some hold no tensor")
    first: dict[str, View] = {}
    for name, view in seen.items():
        first.setdefault(kind(name).removeprefix(VISION), view)
    for size, (names, axes, axis) in _SIZES.items():
        for name in names:
            if name in first and len(first[name].shape) == axes:
                dims[size] = first[name].shape[axis]
    hidden = dims.get("vision_hidden", 0)
    dims["vision_qkv"] = 3 * hidden
    merge = math.isqrt(dims.get("vision_merged", 0) // hidden) if hidden else 0
    if merge and merge * merge * hidden == dims["vision_merged"]:
        dims["vision_merge"] = merge
    dims |= _heads(config.get("num_heads"), hidden, seen, problems)
    indexes = config.get("deepstack_visual_indexes")
    if isinstance(indexes, list) and len(indexes) != dims["vision_deepstack"]:
        problems.append(
            f"deepstack_visual_indexes names {len(indexes)} layers in vision_config but the "
            f"checkpoint holds {dims['vision_deepstack']} deepstack mergers"
        )
    return dims


def _heads(
    heads: object, hidden: int, seen: Mapping[str, View], problems: list[str]
) -> dict[str, int]:
    if type(heads) is int and heads > 0 and hidden % heads == 0:
        return {"vision_heads": heads}
    if type(heads) is int:
        problems.append(f"num_heads is {heads} in vision_config, which cannot share {hidden} rows")
    elif any(name.startswith(MEGATRON_VISION) for name in seen):
        problems.append(
            "the number of heads in its vision model is recorded nowhere in the checkpoint; pass "
            "--hf-config with the directory of the model it was trained from"
        )
    return {}
