"""The experts of one rank, however its module lays them out, under one name each.

Megatron-LM:megatron/core/transformer/moe/experts.py and extensions/transformer_engine.py:

    SequentialMLP   experts.local_experts.{i}.linear_fc1.weight   [2f, H]
    TEGroupedMLP    experts.linear_fc1.weight{i}                  [2f, H]
                    experts.linear_fc1.weight                     [n, 2f, H], with
                                                                  moe_single_grouped_weight
    GroupedMLP      experts.weight1   [H, n * 2f], in memory [n, H, 2f]; up to megatron-core 0.16
                    experts.weight2   [n * f, H], in memory [n, f, H]
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mcorefs.formats.torch_legacy import delta_net, head_gates, mamba
from mcorefs.formats.torch_legacy.tensor_parallel import Part
from mcorefs.names import Expert, expert_of

MAX_EXPERTS = 1 << 16
"""On one rank; a stride of zero makes any number of one."""
_STACKED = re.compile(r"(.+\.experts)\.(linear_fc[12]\.(?:weight|bias))$")
_TRANSPOSED = re.compile(r"(.+\.experts)\.weight([12])$")


def experts_of(
    parts: Mapping[str, Part], ep: int, args: Mapping[str, object], problems: list[str]
) -> tuple[dict[str, Part], dict[Expert, Part]]:
    """(all that is no expert's, all that is an expert's) of what a rank holds, of `ep` ranks.

    Experts have the numbers that they have on the rank; gated delta nets, Mamba mixers and what
    holds gates of heads are divided.
    """
    dense: dict[str, Part] = {}
    experts: dict[Expert, Part] = {}
    for name, part in parts.items():
        if (expert := expert_of(name)) is not None:
            experts[expert] = part
        elif (match := _STACKED.match(name)) and part.shape and part.shape[0] <= MAX_EXPERTS:
            for number in range(part.shape[0]):
                experts[match[1], number, match[2]] = part.select(number)
        elif match := _TRANSPOSED.match(name):
            router = parts.get(f"{match[1].removesuffix('.experts')}.router.weight")
            count = router.shape[0] // ep if router is not None and router.shape else 0
            if (stack := _untransposed(match[2], part, count)) is None:
                problems.append(
                    f"{name} has shape {list(part.shape)}, which {count} experts (router rows / EP)"
                    " cannot share"
                )
                continue
            for number in range(count):
                experts[match[1], number, f"linear_fc{match[2]}.weight"] = stack.select(number)
        else:
            dense[name] = part
    mixers = mamba.divided(delta_net.divided(dense, problems), problems)
    return head_gates.divided(mixers, args, problems), experts


def _untransposed(which: str, part: Part, count: int) -> Part | None:
    """GroupedMLP's weight1 or weight2 as [experts, out, in], the order of every other layout."""
    if len(part.shape) != 2 or not part.is_row_major or not 0 < count <= MAX_EXPERTS:
        return None
    hidden, stacked = part.shape if which == "1" else part.shape[::-1]
    if stacked % count:
        return None
    width = stacked // count
    if which == "1":
        return part.viewed((count, width, hidden), (hidden * width, 1, width))
    return part.viewed((count, hidden, width), (width * hidden, 1, hidden))
