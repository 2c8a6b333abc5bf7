"""Names that Megatron's modules give to their parameters, for all that meet them on disk.

Sources: Megatron-LM:megatron/core/transformer/moe/experts.py, extensions/transformer_engine.py and
transformer/fsdp_dtensor_checkpoint.py.
"""

from __future__ import annotations

import re

WRAPPERS = re.compile(r"(?:(?:module|model)\.)+(?=(?:embedding|decoder|output_layer|mtp)\.)")
"""What a training framework wraps around the model (NeMo 2: `module.`, NeMo 1: `model.`,
Megatron-FSDP: `model.module.`)."""

Expert = tuple[str, int, str]
"""(module that holds the experts, number, parameter): ("decoder.layers.0.mlp.experts", 3,
"linear_fc1.weight")."""

_SEQUENTIAL = re.compile(r"(.+\.experts)\.local_experts\.(\d{1,9})\.(.+)$")
_GROUPED = re.compile(r"(.+\.experts)\.(linear_fc[12]\.(?:weight|bias))(\d{1,9})(_[wv])?$")


def unwrapped(name: str) -> str:
    """`name` from the root of the model."""
    return WRAPPERS.sub("", name, count=1) if WRAPPERS.match(name) else name


def expert_of(name: str) -> Expert | None:
    """Whose parameter `name` is, where a module has each expert's under a name of its own.

    SequentialMLP   experts.local_experts.3.linear_fc1.weight
    TEGroupedMLP    experts.linear_fc1.weight3
    Megatron-FSDP   either, with _w (gate) or _v (up) behind it
    """
    if match := _SEQUENTIAL.match(name):
        return match[1], int(match[2]), match[3]
    if match := _GROUPED.match(name):
        return match[1], int(match[3]), match[2] + (match[4] or "")
    return None
